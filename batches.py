"""How work is cut and shared: micro-batches, DDP and FSDP2, and scoring on all ranks.

Nothing here changes a result, beyond rounding: neither the number of ranks, nor the size of a
micro-batch, nor which of DDP and FSDP2 holds the model.
"""

import argparse
import inspect
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from data import Problem, Sample
from model import Policy, decoder_layers
from run import gather, positive_int, share_out


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """What fits into memory. None of these changes the result."""
    add = parser.add_argument_group("memory").add_argument
    add("--tokens-per-micro-batch", type=positive_int, default=16384,
        help="padded tokens in one forward pass: less memory with fewer")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--fsdp", action="store_true", help="FSDP2: a part of the model on each GPU; needs vllm")


def distribute(policy: Policy, shard: bool = False) -> nn.Module:
    """The policy for training: its backward pass takes the mean of the gradients over ranks.

    By DDP, or with `shard` by FSDP2, which changes `policy` itself: each rank holds a part of each
    tensor, and a layer is gathered when it is used.
    """
    if not shard:  # buffers are constants: there is nothing to send in every forward pass
        # torch 2.13's name for it, or the one before.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(policy, gradient_as_bucket_view=True, **{name: False})
    for layer in decoder_layers(policy.model):
        fully_shard(layer)
    fully_shard(policy)  # what is in no layer: embedding and head
    for method in ("logprobs_and_norms", "prompt_states"):  # forward passes, too
        register_fsdp_forward_method(policy, method)
    return policy


def gather_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what FSDP2 has spread over the ranks, gathered on each."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- micro-batches ---------------------------------------------------------------------------
def micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, lists of indices; equally many for every rank.

    lengths: in tokens. Rows are dealt by length, for equal work and little padding. A batch has at
    most `max_tokens` tokens, padded to its longest row, or one row. Ranks wait for each other in
    every batch, so those that run out get empty ones.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares = []
    for rank in range(ranks):
        left, batches = by_length[rank::ranks], []
        while left:
            rows = max(max_tokens // lengths[left[0]], 1)
            batches.append(left[:rows])
            left = left[rows:]
        shares.append(batches)
    most = max(len(batches) for batches in shares)
    return [batches + [[]] * (most - len(batches)) for batches in shares]


def micro_batches_here(samples: list[Sample], max_tokens: int) -> Iterator[tuple[list, list]]:
    """This rank's micro-batches of samples that all ranks have: (indices, samples) each.

    An empty one still has a sample, the shortest, for a pass that does not count: DDP and FSDP2
    wait for all ranks.
    """
    lengths = [sample.total_tokens for sample in samples]
    for indices in micro_batches(lengths, dist.get_world_size(), max_tokens)[dist.get_rank()]:
        yield indices, [samples[i] for i in indices or [np.argmin(lengths)]]


def collate(samples: list[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Policy's inputs: input_ids and response_mask, (batch, time) each."""
    rows = {"input_ids": [], "response_mask": []}
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
        rows["input_ids"].append(ids)
        rows["response_mask"].append(torch.arange(len(ids)) >= len(sample.prompt_ids))
    return {name: pad_sequence(row, batch_first=True).to(device) for name, row in rows.items()}


def per_token(samples: list[Sample], name: str, device: torch.device, missing=None) -> torch.Tensor:
    """An attribute of the samples, one number or (response,) each, as fp32 (tokens,).

    missing: what stands for None; without it every sample must have the attribute.
    """
    rows = []
    for sample in samples:
        value = getattr(sample, name)
        rows.append(np.broadcast_to(missing if value is None else value, len(sample.response_ids)))
    return torch.from_numpy(np.concatenate(rows)).to(device, torch.float32)


# --- requests for samples --------------------------------------------------------------------
def cut_in_pieces(ids: list[int], ranks: int) -> list[list[int]]:
    """Places in `ids`, the problems of requests, in pieces for ranks that take turns.

    A rank reads the prompt of a piece once. But the samples of a hard problem are many and long,
    too many for one rank: a piece has at most four. The large ones come first, so that ranks differ
    by four samples at most. Where a rank gets few samples, pieces are smaller: there should be 128
    for each rank, or long prompts and short ones do not even out.
    """
    most = min(max(len(ids) // (128 * ranks), 1), 4)
    pieces: list[list[int]] = []
    for place, problem in enumerate(ids):
        if pieces and len(pieces[-1]) < most and ids[pieces[-1][0]] == problem:
            pieces[-1].append(place)
        else:
            pieces.append([place])
    return sorted(pieces, key=len, reverse=True)


# --- scoring: forward passes without gradients, shared out over the ranks ------------------------
@torch.no_grad()
def fill_logprobs(policy: Policy, samples: list[Sample], max_tokens: int, into: str) -> None:
    """Fill in an attribute of each sample, old_logprobs or ref_logprobs: (response,) each."""
    scored = []
    for indices, batch in micro_batches_here(samples, max_tokens):
        logprobs = policy(**collate(batch, policy.device))
        scored += zip(indices, split_rows(logprobs, batch))
    for i, logprobs in gather(scored):
        setattr(samples[i], into, logprobs)


@torch.no_grad()
def fill_norms(policy: Policy, samples: list[Sample], max_tokens: int) -> None:
    """Fill in head_grad_norm of each sample and, from the same forward pass, old_logprobs."""
    scored = []
    for indices, batch in micro_batches_here(samples, max_tokens):
        logprobs, norms = policy.logprobs_and_norms(**collate(batch, policy.device))
        scored += zip(indices, split_rows(logprobs, batch), norms.tolist())
    for i, logprobs, norm in gather(scored):
        samples[i].old_logprobs, samples[i].head_grad_norm = logprobs, norm


def split_rows(logprobs: torch.Tensor, batch: list[Sample]) -> list[np.ndarray]:
    """(tokens,) to (response,) of each sample; copies, or each would keep the whole batch."""
    rows = logprobs.cpu().split([len(sample.response_ids) for sample in batch])
    return [row.numpy().copy() for row in rows]


@torch.no_grad()
def prompt_states(policy: Policy, problems: list[Problem], max_tokens: int) -> np.ndarray:
    """Policy.prompt_states of each problem, (problems, 2 hidden).

    The ranks share the batches, which are the same for any number of ranks; so are the states.
    """
    prompts = [torch.tensor(problem.prompt_ids, device=policy.device) for problem in problems]
    batches = micro_batches([len(ids) for ids in prompts], ranks=1, max_tokens=max_tokens)[0]

    def states_of(rows: list[int]) -> np.ndarray:
        ids = [prompts[i] for i in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).bool()
        return policy.prompt_states(pad_sequence(ids, batch_first=True), mask).cpu().numpy()

    missing = -len(batches) % dist.get_world_size()  # FSDP2 waits for all ranks: repeat a batch
    found = share_out(batches + batches[:1] * missing, lambda mine: list(map(states_of, mine)))
    states = np.empty((len(problems), found[0].shape[1]))
    for rows, states_of_batch in zip(batches, found):
        states[rows] = states_of_batch
    return states
