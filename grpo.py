"""GRPO with variance-minimising sampling. Read raft.py first: this is what changes.

    torchrun grpo.py                                      # the toy, on a CPU, in a minute
    torchrun grpo.py --allocator uniform                  # what it is compared with
    torchrun grpo.py --candidates-per-step 64             # the best of four times as many prompts
    torchrun grpo.py --candidates-per-step 64 --advantage loo       # without a bias: see below
    torchrun --nproc-per-node 8 grpo.py ...               # flags as for raft.py: see README.md

RAFT gives right samples the advantage 1 and drops the others. GRPO trains on all samples. The
advantage of each is its reward less the mean of its group, the samples of its prompt, over their
standard deviation.

The rule. The gradient is now that of the expected reward. Its variance, as long as nothing is
divided by a std, is another function of p, and the rule for that is `reward`
(allocator.reward_weights). The paper takes its own, `gvm`, for GRPO as well. With a pilot of two of
four samples they end alike, and `gvm` in fewer tokens: it is the default. Predictions know more of
p than such a pilot; with them it is `reward`.

Unequal groups. GRPO's baseline is the mean of the whole group, which contains the sample itself. By
that alone (`--advantage dr`) the expected gradient is (n_i - 1) / n_i of the leave-one-out one.
GRPO divides by the group's standard deviation, too, and that shrinks small groups more: a pair
counts 2.8 times less than a large group where p is 0.5, and 4.7 times less where p is 0.1. So
prompts with more samples count more. With `--advantage loo` they do not: it is unbiased for the
prompts that are served, if n_i is fixed before its samples are drawn, as it is by predictions. A
pilot that is trained on makes the estimate too small (tests/README.md).
"""

import argparse

import numpy as np

import raft
import run
from data import Sample
from losses import OBJECTIVES, Objective


def add_flags(parser: argparse.ArgumentParser) -> None:
    """raft.py's and --advantage; defaults: GRPO, PPO's clip range."""
    raft.add_flags(parser)
    parser.add_argument("--advantage", choices=ADVANTAGES, default="grpo",
                        help="grpo: divided by the std; dr: not; loo: against the others only")
    parser.set_defaults(objective="grpo", clip_high=0.2)


def grpo_advantage(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / (std + 1e-6), DeepSeekMath's (arXiv 2402.03300); n - 1 in the std."""
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)


def dr_advantage(rewards: np.ndarray) -> np.ndarray:
    """r - mean (arXiv 2503.20783): no std, which in large groups favours p near 0 and 1."""
    return rewards - rewards.mean()


def loo_advantage(rewards: np.ndarray) -> np.ndarray:
    """r - mean of the n - 1 others = n / (n - 1) (r - mean) (arXiv 2402.14740)."""
    n = len(rewards)
    return (rewards - rewards.mean()) * (n / (n - 1))


ADVANTAGES = {"grpo": grpo_advantage, "dr": dr_advantage, "loo": loo_advantage}  # --advantage


def group_advantages(samples: list[Sample], kind: str) -> np.ndarray:
    """Each sample's advantage within its group, (samples,). A group is a prompt, pilot included.

    A group of one, or of equal rewards, says nothing: 0.
    """
    groups: dict[int, list[int]] = {}  # by problem: indices into samples
    for j, sample in enumerate(samples):
        groups.setdefault(sample.problem, []).append(j)
    rewards = np.array([sample.reward for sample in samples])
    advantages = np.zeros(len(samples))
    for rows in groups.values():
        if rewards[rows].min() < rewards[rows].max():
            advantages[rows] = ADVANTAGES[kind](rewards[rows])
    return advantages


def grpo_objective(samples: list[Sample], args) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, used), (samples,) each: all samples are used, right or wrong."""
    return group_advantages(samples, args.advantage), np.ones(len(samples), dtype=bool)


OBJECTIVES["grpo"] = Objective(grpo_objective, smallest_group=2)


def main(argv=None) -> None:
    """Parse the flags and train."""
    raft.train(run.parse_flags(argv, __doc__, add_flags))


if __name__ == "__main__":
    run.run_script(main)
