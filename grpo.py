"""GRPO with variance-minimising sampling. Read raft.py first: this is what changes.

    torchrun grpo.py                                      # the toy, on a CPU, in minutes
    torchrun grpo.py --allocator uniform                  # what it is compared with
    torchrun grpo.py --advantage loo                      # unbiased, also with unequal group sizes
    torchrun --nproc-per-node 8 grpo.py ...               # flags as for raft.py: see README.md

Wrong samples are trained on as well. Each gets an advantage, its reward against those of the other samples of its
prompt (its group): RAFT has 1 for right samples and drops the rest. The gradient is now that of the expected reward,
whose variance is another function of p, so the allocator is `reward` (allocator.reward_weights).

Unequal groups. GRPO's baseline is the group's own mean, which contains the sample itself. Its advantage is
(n_i - 1) / n_i of the leave-one-out one, and so is its expected gradient: prompts with more samples count more, by up
to a factor of 2 between n_i = 2 and infinity. `--advantage loo` has no such factor; with `grpo` and `dr` it comes on
top of what `--weighting` does (raft.sample_weights). Pilot samples are members of the group like all others.
"""

import argparse

import numpy as np

import gvm
import raft
from data import Sample, parse
from eval import add_flags, run


def set_defaults(parser: argparse.ArgumentParser) -> None:
    """The allocator that fits, and the clip range of PPO."""
    parser.set_defaults(allocator="reward", clip_high=0.2)


def group_advantages(samples: list[Sample], kind: str) -> np.ndarray:
    """Advantage A_j of each sample against its group: the samples of the same problem, in this step. (samples,)

    grpo: (r - mean) / (std + 1e-6), DeepSeekMath's (arXiv 2402.03300), std with n - 1 in its denominator.
    dr:   r - mean (arXiv 2503.20783): no division, which favours prompts that are nearly always or never solved.
    loo:  r - mean of the other n - 1 = n / (n - 1) (r - mean) (arXiv 2402.14740).
    A group of one, or of equal rewards, says nothing: 0.
    """
    groups: dict[int, list[int]] = {}
    for j, sample in enumerate(samples):
        groups.setdefault(sample.problem, []).append(j)
    rewards, advantages = np.array([sample.reward for sample in samples]), np.zeros(len(samples))
    for rows in groups.values():
        r, n = rewards[rows], len(rows)
        if r.min() < r.max():
            scale = {"grpo": 1 / (r.std(ddof=1) + 1e-6), "dr": 1.0, "loo": n / (n - 1)}[kind]
            advantages[rows] = (r - r.mean()) * scale
    return advantages


def compare_groups(samples: list[Sample], prompts: int, args) -> tuple[np.ndarray, np.ndarray]:
    """GRPO's objective: (advantages, weights), (samples,) each; all samples are used, right or wrong."""
    used = np.ones(len(samples), dtype=bool)
    return group_advantages(samples, args.advantage), raft.sample_weights(samples, used, prompts, args.weighting)


if __name__ == "__main__":
    flags = (add_flags, gvm.add_flags, raft.add_flags, set_defaults)
    run(lambda: raft.train(parse(__doc__, *flags), compare_groups, "reward"))
