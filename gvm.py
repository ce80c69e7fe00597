"""The E-step: a pilot tells each prompt's p and G, and GVM spends the budget accordingly.

    torchrun gvm.py --out table.jsonl                             # the toy, on a CPU
    torchrun --nproc-per-node 8 gvm.py --model Qwen/Qwen2.5-Math-1.5B --data gsm8k --out t.jsonl

`draw_step` is what training calls in every step. Run alone, this script writes the allocation
table of a data set: a line a problem, with what its samples told of it and how many it got.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from allocator import allocate, estimator_variance, gvm_weights, posterior_weights, reward_weights
from data import TOY, Grader, InputError, Problem, Sample
from model import Policy, add_memory_flags, add_model_flags, fill_logprobs, load_model
from run import append_rows, join_ranks, non_negative, number, on_rank0, parse_flags
from run import positive_int, print0, run_script
from sampler import TRAINING, add_sampler_flags, describe, draw, load_prompts, make_sampler
from sampler import problems_of_step


def gvm_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """Weights, (prompts,) as p, for the log-likelihood of right answers: Proposition 1."""
    return gvm_weights(p, norm_right, args.alpha, args.beta)


def reward_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """Weights, (prompts,) as p, for the expected reward, divided by its std or not: for GRPO."""
    return reward_weights(p, norm_right, norm_wrong, normalize_std=args.advantage == "grpo")


RULES = {"gvm": gvm_rule, "reward": reward_rule}  # --allocator; "uniform" needs no rule


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """The problems, and how samples are spread over them."""
    add = parser.add_argument_group("problems and budget").add_argument
    add("--data", default=str(TOY / "train.jsonl"),
        help="a file, a benchmark's name, or a hub data set name[:config[:split]]")
    add("--split", default="train", help="split of --data, if it is a hub data set that names none")
    add("--samples-per-prompt", type=positive_int, default=8,
        help="the budget, on average over prompts; it includes a pilot that is trained on")
    add("--allocator", choices=["uniform", *RULES], default="gvm",
        help="uniform: equal counts; gvm: the paper's rule, for RAFT; reward: for GRPO")
    add("--pilot-samples", type=positive_int, default=2,
        help="N', samples of each prompt to estimate p and G from; the paper: 8 or 32")
    add("--rounds", type=positive_int, default=3,
        help="parts in which the rest is spent, p and G estimated anew before each; the paper: 1")
    add("--e-step-every", type=positive_int, default=1,
        help="steps that a pilot serves; above 1 it only informs, beside the budget; the paper: 9")
    add("--shrink", action=argparse.BooleanOptionalAction, default=True,
        help="average over all p that the samples allow; the paper takes right/drawn: --no-shrink")
    add("--cost", choices=["samples", "tokens"], default="samples", help="what the budget counts")
    add("--alpha", type=non_negative, default=0.01,
        help="Eq. 7: more of it spends less on prompts that are hardly solved; the paper: 0.001")
    add("--beta", type=number(float, low=2), default=2.0, help="Eq. 7: the power of p")
    add("--weighting", choices=["prompt", "token", "sequence"], default="prompt",
        help="what a sample weighs in the loss: see raft.loss_weights")
    add("--advantage", choices=["grpo", "dr", "loo"], default="grpo", help="see grpo.py")


def check_budget(args: argparse.Namespace, objective: str | None = None) -> None:
    """InputError for a budget without room for pilot or rounds; warns of a rule that misfits."""
    if args.allocator == "uniform":
        return
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples, which it includes")
    if args.e_step_every > 1 and args.rounds > 1:
        raise InputError("--e-step-every above 1 does not spend in rounds: add --rounds 1")
    fitting = {"raft": "gvm", "grpo": "reward"}.get(objective, args.allocator)
    if args.allocator != fitting:
        print0(f"warning: --allocator {args.allocator} fits another gradient estimator; "
               f"here {fitting} does")


def estimate(samples: list[Sample], problems: list[Problem], weighting: str) -> dict:
    """What samples say of their problems: a table, (problems,) a column.

    norm_right, norm_wrong: root mean squares over right and over wrong samples, 0 without any, as
    in the derivation (Algorithm 2 writes the mean). mean_length: of the responses, in tokens.
    """
    position = {problem.id: i for i, problem in enumerate(problems)}
    owners = np.array([position[sample.problem] for sample in samples])  # (samples,), as the next
    is_right = np.array([sample.reward > 0 for sample in samples])
    lengths = np.array([len(sample.response_ids) for sample in samples])
    norms = np.array([sample.grad_norm for sample in samples])
    if weighting == "sequence":  # divides a response's loss, and so its gradient, by its length
        norms = norms / lengths

    def total(values: np.ndarray) -> np.ndarray:
        """(samples,) to (problems,)"""
        return np.bincount(owners, values, minlength=len(problems))

    num_drawn, num_right = total(np.ones(len(samples))), total(is_right)
    return {
        "id": np.array(list(position)),
        "num_right": num_right.astype(int),
        "num_drawn": num_drawn.astype(int),
        "norm_right": np.sqrt(total(norms**2 * is_right) / np.maximum(num_right, 1)),
        "norm_wrong": np.sqrt(total(norms**2 * ~is_right) / np.maximum(num_drawn - num_right, 1)),
        "mean_length": total(lengths) / np.maximum(num_drawn, 1),
    }


def allocation_weights(table: dict, args: argparse.Namespace) -> np.ndarray:
    """The weights that --allocator's rule gives to the problems of a table, (problems,)."""
    rule = partial(RULES[args.allocator], args=args)
    norms = table["norm_right"], table["norm_wrong"]
    if args.shrink:
        return posterior_weights(rule, table["num_right"], table["num_drawn"], *norms)
    return rule(table["num_right"] / table["num_drawn"], *norms)


def plan_round(table: dict, reused: np.ndarray, rounds_left: int, args) -> np.ndarray:
    """How many samples each problem shall have after this round, (problems,).

    reused: how many of those it has, (problems,). A round spends an equal part of what is left of
    the budget. With --cost tokens, a sample costs the mean response tokens of its problem.
    """
    prices = table["mean_length"] if args.cost == "tokens" else np.ones(len(reused))
    spent = prices @ reused
    left = max(args.samples_per_prompt * prices.sum() - spent, 0)
    budget = spent + left / rounds_left
    return allocate(table["weights"], budget, min_samples=reused, prices=prices)


def e_step(problems: list[Problem], draw_more, score, args) -> tuple[dict, list[Sample]]:
    """Algorithm 2: draw a pilot; then estimate, allocate and draw, --rounds times.

    draw_more(problems, counts, first_index): graded samples. score(samples): fills in their
    old_logprobs and grad_norm. Returns the table that the last round was planned with, that of
    `estimate` with "weights" and "counts", the samples of each problem in all; and the samples.
    With --e-step-every above 1 there is only the pilot, and "counts" comes on top of it.
    """
    reuse = args.e_step_every == 1
    counts = np.full(len(problems), args.pilot_samples)
    samples = draw_more(problems, counts, first_index=0)
    for rounds_left in range(args.rounds, 0, -1):
        score([sample for sample in samples if sample.old_logprobs is None])
        table = estimate(samples, problems, args.weighting)
        table["weights"] = allocation_weights(table, args)
        table["counts"] = plan_round(table, counts if reuse else 0 * counts, rounds_left, args)
        if reuse:
            samples += draw_more(problems, table["counts"] - counts, first_index=counts)
            counts = table["counts"]
    return table, samples


def e_step_tools(policy: Policy, sampler, grader, step: int, args) -> tuple:
    """(draw_more, score), as `e_step` wants them, for samples to train on in this step."""
    key, tokens = (args.seed, TRAINING, step), args.tokens_per_micro_batch
    draw_more = partial(draw, sampler, grader, seed_key=key, temperature=args.temperature)
    return draw_more, partial(fill_logprobs, policy, max_tokens=tokens, with_norms=True)


def draw_step(problems, step: int, plan: dict | None, *, policy, sampler, grader, args) -> tuple:
    """Draw one step: (its problems, samples to train on, metrics, the plan for the next step).

    --e-step-every K = 1: an E-step for this step, and no plan. K > 1: an E-step over the problems
    of K steps makes the plan, its table, JSON-ready; their samples are drawn step by step, from the
    policy of that step. (A problem that a new epoch brings twice gets its count both times.)
    """
    batch, pilot = problems_of_step(problems, step, args), []
    draw_more, score = e_step_tools(policy, sampler, grader, step, args)
    if args.allocator == "uniform":
        samples = draw_more(batch, np.full(len(batch), args.samples_per_prompt))
        return batch, samples, describe(batch, samples, pilot), None
    if args.e_step_every == 1:
        table, samples = e_step(batch, draw_more, score, args)
        return batch, samples, describe(batch, samples, pilot) | describe_table(table, args), None
    if plan is None or step >= plan["first_step"] + args.e_step_every:
        ahead = {}  # by id
        for later in range(step, step + args.e_step_every):
            ahead |= {problem.id: problem for problem in problems_of_step(problems, later, args)}
        table, pilot = e_step(list(ahead.values()), draw_more, score, args)
        columns = {name: column.tolist() for name, column in table.items()}
        plan = {"first_step": step, "table": columns}
    row_of = {problem_id: row for row, problem_id in enumerate(plan["table"]["id"])}
    rows = [row_of[problem.id] for problem in batch]
    table = {name: np.array(column)[rows] for name, column in plan["table"].items()}
    samples = draw_more(batch, table["counts"], first_index=table["num_drawn"])  # after the pilot's
    return batch, samples, describe(batch, samples, pilot) | describe_table(table, args), plan


def describe_table(table: dict, args) -> dict:
    """Metrics of an allocation, by its own estimates, against uniform counts at the same cost.

    predicted_variance: sum_i w_i^2 / n_i over uniform's; None if that is unknown, as all weights
    are 0, or infinite. It is optimistic: it believes the very samples that may mislead.
    """
    even = args.samples_per_prompt + (args.pilot_samples if args.e_step_every > 1 else 0)
    counts, lengths, moments = table["counts"], table["mean_length"], table["weights"] ** 2
    ratio = None
    if moments.any() and counts[moments > 0].all():
        uniform = np.full(len(counts), even)
        ratio = estimator_variance(counts, moments) / estimator_variance(uniform, moments)
    return {
        "predicted_variance": ratio,
        "predicted_tokens": float(lengths @ counts / (lengths.sum() * even)),
        "pilot_unsolved": float(np.mean(table["num_right"] == 0)),
    }


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    add = parser.add_argument_group("table").add_argument
    add("--limit", type=positive_int, help="use only so many of the first problems of --data")
    add("--out", required=True, help="the table to write, JSON lines; must not exist")


def main(argv=None) -> None:
    """Write a line a problem: id, p and the columns of e_step; print a summary."""
    args = parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_budget_flags,
                       add_memory_flags, add_table_flags)
    if args.allocator == "uniform":
        raise InputError("--allocator uniform: has no E-step; choose gvm or reward")
    if Path(args.out).exists():
        raise InputError(f"--out {args.out}: exists already; choose another name")
    check_budget(args)
    model, tokenizer = load_model(args, join_ranks())
    problems = load_prompts(args.data, args.split, tokenizer, args, args.limit)
    policy, sampler = Policy(model, args.temperature), make_sampler(model, tokenizer, args)
    with Grader() as grader:
        draw_more, score = e_step_tools(policy, sampler, grader, step=1, args=args)
        table, samples = e_step(problems, draw_more, score, args)
    counts, ratio = table["counts"], describe_table(table, args)["predicted_variance"]
    table["p"] = table["num_right"] / table["num_drawn"]
    columns = [column.tolist() for column in table.values()]
    rows = [dict(zip(table, row)) for row in zip(*columns)]
    on_rank0(append_rows, Path(args.out), rows)
    print0(f"drawn: {len(samples)} samples, {np.mean([s.reward for s in samples]):.3f} right")
    print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} a problem")
    print0("predicted variance against uniform:", "unknown" if ratio is None else f"{ratio:.3f}")


if __name__ == "__main__":
    run_script(main)
