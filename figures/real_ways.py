"""Ways to spend the 64 samples of a step, drawn from the bank of a real model (real_gradient.py).

Each returns (prompts, rows, samples): the prompts it has looked at, and of each sample the row
among these and the place among the bank's samples of that prompt, (samples,) each.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from real_bank import Bank
from speed import PILOT, POOL, PREDICTED_ALPHA, PROMPTS, PUBLISHED_ALPHA, SAMPLES_EACH, SMALLEST

from allocator import allocate, gvm_weights, reward_weights
from predictor import allocate_or_leave

BUDGET = PROMPTS * SAMPLES_EACH  # of a step


def draw(bank: Bank, counts: np.ndarray, rng: np.random.Generator) -> tuple:
    """(rows, samples): counts_i of the bank's samples of prompt i, with replacement."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, rng.integers(bank.right.shape[1], size=len(rows))


@dataclass
class Step:
    """What a way may look at."""

    bank: Bank
    prompts: np.ndarray  # of the bank: those it may look at
    objective: str
    predicted_p: np.ndarray  # of all prompts of the bank
    rng: np.random.Generator

    def draw(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See draw."""
        return draw(self.bank, counts, self.rng)

    def choose(self, number: int) -> np.ndarray:
        """Prompts at random, each by itself: those of the bank stand for many more."""
        return self.rng.choice(self.prompts, number)


def uniform(step: Step, num_prompts: int = PROMPTS, each: int = SAMPLES_EACH) -> tuple:
    """Equal counts."""
    prompts = step.choose(num_prompts)
    return prompts, *step.draw(np.full(num_prompts, each))


def most_prompts(step: Step) -> tuple:
    """Equal counts, as small as they can be: many prompts are served, but not by choice."""
    each = SMALLEST[step.objective]
    return uniform(step, BUDGET // each, each)


def published(step: Step) -> tuple:
    """A pilot that is trained on, and the rest by the paper's rule, for GRPO as well."""
    prompts = step.choose(PROMPTS)
    pilot = step.draw(np.full(PROMPTS, PILOT))
    found = step.bank.summarise(prompts, *pilot)
    weights = gvm_weights(found["accept_rate"], found["norm_right"], PUBLISHED_ALPHA)
    rest = step.draw(allocate(weights, BUDGET, min_samples=PILOT) - PILOT)
    rows, samples = (np.concatenate(both) for both in zip(pilot, rest))
    return prompts, rows, samples


def best(step: Step, candidates: int, knows_p: bool = False, knows_norms: bool = False) -> tuple:
    """The best of some prompts share the samples, by p and G of the bank where they are known;
    otherwise p is predicted, and all G are equal."""
    prompts, bank = step.choose(candidates), step.bank
    p, norms = step.predicted_p[prompts], np.ones((2, candidates))
    if knows_p:
        p = bank.p[prompts]
    if knows_norms:
        norms = bank.known["norm_right"][prompts], bank.known["norm_wrong"][prompts]
    if step.objective == "raft":  # by the rule that fits
        weights = gvm_weights(p, norms[0], PREDICTED_ALPHA)
    else:
        weights = reward_weights(p, *norms)
    return prompts, *step.draw(allocate_or_leave(weights, BUDGET, SMALLEST[step.objective]))


WAYS = {
    "uniform": uniform,
    "most prompts": most_prompts,
    "published": published,
    "predicted": partial(best, candidates=PROMPTS),
    "wider pool": partial(best, candidates=POOL),
    "known": partial(best, candidates=PROMPTS, knows_p=True, knows_norms=True),
    "known p, wider pool": partial(best, candidates=POOL, knows_p=True),
    "known, wider pool": partial(best, candidates=POOL, knows_p=True, knows_norms=True),
}
