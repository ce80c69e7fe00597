"""Ways to spend the 64 samples of a step, drawn from the bank of a real model (real_gradient.py).

Each returns (prompts, rows, samples): the prompts it has looked at, and of each sample the row
among these and the place among the bank's samples of that prompt, (samples,) each.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from real_bank import Bank
from speed import PREDICTED_ALPHA, PUBLISHED_ALPHA

from allocator import allocate, gvm_weights, reward_weights
from predictor import allocate_or_leave

PROMPTS, SAMPLES, PILOT, CANDIDATES = 16, 4, 2, 64
BUDGET = PROMPTS * SAMPLES  # of a step
SMALLEST = {"raft": 1, "grpo": 2}  # samples of a prompt that say something, by objective


@dataclass
class Step:
    """What a way may look at."""

    bank: Bank
    prompts: np.ndarray  # of the bank: those it may look at
    objective: str
    predicted: np.ndarray  # weights, of all prompts of the bank
    rng: np.random.Generator

    def draw(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rows, samples): counts_i samples of prompt i, with replacement."""
        rows = np.repeat(np.arange(len(counts)), counts)
        return rows, self.rng.integers(self.bank.right.shape[1], size=len(rows))

    def choose(self, number: int) -> np.ndarray:
        """Prompts at random, each by itself: those of the bank stand for many more."""
        return self.rng.choice(self.prompts, number)


def fitting_weights(objective: str, p, norm_right=1.0, norm_wrong=1.0) -> np.ndarray:
    """By the rule that fits the objective, (prompts,), for p that is predicted or known. Without
    norms all prompts have the same."""
    norms = [np.broadcast_to(norm, len(p)) for norm in (norm_right, norm_wrong)]
    if objective == "raft":
        return gvm_weights(p, norms[0], PREDICTED_ALPHA)
    return reward_weights(p, *norms)


def uniform(step: Step, num_prompts: int = PROMPTS) -> tuple:
    """Equal counts."""
    prompts = step.choose(num_prompts)
    return prompts, *step.draw(np.full(num_prompts, SAMPLES))


def published(step: Step) -> tuple:
    """A pilot that is trained on, and the rest by the paper's rule, for GRPO as well."""
    prompts = step.choose(PROMPTS)
    pilot = step.draw(np.full(PROMPTS, PILOT))
    found = step.bank.summarise(prompts, *pilot)
    weights = gvm_weights(found["accept_rate"], found["norm_right"], PUBLISHED_ALPHA)
    rest = step.draw(allocate(weights, BUDGET, min_samples=PILOT) - PILOT)
    return prompts, *map(np.concatenate, zip(pilot, rest))


def best(step: Step, candidates: int, known: str = "") -> tuple:
    """The best of some prompts share the samples. known: "p", or "p and G"; else p is predicted."""
    prompts, bank = step.choose(candidates), step.bank
    weights = step.predicted[prompts]
    if known == "p":
        weights = fitting_weights(step.objective, bank.p[prompts])
    elif known:
        norms = (bank.known[name][prompts] for name in ("norm_right", "norm_wrong"))
        weights = fitting_weights(step.objective, bank.p[prompts], *norms)
    return prompts, *step.draw(allocate_or_leave(weights, BUDGET, SMALLEST[step.objective]))


WAYS = {
    "uniform": uniform,
    "uniform, 64 x 4": partial(uniform, num_prompts=64),  # a step of 256 samples
    "published": published,
    "predicted": partial(best, candidates=PROMPTS),
    "wider pool": partial(best, candidates=CANDIDATES),
    "known": partial(best, candidates=PROMPTS, known="p and G"),
    "known p, wider pool": partial(best, candidates=CANDIDATES, known="p"),
    "known, wider pool": partial(best, candidates=CANDIDATES, known="p and G"),
}
