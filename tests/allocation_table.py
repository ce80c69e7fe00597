"""What the paper's E-step makes of a data set: p and G of each problem from a pilot, its weight and its count.

    torchrun tests/allocation_table.py --out table.jsonl --pilot-samples 4             # the toy, on a CPU

One line for each problem: all of them are one step, whatever --prompts-per-step. The flags are those of raft.py's
model, problems, sampling, budget and memory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import run  # noqa: E402 (the project's modules lie one folder up)
from allocator import allocate  # noqa: E402
from batches import add_memory_flags, distribute  # noqa: E402
from data import add_data_flags, load_prompts  # noqa: E402
from files import append_rows  # noqa: E402
from grader import Grader  # noqa: E402
from gvm import RULES, SampleSource, add_budget_flags, estimate, settle_budget  # noqa: E402
from losses import WEIGHTINGS  # noqa: E402
from metrics import describe_pilot  # noqa: E402
from model import Policy  # noqa: E402
from pretrained import add_model_flags, load_model  # noqa: E402
from run import InputError  # noqa: E402
from sampler import add_sampler_flags, make_sampler  # noqa: E402


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    parser.add_argument("--limit", type=run.positive_int, help="use the first problems of --data only")
    parser.add_argument("--out", required=True, help="the table to write; must not exist")
    parser.add_argument("--weighting", choices=WEIGHTINGS, default="prompt", help="as in raft.py: it decides what G is")


def set_up(args, device, out: Path) -> tuple:
    """(model, tokenizer, problems, policy); InputError for what this script cannot do."""
    settle_budget(args)
    if not args.pilot_samples:
        raise InputError("this table shows a pilot, and --allocator uniform, --candidates-per-step take none; leave them out")
    if out.exists():
        raise InputError(f"--out {out}: exists already; choose another name")
    model, tokenizer = load_model(args, device)
    problems = load_prompts(args.data, args.split, tokenizer, args, args.limit, training=True)
    return model, tokenizer, problems, Policy(model, args.temperature)


def main(argv=None) -> None:
    """Write the table; print a summary."""
    args = run.parse_flags(argv, __doc__, add_model_flags, add_data_flags, add_sampler_flags, add_budget_flags,
                           add_memory_flags, add_table_flags)
    device, out = run.join_ranks(), Path(args.out)
    model, tokenizer, problems, policy = run.on_every_rank(set_up, args, device, out)
    run.on_rank0(out.parent.mkdir, 0o777, True, True)
    run.on_rank0(out.touch, 0o666, False)  # claims the name: it must not exist
    if args.fsdp:
        distribute(policy, args.fsdp)
    sampler, rule, number = make_sampler(model, tokenizer, args), RULES[args.allocator], len(problems)
    with Grader() as grader:
        source = SampleSource(policy, sampler, grader, args)
        pilot = source.sample_and_grade(problems, [args.pilot_samples] * number, step=1, with_norms=True)
    # As gvm.e_step, of all problems at once.
    table = estimate(pilot, problems, args.weighting)
    table["weights"] = rule.weights(*(table[name] for name in ("accept_rate", "norm_right", "norm_wrong")), args)
    reused = args.pilot_samples if args.e_step_every == 1 else 0
    table["counts"] = counts = allocate(table["weights"], args.samples_per_prompt * number, min_samples=reused)
    run.on_rank0(append_rows, out, [dict(zip(table, row)) for row in zip(*(x.tolist() for x in table.values()))])
    run.print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} per problem")
    even = args.samples_per_prompt + args.pilot_samples - reused
    ratio = describe_pilot(table, even, is_variance=rule.objective is not None)["predicted_variance"]
    run.print0(f"predicted variance against uniform: {'unknown' if ratio is None else f'{ratio:.3f}'}")


if __name__ == "__main__":
    run.run_script(main)
