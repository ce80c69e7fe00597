"""The E-step: a pilot estimates p and G of each prompt, and GVM spends the budget accordingly.

    torchrun gvm.py --out table.jsonl                             # the toy, on a CPU
    torchrun --nproc-per-node 8 gvm.py --model MODEL --data openai/gsm8k:main --out t.jsonl

`draw_step` is what training calls in every step. Run alone, this script writes the allocation
table of a data set: one line per problem, what its samples told of it and how many it got.
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from allocator import allocate_round, compares_prompts, estimator_variance, gvm_weights
from allocator import posterior_weights, reward_weights, summarise_samples
from data import TOY, Grader, InputError, Problem, Sample
from model import Policy, add_model_flags, load_model
from run import Stopped, append_rows, join_ranks, non_negative, number, on_every_rank, on_rank0
from run import parse_flags, positive_int, print0, run_script
from sampler import ORDER, TRAINING, add_sampler_flags, draw, fill_logprobs, load_prompts
from sampler import make_sampler


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
        help="steps that a pilot serves; above 1 it only informs, and needs --rounds 1; paper: 9")
    add("--shrink", action=argparse.BooleanOptionalAction, default=True,
        help="average over all p that the samples allow; the paper takes right/drawn: --no-shrink")
    add("--cost", choices=["samples", "tokens"], default="samples", help="what the budget counts")
    add("--alpha", type=non_negative, default=0.01, help="Eq. 7 damps small p; the paper: 0.001")
    add("--beta", type=number(float, low=2), default=2.0, help="the power of p in Eq. 7")
    add("--weighting", choices=["prompt", "token", "sequence"], default="prompt",
        help="what a sample weighs in the loss: see raft.loss_weights")
    add("--tokens-per-micro-batch", type=positive_int, default=16384,
        help="padded tokens in one forward pass: less memory with fewer, the same result")
    add("--advantage", choices=["grpo", "dr", "loo"], default="grpo",
        help="grpo.py's; here because the reward rule depends on it")


def check_budget(args: argparse.Namespace, objective: str | None = None) -> None:
    """InputError for a budget without room for pilot or rounds; warns of a rule that misfits."""
    if args.allocator == "uniform":
        return
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples, which it includes")
    if args.e_step_every > 1 and args.rounds > 1:
        raise InputError("--e-step-every above 1 does not spend in rounds: add --rounds 1")
    if args.shrink and compares_prompts(partial(RULES[args.allocator], args=args)):
        raise InputError(f"--allocator {args.allocator}: compares prompts; add --no-shrink")
    fitting = {"raft": "gvm", "grpo": "reward"}.get(objective)
    if fitting and args.allocator in {"gvm", "reward"} - {fitting}:
        print0(f"warning: --allocator {args.allocator} fits another gradient estimator; here "
               f"{fitting} does")


def estimate(samples: list[Sample], problems: list[Problem], weighting: str) -> dict:
    """What samples say of their problems: the columns of summarise_samples, and "id"."""
    row_of = {problem.id: row for row, problem in enumerate(problems)}
    lengths = np.array([len(sample.response_ids) for sample in samples])  # (samples,)
    norms = np.array([sample.head_grad_norm for sample in samples])
    if weighting == "sequence":  # divides a response's loss, and so its gradient, by its length
        norms = norms / lengths
    columns = summarise_samples(
        prompts=np.array([row_of[sample.problem] for sample in samples]),
        is_right=np.array([sample.reward > 0 for sample in samples]),
        lengths=lengths, norms=norms, num_prompts=len(problems))
    return {"id": np.array(list(row_of)), **columns}


def allocation_weights(table: dict, args: argparse.Namespace) -> np.ndarray:
    """What --allocator's rule makes of a table: weights, (problems,)."""
    rule = partial(RULES[args.allocator], args=args)
    norms = table["norm_right"], table["norm_wrong"]
    if args.shrink:
        return posterior_weights(rule, table["num_right"], table["num_drawn"], *norms)
    return rule(table["num_right"] / table["num_drawn"], *norms)


def plan_round(samples: list[Sample], problems: list[Problem], already, rounds_left, args) -> dict:
    """The table of `estimate` with "weights" and "counts": what each problem has after this round.

    already: how many samples each problem has, (problems,). A round spends an equal part of what
    is left. With --cost tokens, a sample costs the mean response tokens of its problem.
    """
    table = estimate(samples, problems, args.weighting)
    table["weights"] = allocation_weights(table, args)
    prices = table["mean_length"] if args.cost == "tokens" else None
    table["counts"] = allocate_round(
        table["weights"], already, args.samples_per_prompt, rounds_left, prices)
    return table


def e_step(problems: list[Problem], draw_samples, fill_norms, args, *, spend_all=True) -> tuple:
    """Algorithm 2 in rounds: (the table of the last one, all samples, the pilot included).

    draw_samples(problems, counts, first_index): graded samples. fill_norms(samples): fills in
    their old_logprobs and head_grad_norm. spend_all=False: the last round is planned, not drawn.
    """
    already = np.full(len(problems), args.pilot_samples)
    samples = draw_samples(problems, already, first_index=0)
    for rounds_left in range(args.rounds, 0, -1):
        # Those of the last round need no norms: training fills in their log-probs.
        fill_norms([sample for sample in samples if sample.old_logprobs is None])
        table = plan_round(samples, problems, already, rounds_left, args)
        if spend_all or rounds_left > 1:
            samples += draw_samples(problems, table["counts"] - already, first_index=already)
            already = table["counts"]
    return table, samples


def plan_ahead(problems: list[Problem], draw_samples, fill_norms, args) -> tuple:
    """The E-step of --e-step-every above 1: (a table for all its steps, the pilot).

    The pilot only informs: the table's counts are on top of it, and drawn by later policies.
    """
    pilot = draw_samples(problems, np.full(len(problems), args.pilot_samples), first_index=0)
    fill_norms(pilot)
    return plan_round(pilot, problems, np.zeros(len(problems), int), 1, args), pilot


def problems_of_step(problems: list[Problem], step: int, args) -> list[Problem]:
    """The problems of step 1, 2, ...: a function of --seed and the step alone.

    Each epoch goes once through a new order of all problems; those too few for a step are left.
    """
    m = args.prompts_per_step
    epoch, position = divmod(step - 1, len(problems) // m)
    order = np.random.default_rng((args.seed, ORDER, epoch)).permutation(len(problems))
    return [problems[i] for i in order[position * m : (position + 1) * m]]


def bind_draw_and_fill(policy: Policy, sampler, grader, step: int, args, stop=None) -> tuple:
    """(draw_samples, fill_norms), as `e_step` wants them; the first raises Stopped after `stop`."""

    def draw_samples(problems: list[Problem], counts, first_index=0) -> list[Sample]:
        if stop is not None and stop.on_any_rank():
            raise Stopped
        return draw(sampler, grader, problems, counts, first_index=first_index,
                    seed_key=(args.seed, TRAINING, step), temperature=args.temperature)

    tokens = args.tokens_per_micro_batch
    return draw_samples, partial(fill_logprobs, policy, max_tokens=tokens, with_norms=True)


def draw_by_plan(problems, batch: list[Problem], state, draw_samples, fill_norms, args) -> tuple:
    """(table of the batch, samples, pilot): counts by state.plan, samples by today's policy."""
    ids, plan, pilot = [problem.id for problem in batch], state.plan, []
    # There is none yet, it has run out, or the run was resumed with other problems.
    if not plan or state.step > plan["last_step"] or not set(ids) <= set(plan["table"]["id"]):
        last_step = state.step + args.e_step_every - 1
        ahead = {}  # by id: a problem that comes twice, around the end of an epoch, has one pilot
        for step in range(state.step, last_step + 1):
            ahead |= {problem.id: problem for problem in problems_of_step(problems, step, args)}
        table, pilot = plan_ahead(list(ahead.values()), draw_samples, fill_norms, args)
        columns = {name: column.tolist() for name, column in table.items()}  # ready for JSON
        plan = state.plan = {"last_step": last_step, "table": columns}
    rows = [plan["table"]["id"].index(problem_id) for problem_id in ids]
    table = {name: np.array(column)[rows] for name, column in plan["table"].items()}
    # The pilot had the first indices: in its own step they would give the same text again.
    return table, draw_samples(batch, table["counts"], first_index=table["num_drawn"]), pilot


def draw_step(problems: list[Problem], state, *, policy, sampler, grader, stop, args) -> tuple:
    """Draw the samples of state.step: (its problems, samples to train on, metrics)."""
    batch, table, pilot = problems_of_step(problems, state.step, args), None, []
    draw_samples, fill_norms = bind_draw_and_fill(policy, sampler, grader, state.step, args, stop)
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


def describe(problems: list[Problem], samples: list[Sample], pilot: list[Sample]) -> dict:
    """Metrics of a step: how many samples were drawn, how many right, and where they went.

    samples: to train on; pilot: others, which are counted alike. There may be none in a step.
    """
    drawn = samples + pilot
    metrics = {
        "samples": len(drawn),
        "tokens": sum(len(sample.response_ids) for sample in drawn),
        "grader_failures": sum(sample.grader_failed for sample in drawn),
        "accept_rate": np.mean([sample.reward for sample in samples]) if samples else None,
        "truncated": np.mean([not sample.finished for sample in drawn]) if drawn else None,
    }
    counts = Counter(sample.problem for sample in samples)
    num_right = Counter(sample.problem for sample in samples if sample.reward > 0)
    solved = {problem.id: num_right[problem.id] for problem in problems}
    groups = {
        "never": [i for i, right in solved.items() if right == 0],
        "sometimes": [i for i, right in solved.items() if 0 < right < counts[i]],
        "always": [i for i, right in solved.items() if 0 < right == counts[i]],
    }
    for name, ids in groups.items():
        metrics[f"prompts_{name}"] = len(ids) / len(problems)
        metrics[f"budget_{name}"] = sum(counts[i] for i in ids) / max(len(samples), 1)
    return metrics


def describe_table(table: dict, args) -> dict:
    """Metrics of an allocation, by its own estimates, against uniform counts at the same cost.

    predicted_variance: sum_i w_i^2 / n_i over uniform's; None if infinite, or if a rule's weights
    are not sqrt(c_i). Optimistic: it believes the very samples that may mislead. Above 1 where a
    pilot only informs, which costs as much and lowers nothing.
    """
    even = args.samples_per_prompt + (args.pilot_samples if args.e_step_every > 1 else 0)
    counts, lengths, moments = table["counts"], table["mean_length"], table["weights"] ** 2
    ratio = None
    if args.allocator in ("gvm", "reward") and moments.any() and counts[moments > 0].all():
        ratio = estimator_variance(counts, moments) / (moments.sum() / even)
    return {
        "predicted_variance": ratio,
        "predicted_tokens": float(lengths @ counts / (lengths.sum() * even)),
        "pilot_unsolved": float(np.mean(table["num_right"] == 0)),
    }


def sampler_gap(samples: list[Sample]) -> dict:
    """How far the sampler's log-probs are from the trainer's, over all tokens: mean and largest."""
    if not samples:
        return {}
    gaps = np.concatenate([np.abs(s.old_logprobs - s.sampler_logprobs) for s in samples])
    return {"sampler_gap": gaps.mean().item(), "sampler_gap_max": gaps.max().item()}


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    parser.add_argument("--limit", type=positive_int, help="use the first problems of --data only")
    parser.add_argument("--out", required=True, help="the table to write; must not exist")


def main(argv=None) -> None:
    """Write one line per problem, p and the columns of e_step; print a summary."""
    args = parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_budget_flags,
                       add_table_flags)
    device, out = join_ranks(), Path(args.out)

    def set_up() -> tuple:
        if args.allocator == "uniform":
            raise InputError("--allocator uniform: has no E-step; choose gvm or reward")
        if out.exists():
            raise InputError(f"--out {out}: exists already; choose another name")
        check_budget(args)
        model, tokenizer = load_model(args, device)
        problems = load_prompts(args.data, args.split, tokenizer, args, args.limit)
        return model, tokenizer, problems, Policy(model, args.temperature)

    model, tokenizer, problems, policy = on_every_rank(set_up)
    on_rank0(out.parent.mkdir, 0o777, True, True)
    on_rank0(out.touch, 0o666, False)  # claims the name: it must not exist
    sampler = make_sampler(model, tokenizer, args)
    with Grader() as grader:
        draw_samples, fill_norms = bind_draw_and_fill(policy, sampler, grader, step=1, args=args)
        plan = partial(e_step, spend_all=False) if args.e_step_every == 1 else plan_ahead
        table, _ = plan(problems, draw_samples, fill_norms, args)
    counts, ratio = table["counts"], describe_table(table, args)["predicted_variance"]
    table["p"] = table["num_right"] / table["num_drawn"]
    rows = zip(*(column.tolist() for column in table.values()))
    on_rank0(append_rows, out, [dict(zip(table, row)) for row in rows])
    print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} per problem")
    shown = "unknown" if ratio is None else f"{ratio:.3f}"
    print0(f"predicted variance against uniform: {shown}")


if __name__ == "__main__":
    run_script(main)
