"""What the paper's E-step makes of a data set: p and G of each problem from a pilot, its weight and its count.

    torchrun tests/allocation_table.py --out table.jsonl --pilot-samples 4             # the toy, on a CPU

One line for each problem. The flags are those of raft.py's model, sampling and budget.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import run  # noqa: E402 (the project's modules lie one folder up)
from data import Grader, InputError  # noqa: E402
from gvm import SampleSource, add_budget_flags, check_budget, describe_table, pilot_table  # noqa: E402
from model import Policy, add_model_flags, distribute, load_model  # noqa: E402
from sampler import add_sampler_flags, load_prompts, make_sampler  # noqa: E402


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone, and a pilot by default."""
    parser.add_argument("--limit", type=run.positive_int, help="use the first problems of --data only")
    parser.add_argument("--out", required=True, help="the table to write; must not exist")
    parser.set_defaults(predict=False, pilot_samples=2)


def main(argv=None) -> None:
    """Write the table; print a summary."""
    args = run.parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_budget_flags, add_table_flags)
    device, out = run.join_ranks(), Path(args.out)

    def set_up() -> tuple:
        if args.allocator == "uniform" or args.predict:
            raise InputError("--allocator uniform, --predict: take no pilot, which this table shows; leave them out")
        if out.exists():
            raise InputError(f"--out {out}: exists already; choose another name")
        check_budget(args)
        model, tokenizer = load_model(args, device)
        problems = load_prompts(args.data, args.split, tokenizer, args, args.limit)
        return model, tokenizer, problems, Policy(model, args.temperature)

    model, tokenizer, problems, policy = run.on_every_rank(set_up)
    run.on_rank0(out.parent.mkdir, 0o777, True, True)
    run.on_rank0(out.touch, 0o666, False)  # claims the name: it must not exist
    if args.fsdp:
        distribute(policy, args.fsdp)
    sampler = make_sampler(model, tokenizer, args)
    with Grader() as grader:
        table, _ = pilot_table(problems, 1, SampleSource(policy, sampler, grader, args), args)
    counts, ratio = table["counts"], describe_table(table, args)["predicted_variance"]
    table["p"] = table["num_right"] / table["num_drawn"]
    rows = zip(*(column.tolist() for column in table.values()))
    run.on_rank0(run.append_rows, out, [dict(zip(table, row)) for row in rows])
    run.print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} per problem")
    shown = "unknown" if ratio is None else f"{ratio:.3f}"
    run.print0(f"predicted variance against uniform: {shown}")


if __name__ == "__main__":
    run.run_script(main)
