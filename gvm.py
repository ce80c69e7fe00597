"""The E-step: a pilot estimates p and G of each prompt, and GVM spends the budget accordingly.

    torchrun gvm.py --out table.jsonl                             # the toy, on a CPU
    torchrun --nproc-per-node 8 gvm.py --model MODEL --data openai/gsm8k:main --out t.jsonl

`draw_step` is what training calls in every step. Run alone, this script writes the allocation
table of a data set: one line per problem, what its samples told of it and how many it got.
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
    """Proposition 1, for the log-likelihood of right answers. All arrays are (prompts,)."""
    return gvm_weights(p, norm_right, args.alpha, args.beta)


def reward_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """For the expected reward, which GRPO maximises; its advantages may be divided by the std."""
    return reward_weights(p, norm_right, norm_wrong, normalize_std=args.advantage == "grpo")


# --allocator; "uniform" needs no rule. With --shrink, posterior_weights calls the rule.
RULES = {"gvm": gvm_rule, "reward": reward_rule}


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """The problems, and how samples are spread over them."""
    add = parser.add_argument_group("problems and budget").add_argument
    add("--data", default=str(TOY / "train.jsonl"), help="file, benchmark, or hub name[:config]")
    add("--split", default="train", help="split of --data, if it is a hub data set that names none")
    add("--samples-per-prompt", type=positive_int, default=8, help="mean, a reused pilot included")
    add("--allocator", choices=["uniform", *RULES], default="gvm",
        help="uniform: equal counts; gvm: the paper's rule, for RAFT; reward: for GRPO")
    add("--pilot-samples", type=positive_int, default=2, help="N' per prompt; the paper: 8 or 32")
    add("--rounds", type=positive_int, default=3, help="of allocation, each knowing more; paper: 1")
    add("--e-step-every", type=positive_int, default=1,
        help="steps that a pilot serves; above 1 it only informs, on top of the budget; paper: 9")
    add("--shrink", action=argparse.BooleanOptionalAction, default=True,
        help="average over all p that the samples allow; the paper takes right/drawn: --no-shrink")
    add("--cost", choices=["samples", "tokens"], default="samples", help="what the budget counts")
    add("--alpha", type=non_negative, default=0.01, help="Eq. 7 damps small p; the paper: 0.001")
    add("--beta", type=number(float, low=2), default=2.0, help="the power of p in Eq. 7")
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
    fitting = {"raft": "gvm", "grpo": "reward"}
    if objective in fitting and args.allocator in set(fitting.values()) - {fitting[objective]}:
        print0(f"warning: --allocator {args.allocator} fits another gradient estimator; "
               f"here {fitting[objective]} does")


def estimate(samples: list[Sample], problems: list[Problem], weighting: str) -> dict:
    """What samples say of their problems: a table of columns, (problems,) each.

    norm_right, norm_wrong: root mean squares over right and over wrong samples, 0 without any, as
    in the derivation (Algorithm 2 writes the mean). mean_length: of the responses, in tokens.
    """
    row_of = {problem.id: row for row, problem in enumerate(problems)}
    rows = np.array([row_of[sample.problem] for sample in samples])  # (samples,), like the next
    is_right = np.array([sample.reward > 0 for sample in samples])
    lengths = np.array([len(sample.response_ids) for sample in samples])
    norms = np.array([sample.head_grad_norm for sample in samples])
    if weighting == "sequence":  # divides a response's loss, and so its gradient, by its length
        norms = norms / lengths

    def total(values: np.ndarray) -> np.ndarray:
        """The sum over each problem's samples: (samples,) to (problems,)."""
        return np.bincount(rows, values, minlength=len(problems))

    num_drawn, num_right = total(np.ones(len(samples))), total(is_right)
    return {
        "id": np.array(list(row_of)),
        "num_right": num_right.astype(int),
        "num_drawn": num_drawn.astype(int),
        "norm_right": np.sqrt(total(norms**2 * is_right) / np.maximum(num_right, 1)),
        "norm_wrong": np.sqrt(total(norms**2 * ~is_right) / np.maximum(num_drawn - num_right, 1)),
        "mean_length": total(lengths) / np.maximum(num_drawn, 1),
    }


def allocation_weights(table: dict, args: argparse.Namespace) -> np.ndarray:
    """What --allocator's rule makes of a table: weights, (problems,)."""
    rule = partial(RULES[args.allocator], args=args)
    norms = table["norm_right"], table["norm_wrong"]
    if args.shrink:
        return posterior_weights(rule, table["num_right"], table["num_drawn"], *norms)
    return rule(table["num_right"] / table["num_drawn"], *norms)


def plan_round(table: dict, already: np.ndarray, rounds_left: int, args) -> np.ndarray:
    """How many samples each problem shall have after this round, (problems,).

    already: how many it has, (problems,). A round spends an equal part of what is left. With
    --cost tokens, a sample costs the mean response tokens of its problem.
    """
    prices = table["mean_length"] if args.cost == "tokens" else np.ones(len(already))
    spent = prices @ already
    left = max(args.samples_per_prompt * prices.sum() - spent, 0)
    budget = spent + left / rounds_left
    return allocate(table["weights"], budget, min_samples=already, prices=prices)


def e_step(problems: list[Problem], draw_samples, fill_norms, args, *, spend_all=True) -> tuple:
    """Algorithm 2: draw a pilot; then estimate, allocate and draw, --rounds times.

    draw_samples(problems, counts, first_index): graded samples. fill_norms(samples): fills in
    their old_logprobs and head_grad_norm. Returns the table of the last round, that of `estimate`
    with "weights" and "counts", how many samples each problem has in the end; and the samples.
    spend_all=False: the last round is planned, but not drawn. With --e-step-every above 1 only the
    pilot is drawn: draw_by_plan draws the rest.
    """
    pilot_counts = np.full(len(problems), args.pilot_samples)
    samples = draw_samples(problems, pilot_counts, first_index=0)
    is_reused = args.e_step_every == 1
    already = pilot_counts if is_reused else np.zeros_like(pilot_counts)
    for rounds_left in range(args.rounds, 0, -1):
        fill_norms([sample for sample in samples if sample.old_logprobs is None])
        table = estimate(samples, problems, args.weighting)
        table["weights"] = allocation_weights(table, args)
        table["counts"] = plan_round(table, already, rounds_left, args)
        if is_reused and (spend_all or rounds_left > 1):
            samples += draw_samples(problems, table["counts"] - already, first_index=already)
            already = table["counts"]
    return table, samples


def bind_draw_and_fill(policy: Policy, sampler, grader, step: int, args) -> tuple:
    """(draw_samples, fill_norms), as `e_step` wants them, for samples to train on in this step."""
    key, tokens = (args.seed, TRAINING, step), args.tokens_per_micro_batch
    draw_samples = partial(draw, sampler, grader, seed_key=key, temperature=args.temperature)
    return draw_samples, partial(fill_logprobs, policy, max_tokens=tokens, with_norms=True)


def plan_steps(problems: list[Problem], step: int, draw_samples, fill_norms, args) -> tuple:
    """One E-step for the --e-step-every steps from `step` on: (its plan, JSON-ready; the pilot)."""
    last_step = step + args.e_step_every - 1
    ahead = {}  # by id: a problem that comes twice, around the end of an epoch, has one pilot
    for later in range(step, last_step + 1):
        ahead |= {problem.id: problem for problem in problems_of_step(problems, later, args)}
    table, pilot = e_step(list(ahead.values()), draw_samples, fill_norms, args)
    columns = {name: column.tolist() for name, column in table.items()}
    return {"last_step": last_step, "table": columns}, pilot


def draw_by_plan(problems, batch: list[Problem], state, draw_samples, fill_norms, args) -> tuple:
    """(table of the batch, samples, pilot): counts by state.plan, samples by today's policy."""
    ids, plan, pilot = [problem.id for problem in batch], state.plan, []
    # There is none yet, it has run out, or the run was resumed with other problems.
    if not plan or state.step > plan["last_step"] or not set(ids) <= set(plan["table"]["id"]):
        plan, pilot = plan_steps(problems, state.step, draw_samples, fill_norms, args)
        state.plan = plan
    rows = [plan["table"]["id"].index(problem_id) for problem_id in ids]
    table = {name: np.array(column)[rows] for name, column in plan["table"].items()}
    # The first indices were the pilot's: its own step would draw the same text again.
    return table, draw_samples(batch, table["counts"], first_index=table["num_drawn"]), pilot


def draw_step(problems: list[Problem], state, *, policy, sampler, grader, args) -> tuple:
    """Draw the samples of state.step: (its problems, samples to train on, metrics)."""
    batch, table, pilot = problems_of_step(problems, state.step, args), None, []
    draw_samples, fill_norms = bind_draw_and_fill(policy, sampler, grader, state.step, args)
    if args.allocator == "uniform":
        samples = draw_samples(batch, np.full(len(batch), args.samples_per_prompt))
    elif args.e_step_every == 1:
        table, samples = e_step(batch, draw_samples, fill_norms, args)
    else:
        table, samples, pilot = draw_by_plan(problems, batch, state, draw_samples, fill_norms, args)
    metrics = describe(batch, samples, pilot)
    if table is not None:
        metrics |= describe_table(table, args)
    return batch, samples, metrics


def describe_table(table: dict, args) -> dict:
    """Metrics of an allocation, by its own estimates, against uniform counts at the same cost.

    predicted_variance: sum_i w_i^2 / n_i over uniform's, for a rule whose weights are sqrt(c_i);
    None if unknown or infinite. Optimistic: it believes the very samples that may mislead. A pilot
    that only informs costs as much, and lowers nothing: above 1 is possible.
    """
    even = args.samples_per_prompt + (args.pilot_samples if args.e_step_every > 1 else 0)
    counts, lengths, moments = table["counts"], table["mean_length"], table["weights"] ** 2
    ratio = None
    if moments.any() and counts[moments > 0].all():
        ratio = estimator_variance(counts, moments) / (moments.sum() / even)
    return {
        "predicted_variance": ratio,
        "predicted_tokens": float(lengths @ counts / (lengths.sum() * even)),
        "pilot_unsolved": float(np.mean(table["num_right"] == 0)),
    }


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    parser.add_argument("--limit", type=positive_int, help="use the first problems of --data only")
    parser.add_argument("--out", required=True, help="the table to write; must not exist")


def main(argv=None) -> None:
    """Write one line per problem, p and the columns of e_step; print a summary."""
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
        draw_samples, fill_norms = bind_draw_and_fill(policy, sampler, grader, step=1, args=args)
        table, _ = e_step(problems, draw_samples, fill_norms, args, spend_all=False)
    counts, ratio = table["counts"], describe_table(table, args)["predicted_variance"]
    table["p"] = table["num_right"] / table["num_drawn"]
    rows = zip(*(column.tolist() for column in table.values()))
    on_rank0(append_rows, Path(args.out), [dict(zip(table, row)) for row in rows])
    print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} per problem")
    print0("predicted variance against uniform:", "unknown" if ratio is None else f"{ratio:.3f}")


if __name__ == "__main__":
    run_script(main)
