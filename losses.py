"""What a sample counts in the loss: objectives, weights, and losses of tokens. Pure functions.

The loss of one update is a sum over samples j and the tokens t of each,

    sum_j w_j sum_t loss(A_j, pi_jt),

with an advantage A_j (by the objective), a weight w_j (`loss_weights`) and a loss of each token.
The paper's M-step, -1/m sum_i 1/|D_i| sum_{j in D_i} ln pi_j over m prompts and their right samples
D_i, has A_j = 1, w_j = 1 / (m |D_i|), here over a mean length too, and the loss -A_j ln pi_jt.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from data import Sample
from run import number

WEIGHTINGS = ("prompt", "token", "sequence")  # see loss_weights


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """What is trained on, and how."""
    add = parser.add_argument_group("loss").add_argument
    add("--objective", choices=OBJECTIVES, default="raft", help="an entry of losses.OBJECTIVES")
    add("--weighting", choices=WEIGHTINGS, default="prompt",
        help="how prompts and samples are averaged: see losses.loss_weights")
    add("--loss", choices=LOSSES, default="raft++", help="raft: -A ln pi; raft++: Eq. 8, clipped")
    add("--clip-low", type=number(float, 0, 1), default=0.2,
        help="raft++: ratio >= 1 - this, if A < 0")
    add("--clip-high", type=number(float, 0, 10**6), default=0.28,
        help="raft++: ratio <= 1 + this, if A > 0")
    add("--kl-coef", type=number(float, 0, 1000), default=0.0, help="of KL to the initial model")
    add("--truncated-is", type=number(float, 1, 10**6), metavar="C",
        help="weigh tokens by min(pi_old / sampler's pi, C); for a sampler_gap above 0.01. "
        "vllm then tells the log-prob of every token, which takes it longer")
    add("--mask-truncated", action="store_true", help="no loss on responses that were cut; they "
        "still count in their group's mean reward and size, and so in the others' advantages")


# --- advantages ------------------------------------------------------------------------------
class Objective(NamedTuple):
    """Which samples of an update are trained on, and with which advantages."""

    advantages: Callable  # of (samples, args) to (advantages, used), (samples,) each
    smallest_group: int  # of a prompt, fewer samples teach nothing


def raft_objective(samples: list[Sample], args) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, used), (samples,) each: right samples are trained on, all alike."""
    is_right = np.array([sample.reward > 0 for sample in samples], dtype=bool)
    return is_right.astype(float), is_right


OBJECTIVES = {"raft": Objective(raft_objective, smallest_group=1)}  # grpo.py adds another


# --- weights ---------------------------------------------------------------------------------
def loss_weights(samples: list[Sample], used: np.ndarray, num_prompts: int, weighting: str):
    """w_j, by which the loss of each token of sample j is multiplied, (samples,); 0 if not used.

    used: (samples,), what the estimator averages over: right samples in RAFT, all in GRPO.
    m = num_prompts, solved or not; D_i: the used samples of prompt i; T_j: its response tokens.
    sum(T) and mean(T) are over all samples of the update, used or not.
    prompt:   1 / (m |D_i| mean(T)), Algorithm 1: prompts with used samples all count the same.
              mean(T) brings it near the scale of `token`.
    token:    1 / sum(T), as in the released code. Favours prompts with many samples.
    sequence: 1 / (T_j sum_i |D_i|), Eq. 8. Favours them, too.
    Raises ValueError for another weighting.
    """
    lengths = np.array([len(sample.response_ids) for sample in samples], dtype=float)  # T_j
    if weighting == "prompt":
        sizes = Counter(sample.problem for sample, is_used in zip(samples, used) if is_used)
        sizes = np.array([max(sizes[sample.problem], 1) for sample in samples])  # |D_i|
        return used / (num_prompts * sizes * lengths.sum() / max(len(lengths), 1))
    if weighting == "token":
        return used / lengths.sum()
    if weighting == "sequence":
        return used / (max(used.sum(), 1) * lengths)
    raise ValueError(f"unknown weighting {weighting}")


# --- losses ----------------------------------------------------------------------------------
def raft_loss(logprobs, old_logprobs, advantages, args):
    """(losses, clipped), (tokens,) each: -A ln pi; no gradient is clipped away."""
    return -advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


def clipped_loss(logprobs, old_logprobs, advantages, args):
    """-min(s A, clip(s, 1 - low, 1 + high) A), s = pi / pi_old: Eq. 8, and PPO's for any A."""
    low, high = 1 - args.clip_low, 1 + args.clip_high
    ratio = torch.exp(logprobs - old_logprobs)  # s
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = (advantages > 0) & (ratio > high) | (advantages < 0) & (ratio < low)
    return losses, clipped


LOSSES = {"raft": raft_loss, "raft++": clipped_loss}


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimates KL(pi || ref), (tokens,): r - 1 - ln r with r = ref / pi; never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio
