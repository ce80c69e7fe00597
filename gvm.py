"""The E-step: a pilot estimates p and G of each prompt, and GVM spends the budget accordingly.

    torchrun gvm.py --out table.jsonl                             # the toy, on a CPU

`draw_step` is what training calls in every step. Run alone, this script writes the allocation
table of a data set: one line per problem, what its samples told of it and how many it got.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import run
from allocator import allocate_round, compares_prompts, estimator_variance, gvm_weights
from allocator import posterior_weights, reward_weights, summarise_samples
from data import TOY, Grader, InputError, Problem, Sample
from model import Policy, add_model_flags, distribute, load_model
from run import non_negative, number, positive_int
from sampler import ORDER, TRAINING, HfSampler, VllmSampler, add_sampler_flags, draw
from sampler import fill_logprobs, load_prompts, make_sampler


def gvm_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """Proposition 1, for the log-likelihood of right answers. All arrays are (prompts,)."""
    return gvm_weights(p, norm_right, args.alpha, args.beta)


def reward_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """For the expected reward, which GRPO maximises."""
    return reward_weights(p, norm_right, norm_wrong)


# --allocator; "uniform" needs no rule. With --shrink, posterior_weights calls the rule.
RULES = {"gvm": gvm_rule, "reward": reward_rule}


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """The problems, and how samples are spread over them."""
    add = parser.add_argument_group("problems and budget").add_argument
    add("--data", default=str(TOY / "train.jsonl"), help="file, benchmark, hub name[:config]; a,b")
    add("--split", default="train", help="split of --data, if it is a hub data set that names none")
    add("--samples-per-prompt", type=positive_int, default=4, help="mean, a reused pilot included")
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
    add("--fsdp", action="store_true", help="FSDP2: a part of the model on each GPU; needs vllm")


def check_budget(args: argparse.Namespace, objective: str | None = None) -> None:
    """InputError for a budget without room for pilot or rounds; warns of a rule that misfits."""
    if args.allocator == "uniform":
        return
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples, a part of it; raise it")
    if args.e_step_every > 1 and args.rounds > 1:
        raise InputError("--e-step-every above 1 does not spend in rounds: add --rounds 1")
    if args.shrink and compares_prompts(partial(RULES[args.allocator], args=args)):
        raise InputError(f"--allocator {args.allocator}: compares prompts; add --no-shrink")
    fitting = {"raft": "gvm", "grpo": "reward"}.get(objective)
    if fitting and args.allocator in {"gvm", "reward"} - {fitting}:
        run.print0(f"warning: --allocator {args.allocator} fits another gradient estimator; here "
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


@dataclass
class SampleSource:
    """Draws graded samples from the policy as it is. All ranks call it, and get the same."""

    policy: Policy
    sampler: HfSampler | VllmSampler
    grader: Grader
    args: argparse.Namespace
    stop: run.StopSignal | None = None
    timer: Callable = nullcontext  # RunState.timer

    def draw(self, problems, counts, step, first_index=0, with_norms=False) -> list[Sample]:
        """counts_i samples of problem i, counts: (problems,). Raises Stopped after a signal.

        with_norms: also old_logprobs and head_grad_norm, both from one forward pass, of all samples
        that the rule looks at: for `gvm`, the right ones.
        """
        if self.stop is not None and self.stop.on_any_rank():
            raise run.Stopped
        samples = draw(self.sampler, self.grader, problems, counts, first_index=first_index,
                       seed_key=(self.args.seed, TRAINING, step),
                       temperature=self.args.temperature, timer=self.timer)
        if with_norms:
            max_tokens, only_right = self.args.tokens_per_micro_batch, self.args.allocator == "gvm"
            scored = [sample for sample in samples if sample.reward > 0 or not only_right]
            with self.timer("score"):
                fill_logprobs(self.policy, scored, max_tokens, with_norms=True)
        return samples


def allocation_table(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """Pilot and rounds: (the table of the last round, the samples that it was made from).

    A round spends an equal part of what is left of the budget; the last is left to the caller. If
    the pilot only informs, "counts" come on top of it.
    """
    pilot = np.full(len(problems), args.pilot_samples)
    samples = source.draw(problems, pilot, step, with_norms=True)
    for rounds_left in range(args.rounds, 0, -1):
        table = estimate(samples, problems, args.weighting)
        table["weights"] = allocation_weights(table, args)
        already = table["num_drawn"] if args.e_step_every == 1 else np.zeros_like(pilot)
        prices = table["mean_length"] if args.cost == "tokens" else None
        table["counts"] = allocate_round(
            table["weights"], already, args.samples_per_prompt, rounds_left, prices)
        if rounds_left > 1:
            more, drawn = table["counts"] - table["num_drawn"], table["num_drawn"]
            samples += source.draw(problems, more, step, first_index=drawn, with_norms=True)
    return table, samples


def e_step(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """Algorithm 2 for one step: (the table, all samples, the pilot included)."""
    table, samples = allocation_table(problems, step, source, args)
    last = table["counts"] - table["num_drawn"]  # needs no norms: nothing is planned after it
    return table, samples + source.draw(problems, last, step, first_index=table["num_drawn"])


def problems_of_step(problems: list[Problem], step: int, args) -> list[Problem]:
    """The problems of step 1, 2, ...: a function of --seed and the step alone.

    Each epoch goes once through a new order of all problems; those too few for a step are left.
    """
    m = args.prompts_per_step
    epoch, position = divmod(step - 1, len(problems) // m)
    order = np.random.default_rng((args.seed, ORDER, epoch)).permutation(len(problems))
    return [problems[i] for i in order[position * m : (position + 1) * m]]


def plan_ahead(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """One E-step for --e-step-every steps, beginning with this one: (plan, pilot)."""
    last_step = step + args.e_step_every - 1
    ahead = {}  # by id: a problem that comes twice, around the end of an epoch, has one pilot
    for later in range(step, last_step + 1):
        ahead |= {problem.id: problem for problem in problems_of_step(problems, later, args)}
    table, pilot = allocation_table(list(ahead.values()), step, source, args)
    columns = {name: column.tolist() for name, column in table.items()}  # ready for JSON
    return {"last_step": last_step, "table": columns}, pilot


def draw_by_plan(problems, batch: list[Problem], step: int, state, source, args) -> tuple:
    """(table of the batch, samples, pilot): counts by state.plan, samples by today's policy."""
    ids, plan, pilot = [problem.id for problem in batch], state.plan, []
    # There is none yet, it has run out, or the run was resumed with other problems.
    if not plan or step > plan["last_step"] or not set(ids) <= set(plan["table"]["id"]):
        plan, pilot = plan_ahead(problems, step, source, args)
    rows = [plan["table"]["id"].index(problem_id) for problem_id in ids]
    table = {name: np.array(column)[rows] for name, column in plan["table"].items()}
    # The pilot had the first indices: in its own step they would give the same text again.
    samples = source.draw(batch, table["counts"], step, first_index=table["num_drawn"])
    state.plan = plan  # not before: a step that is given up draws, and counts, its pilot again
    return table, samples, pilot


def draw_step(problems: list[Problem], step: int, state, source: SampleSource, args) -> tuple:
    """Draw the samples of a step: (its problems, samples to train on, metrics)."""
    batch, table, pilot = problems_of_step(problems, step, args), None, []
    if args.allocator == "uniform":
        samples = source.draw(batch, np.full(len(batch), args.samples_per_prompt), step)
    elif args.e_step_every == 1:
        table, samples = e_step(batch, step, source, args)
    else:
        table, samples, pilot = draw_by_plan(problems, batch, step, state, source, args)
    metrics = describe(batch, samples, pilot)
    if table is not None:
        metrics |= describe_table(table, args)
    return batch, samples, metrics


def describe(problems: list[Problem], samples: list[Sample], pilot: list[Sample]) -> dict:
    """Metrics of a step: what was drawn, a pilot that only informs included, and where it went."""
    drawn = samples + pilot
    metrics = {
        "samples": len(drawn),
        "tokens": sum(len(sample.response_ids) for sample in drawn),
        "grader_failures": sum(sample.grader_failed for sample in drawn),
        "accept_rate": np.mean([sample.reward for sample in samples]) if samples else None,
        "truncated": np.mean([not sample.finished for sample in drawn]) if drawn else None,
    }
    rewards = {problem.id: [] for problem in problems}
    for sample in samples:
        rewards[sample.problem].append(sample.reward)
    groups = {
        "never": [r for r in rewards.values() if not any(r)],
        "sometimes": [r for r in rewards.values() if any(r) and not all(r)],
        "always": [r for r in rewards.values() if any(r) and all(r)],
    }
    for name, group in groups.items():
        metrics[f"prompts_{name}"] = len(group) / len(problems)
        metrics[f"budget_{name}"] = sum(map(len, group)) / max(len(samples), 1)
    return metrics


def describe_table(table: dict, args) -> dict:
    """Metrics of an allocation, by its own estimates, against uniform counts at the same cost.

    predicted_variance: sum_i w_i^2 / n_i over uniform's. Optimistic: it believes the very samples
    that may mislead. None if infinite, or if the rule's weights are not known to be sqrt(c_i).
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


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    parser.add_argument("--limit", type=positive_int, help="use the first problems of --data only")
    parser.add_argument("--out", required=True, help="the table to write; must not exist")


def main(argv=None) -> None:
    """Write one line per problem, p and the columns of the table; print a summary."""
    args = run.parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_budget_flags,
                           add_table_flags)
    device, out = run.join_ranks(), Path(args.out)

    def set_up() -> tuple:
        if args.allocator == "uniform":
            raise InputError("--allocator uniform: has no E-step; choose gvm or reward")
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
        table, _ = allocation_table(problems, 1, SampleSource(policy, sampler, grader, args), args)
    counts, ratio = table["counts"], describe_table(table, args)["predicted_variance"]
    table["p"] = table["num_right"] / table["num_drawn"]
    rows = zip(*(column.tolist() for column in table.values()))
    run.on_rank0(run.append_rows, out, [dict(zip(table, row)) for row in rows])
    run.print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} per problem")
    shown = "unknown" if ratio is None else f"{ratio:.3f}"
    run.print0(f"predicted variance against uniform: {shown}")


if __name__ == "__main__":
    run.run_script(main)
