"""The E-step: what p and G of each prompt are, and how GVM spends the budget accordingly.

`draw_step` is what training calls in every step. By default p and G are predicted, by a regression
that learns from the samples of earlier steps. With --no-predict a pilot estimates them, as in the
paper: the first samples of each prompt.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

import run
from allocator import Predictor, allocate, allocate_or_leave, estimator_variance, gvm_weights
from allocator import reward_weights, summarise_samples
from data import TOY, Grader, InputError, Problem, Sample
from model import Policy, micro_batches
from run import non_negative, number, positive_int
from sampler import ORDER, TRAINING, HfSampler, VllmSampler, draw, fill_logprobs

NUM_STATES = 256  # for each prompt, at most: regressions on them cost next to nothing


def gvm_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """Proposition 1, for the log-likelihood of right answers. All arrays are (prompts,)."""
    return gvm_weights(p, norm_right, args.alpha, args.beta)


def reward_rule(p, norm_right, norm_wrong, args) -> np.ndarray:
    """For the expected reward, which GRPO maximises."""
    return reward_weights(p, norm_right, norm_wrong)


RULES = {"gvm": gvm_rule, "reward": reward_rule}  # --allocator; "uniform" needs none


def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """The problems, and how samples are spread over them."""
    add = parser.add_argument_group("problems and budget").add_argument
    add("--data", default=str(TOY / "train.jsonl"), help="file, benchmark, hub name[:config]; a,b")
    add("--split", default="train", help="split of --data, if it is a hub data set that names none")
    add("--samples-per-prompt", type=positive_int, default=2, help="mean, a reused pilot included")
    add("--allocator", choices=["uniform", *RULES], default="gvm",
        help="uniform: equal counts; gvm: the paper's rule, for RAFT; reward: for GRPO")
    add("--predict", action=argparse.BooleanOptionalAction, default=True,
        help="p and G come from a regression on hidden states; the paper: --no-predict, a pilot")
    add("--candidates-per-step", type=positive_int,
        help="problems that are predicted, some to get samples; None: --prompts-per-step")
    add("--pilot-samples", type=number(int, low=0, high=2**31 - 1), default=0,
        help="N' per prompt, with --no-predict; the paper: 8 or 32")
    add("--e-step-every", type=positive_int, default=1,
        help="steps that a pilot serves; above 1 it only informs; the paper: 9")
    add("--cost", choices=["samples", "tokens"], default="samples", help="what the budget counts")
    add("--alpha", type=non_negative, default=0.01, help="Eq. 7 damps small p; the paper: 0.001")
    add("--beta", type=number(float, low=2), default=2.0, help="the power of p in Eq. 7")
    add("--weighting", choices=["prompt", "token", "sequence"], default="prompt",
        help="what a sample weighs in the loss: see raft.loss_weights")
    add("--tokens-per-micro-batch", type=positive_int, default=16384,
        help="padded tokens in one forward pass: less memory with fewer, the same result")
    add("--fsdp", action="store_true", help="FSDP2: a part of the model on each GPU; needs vllm")


def check_budget(args: argparse.Namespace, objective: str | None = None) -> None:
    """InputError for flags that do not go together; warns of a rule that misfits."""
    wants_pilot = args.pilot_samples or args.e_step_every > 1 or args.cost != "samples"
    predicts = args.predict and args.allocator != "uniform"
    if wants_pilot and (args.predict or args.allocator == "uniform"):
        raise InputError("--pilot-samples, --e-step-every, --cost: need a pilot; add --no-predict, "
                         "and no --allocator uniform")
    if args.candidates_per_step is not None and not predicts:
        raise InputError("--candidates-per-step: nothing tells candidates apart; add --predict, "
                         "and no --allocator uniform")
    if args.allocator == "uniform":
        return
    if not args.predict and not args.pilot_samples:
        raise InputError("--no-predict: p and G are known from a pilot; add --pilot-samples 2")
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples, a part of it; raise it")
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
        prompts=np.array([row_of[sample.problem] for sample in samples], dtype=int),
        is_right=np.array([sample.reward > 0 for sample in samples], dtype=bool),
        lengths=lengths, norms=norms, num_prompts=len(problems))
    return {"id": np.array(list(row_of)), **columns}


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


def prompt_states(policy: Policy, problems: list[Problem], max_tokens: int) -> np.ndarray:
    """Policy.forward's states of each problem's prompt, (problems, states), at most NUM_STATES.

    The ranks share the batches, of at most `max_tokens` padded tokens. The batches are the same for
    any number of ranks, and so are the states.
    """
    prompts = [torch.tensor(problem.prompt_ids, device=policy.device) for problem in problems]
    batches = micro_batches([len(ids) for ids in prompts], ranks=1, max_tokens=max_tokens)[0]

    @torch.no_grad()
    def states_of(rows: list[int]) -> np.ndarray:
        ids = [prompts[i] for i in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).bool()
        states = policy(pad_sequence(ids, batch_first=True), mask, as_states=True).cpu().numpy()
        if states.shape[1] > NUM_STATES:  # the same random directions in every step
            directions = np.random.default_rng(0).normal(size=(states.shape[1], NUM_STATES))
            states = states @ directions / np.sqrt(states.shape[1])
        return states

    padding = batches[:1] * (-len(batches) % dist.get_world_size())  # FSDP2 waits for all ranks
    found = run.deal(batches + padding, lambda mine: [states_of(rows) for rows in mine])
    return np.concatenate(found[: len(batches)])[np.argsort(sum(batches, []))]


def predicted_step(batch: list[Problem], step: int, state, source: SampleSource, args) -> tuple:
    """Without a pilot: (problems that get samples, the samples, how well p was predicted)."""
    predictor = Predictor(state.predictor)
    features = predictor.features(prompt_states(source.policy, batch, args.tokens_per_micro_batch))
    p, weights = predictor.weights(features, partial(RULES[args.allocator], args=args))
    counts = allocate_or_leave(weights, args.prompts_per_step * args.samples_per_prompt,
                               smallest=1 if args.objective == "raft" else 2)
    counts = run.gather([counts])[0]  # of rank 0: another machine may round differently
    samples = source.draw(batch, counts, step, with_norms=True)
    table = estimate(samples, batch, args.weighting)
    predictor.learn(features, p, table)
    state.predictor = predictor.learnt
    served = counts > 0
    metrics = describe_prediction(p[served], table["num_right"][served], counts[served])
    return [batch[i] for i in np.flatnonzero(served)], samples, metrics


def pilot_table(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """Algorithm 2: (table with "counts", pilot), which counts include if --e-step-every is 1."""
    pilot = np.full(len(problems), args.pilot_samples)
    samples = source.draw(problems, pilot, step, with_norms=True)
    table = estimate(samples, problems, args.weighting)
    table["weights"] = RULES[args.allocator](
        table["num_right"] / table["num_drawn"], table["norm_right"], table["norm_wrong"], args)
    already = pilot if args.e_step_every == 1 else np.zeros_like(pilot)
    prices = table["mean_length"] if args.cost == "tokens" else np.ones(len(problems))
    budget = args.samples_per_prompt * prices.sum()
    table["counts"] = allocate(table["weights"], budget, already, prices=prices)
    return table, samples


def pilot_step(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """A pilot and what it leaves of the budget: (table, all samples, the pilot included)."""
    table, samples = pilot_table(problems, step, source, args)
    rest = table["counts"] - table["num_drawn"]  # drawn without norms: no plan follows
    return table, samples + source.draw(problems, rest, step, first_index=table["num_drawn"])


def problems_of_step(problems: list[Problem], step: int, args) -> list[Problem]:
    """The problems of step 1, 2, ...: a function of --seed and the step alone.

    Each epoch goes once through a new order of all problems; those too few for a step are left.
    """
    m = args.candidates_per_step or args.prompts_per_step
    epoch, position = divmod(step - 1, len(problems) // m)
    order = np.random.default_rng((args.seed, ORDER, epoch)).permutation(len(problems))
    return [problems[i] for i in order[position * m : (position + 1) * m]]


def plan_ahead(problems: list[Problem], step: int, source: SampleSource, args) -> tuple:
    """One E-step for --e-step-every steps, beginning with this one: (plan, pilot)."""
    last_step = step + args.e_step_every - 1
    ahead = {}  # by id: a problem that comes twice, around the end of an epoch, has one pilot
    for later in range(step, last_step + 1):
        ahead |= {problem.id: problem for problem in problems_of_step(problems, later, args)}
    table, pilot = pilot_table(list(ahead.values()), step, source, args)
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
    batch, pilot, more = problems_of_step(problems, step, args), [], {}
    if args.allocator == "uniform":
        samples = source.draw(batch, np.full(len(batch), args.samples_per_prompt), step)
    elif args.predict:
        batch, samples, more = predicted_step(batch, step, state, source, args)
    elif args.e_step_every == 1:
        table, samples = pilot_step(batch, step, source, args)
        more = describe_table(table, args)
    else:
        table, samples, pilot = draw_by_plan(problems, batch, step, state, source, args)
        more = describe_table(table, args)
    return batch, samples, describe(batch, samples, pilot) | more


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
        metrics[f"prompts_{name}"] = len(group) / max(len(problems), 1)
        metrics[f"budget_{name}"] = sum(map(len, group)) / max(len(samples), 1)
    return metrics


def describe_prediction(p, num_right, num_drawn) -> dict:
    """Metrics of predictions, (problems,) each. The first is to be compared with accept_rate."""
    shares = num_right / num_drawn
    varies = len(p) > 1 and p.std() > 0 and shares.std() > 0
    return {
        "predicted_accept_rate": float(p @ num_drawn / max(num_drawn.sum(), 1)),
        "prediction_correlation": float(np.corrcoef(p, shares)[0, 1]) if varies else None,
    }


def describe_table(table: dict, args) -> dict:
    """Metrics of an allocation, by its own estimates, against uniform counts at the same cost.

    predicted_variance: sum_i w_i^2 / n_i over uniform's. Optimistic: it believes the very samples
    that may mislead. None if infinite, or if the rule's weights are not known to be sqrt(c_i).
    """
    apart = args.pilot_samples if args.e_step_every > 1 else 0  # not in counts
    even = args.samples_per_prompt + apart
    counts, lengths, moments = table["counts"], table["mean_length"], table["weights"] ** 2
    ratio = None
    if args.allocator in ("gvm", "reward") and moments.any() and counts[moments > 0].all():
        ratio = estimator_variance(counts, moments) / (moments.sum() / even)
    return {
        "predicted_variance": ratio,
        "predicted_tokens": float(lengths @ (counts + apart) / (lengths.sum() * even)),
        "pilot_unsolved": float(np.mean(table["num_right"] == 0)),
    }
