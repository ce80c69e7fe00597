"""The E-step: how many samples each prompt gets, and drawing them. Algorithm 2 of the paper.

`e_step` is the published algorithm (README.md lists where it departs); its parts stand below it.
Last comes what is added: p predicted instead of a pilot (`--candidates-per-step`).
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from allocator import allocate, gvm_weights, reward_weights, summarise_samples
from batches import fill_norms, prompt_states
from data import TRAINING, Problem, Sample, problems_of_step, prompts_looked_at
from grader import Grader
from losses import OBJECTIVES
from metrics import describe_pilot, describe_prediction, describe_step
from model import Policy
from predictor import Predictor, allocate_or_leave
from run import InputError, Stopped, StopSignal, number, of_rank0, on_every_rank, positive_int
from run import print0
from sampler import HfSampler, VllmSampler, draw


def e_step(problems: list[Problem], step: int, state, source: "SampleSource", args) -> tuple:
    """Draw the samples of a training step where they reduce the variance of its gradient most.

    problems: all of them. state: folder.RunState. Returns (the problems of the step, the samples
    to train on, metrics). Raises Stopped, after a signal.

    The pilot is a part of the step's samples, and is trained on. With --e-step-every K above 1 it
    serves K steps, and only informs; state.plan keeps its table for them, columns of estimate and
    "step", "weights", "counts".
    """
    if args.candidates_per_step is not None:  # added to the paper: see below
        return predicted_step(problems, step, state, source, args)

    rule, pilot_size = RULES[args.allocator], args.pilot_samples
    informs_only = args.e_step_every > 1
    reused = 0 if informs_only else pilot_size  # of the n_i samples, those of the pilot
    batch, pilot = problems_of_step(problems, step, args), []
    table = state.plan
    if not is_planned(state, step, batch, args):
        # The pilot: N' samples of each prompt (0 if not needed), graded, with gradient norms.
        ahead, steps = problems_ahead(problems, step, args)
        pilot = source.sample_and_grade(ahead, [pilot_size] * len(ahead), step, with_norms=True)

        # p_i, the share of right samples; G_i, the root mean square of their norms.
        table = estimate(pilot, ahead, args.weighting) | {"step": steps}
        p, G, G_wrong = (table[name] for name in ("accept_rate", "norm_right", "norm_wrong"))

        # Proposition 1: w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), or another rule's w_i.
        table["weights"] = rule.weights(p, G, G_wrong, args)

        # n_i = N w_i / sum_j w_j, in whole numbers that add up to N; none below what is reused.
        budget = args.samples_per_prompt * len(ahead)  # N
        table["counts"] = of_rank0(allocate(table["weights"], budget, min_samples=reused))

    # Draw the rest, by the policy as it is now. Indices, which seed samples, go on.
    counts = rows_of_step(table, step)["counts"]
    rest = source.sample_and_grade(batch, counts - reused, step, first_index=pilot_size)
    samples = rest if informs_only else pilot + rest
    state.plan = table if informs_only else None  # only now: after Stopped the old plan holds
    state.plan_flags = plan_flags(args)

    metrics = describe_step(batch, samples, drawn=pilot + rest)
    if rule.needs_pilot:
        even = args.samples_per_prompt + pilot_size - reused  # uniform counts at the same cost
        metrics |= describe_pilot(table, even, is_variance=rule.objective is not None)
    return batch, samples, metrics


# --- the rules -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rule:
    """An allocation rule, --allocator, and what has to be known of it."""

    weights: Callable  # of (p, G+, G-, args) to w; all but args are (prompts,)
    objective: str | None = None  # the one whose variance is sum_i w_i^2 / n_i, if any
    needs_pilot: bool = True  # it looks at p
    needs_wrong: bool = True  # it looks at G-, so that wrong samples are scored as well


RULES = {
    "uniform": Rule(lambda p, G, G_wrong, args: np.ones(len(p)), needs_pilot=False),
    "gvm": Rule(lambda p, G, G_wrong, args: gvm_weights(p, G, args.alpha, args.beta),
                objective="raft", needs_wrong=False),
    "reward": Rule(lambda p, G, G_wrong, args: reward_weights(p, G, G_wrong), objective="grpo"),
}
PUBLISHED = "gvm"  # for RAFT and for GRPO


# --- a pilot for several steps -----------------------------------------------------------------
def problems_ahead(problems: list[Problem], step: int, args) -> tuple[list[Problem], np.ndarray]:
    """Problems of --e-step-every steps from this one, within the epoch, and the step of each."""
    per_epoch = len(problems) // prompts_looked_at(args)  # steps
    ahead = range(step, step + min(args.e_step_every, per_epoch - (step - 1) % per_epoch))
    found = [problem for later in ahead for problem in problems_of_step(problems, later, args)]
    return found, np.repeat(ahead, len(found) // len(ahead))


def rows_of_step(table: dict, step: int) -> dict[str, np.ndarray]:
    """The rows of an E-step's table that are for the prompts of one step, in their order."""
    is_mine = np.array(table["step"]) == step
    return {name: np.array(column)[is_mine] for name, column in table.items()}


def plan_flags(args) -> dict:
    """The flags that make a plan what it is. Others decide which prompts it is for."""
    return {name: getattr(args, name) for name in (
        "allocator", "alpha", "beta", "samples_per_prompt", "pilot_samples", "e_step_every",
        "weighting", "temperature", "max_response_tokens")}


def is_planned(state, step: int, batch: list[Problem], args) -> bool:
    """Whether state.plan is for these prompts in this step, and was made with these flags."""
    if state.plan is None or state.plan_flags != plan_flags(args):
        return False
    return rows_of_step(state.plan, step)["id"].tolist() == [problem.id for problem in batch]


# --- samples, and what they say ----------------------------------------------------------------
@dataclass
class SampleSource:
    """Draws graded samples from the policy as it is. All ranks call it, and get the same."""

    policy: Policy
    sampler: HfSampler | VllmSampler
    grader: Grader
    args: argparse.Namespace
    stop: StopSignal | None = None
    timer: Callable = nullcontext  # RunState.timer

    def sample_and_grade(self, problems, counts, step, first_index=0, with_norms=False) -> list:
        """counts_i samples of problem i, counts: (problems,). Raises Stopped after a signal.

        with_norms: those that the rule looks at get head_grad_norm and old_logprobs as well.
        """
        if not np.any(counts):
            return []
        if self.stop is not None and self.stop.on_any_rank():
            raise Stopped
        samples = draw(self.sampler, self.grader, problems, counts, first_index=first_index,
                       seed_key=(self.args.seed, TRAINING, step),
                       temperature=self.args.temperature, timer=self.timer)
        if with_norms:
            needs_wrong = RULES[self.args.allocator].needs_wrong
            scored = [sample for sample in samples if sample.reward > 0 or needs_wrong]
            with self.timer("score"):
                fill_norms(self.policy, scored, self.args.tokens_per_micro_batch)
        return samples


def estimate(samples: list[Sample], problems: list[Problem], weighting: str) -> dict:
    """What samples say of their problems: "id" and the columns of summarise_samples."""
    row_of = {problem.id: row for row, problem in enumerate(problems)}
    norms = np.array([sample.head_grad_norm for sample in samples])
    if weighting == "sequence":  # divides a response's loss, and so its gradient, by its length
        norms = norms / np.array([len(sample.response_ids) for sample in samples])
    return {"id": np.array(list(row_of)), **summarise_samples(
        prompts=np.array([row_of[sample.problem] for sample in samples], dtype=int),
        is_right=np.array([sample.reward > 0 for sample in samples], dtype=bool),
        norms=norms, num_prompts=len(problems))}


# --- flags -----------------------------------------------------------------------------------
def add_budget_flags(parser: argparse.ArgumentParser) -> None:
    """How many samples a step draws, and of which prompts."""
    add = parser.add_argument_group("budget").add_argument
    add("--prompts-per-step", type=positive_int, default=16, help="the paper: 1024")
    add("--samples-per-prompt", type=positive_int, default=4,
        help="mean over the prompts of a step, with a pilot that is reused; the paper: 8 or 32")
    add("--allocator", choices=RULES,
        help="uniform: equal counts; gvm: the paper's; reward: for the expected reward. None: gvm, "
        "or with --candidates-per-step the one that fits the objective")
    add("--pilot-samples", type=positive_int,
        help="N', of each prompt; None: 2, where a pilot is taken; the paper: 8 or 32")
    add("--e-step-every", type=positive_int, default=1,
        help="steps that a pilot serves; above 1 it only informs; the paper: 9")
    add("--candidates-per-step", type=positive_int, metavar="M",
        help="not in the paper: instead of a pilot, p of M prompts, at least --prompts-per-step, "
        "is predicted, and the best of them share the samples")
    add("--alpha", type=number(float, 0, 1000), default=1e-3, help="Eq. 7; the paper: 1e-3")
    add("--beta", type=number(float, 2, 100), default=2.0, help="Eq. 7; the paper: 2")


def settle_budget(args: argparse.Namespace, objective: str | None = None) -> None:
    """Set --allocator and --pilot-samples where they are None. InputError for what does not fit."""
    predicts = args.candidates_per_step is not None
    fitting = [name for name, rule in RULES.items() if objective and rule.objective == objective]
    if args.allocator is None:
        args.allocator = fitting[0] if predicts and fitting else PUBLISHED
    rule = RULES[args.allocator]
    takes_pilot = rule.needs_pilot and not predicts
    if predicts and not rule.needs_pilot:
        raise InputError(f"--candidates-per-step: --allocator {args.allocator} does not look at p; "
                         "leave one of the two out")
    if not takes_pilot and (args.pilot_samples or args.e_step_every > 1):
        chosen = "--candidates-per-step" if predicts else f"--allocator {args.allocator}"
        raise InputError(f"--pilot-samples, --e-step-every: no pilot is taken with {chosen}; "
                         "leave them out")
    if args.pilot_samples is None:
        args.pilot_samples = 2 if takes_pilot else 0
    smallest = OBJECTIVES[objective].smallest_group if objective else 1
    # Can a prompt get enough? By predictions one may get all; where K > 1 no pilot is reused.
    most = args.samples_per_prompt * (args.prompts_per_step if predicts else 1)
    if args.e_step_every == 1 and most < smallest:
        raise InputError(f"--samples-per-prompt: --objective {objective} learns nothing from fewer "
                         f"than {smallest} samples of a prompt; raise it")
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples (by default 2), a part of "
                         "it; raise it")
    if fitting and rule.objective not in (None, objective) and args.allocator != PUBLISHED:
        print0(f"warning: --allocator {args.allocator} fits another gradient estimator; here "
               f"{fitting[0]} does")


# --- added to the paper: predictions instead of a pilot ----------------------------------------
def predicted_step(problems: list[Problem], step: int, state, source: SampleSource, args) -> tuple:
    """As e_step. p of --candidates-per-step prompts is predicted from the model's hidden states,
    and the best are served; state.predictor learns from their samples."""
    candidates = problems_of_step(problems, step, args)
    with source.timer("predict"):
        states = prompt_states(source.policy, candidates, args.tokens_per_micro_batch)
        predictor, features = on_every_rank(start_predictor, state.predictor, states)
    p, ones = predictor.predict(features), np.ones(len(candidates))
    weights = RULES[args.allocator].weights(p, ones, ones, args)  # all G are taken to be equal
    budget, objective = args.prompts_per_step * args.samples_per_prompt, OBJECTIVES[args.objective]
    counts = of_rank0(allocate_or_leave(weights, budget, objective.smallest_group))
    samples = source.sample_and_grade(candidates, counts, step)
    num_right = estimate(samples, candidates, args.weighting)["num_right"]  # no norms are known
    predictor.learn(features, num_right, counts)
    state.predictor = predictor.learnt
    batch = [problem for problem, count in zip(candidates, counts) if count > 0]
    metrics = describe_step(batch, samples, drawn=samples)
    return batch, samples, metrics | describe_prediction(p, num_right, counts)


def start_predictor(learnt: dict, states: np.ndarray) -> tuple[Predictor, np.ndarray]:
    """(predictor, features of states); InputError if they do not go together."""
    try:
        predictor = Predictor(learnt)
        return predictor, predictor.features(states)
    except ValueError as error:
        raise InputError(f"--candidates-per-step: {error}; leave it out, or choose another --model "
                         "or, with --resume, another --out") from error
