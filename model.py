"""The policy: loading a model, log-probs and gradient norms in one forward pass, micro-batches.

    model, tokenizer = load_model(args, device)
    policy = Policy(model, args.temperature)                      # log-probs of responses
    fill_logprobs(policy, samples, max_tokens=16384, with_norms=True)
    trained = distribute(policy)                                  # DDP: for forward and backward
"""

import argparse

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import TOY, InputError, Sample
from run import gather, number, positive_int, print0

HEAD_CHUNK = 512  # tokens whose logits, (tokens, vocabulary) in fp32, are held at once
# Config entries by which models change their logits after the head (Gemma 2, Cohere, Granite).
LOGIT_CHANGES = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model, and the lengths and temperature at which it is sampled and trained."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(TOY), help="folder or hub name of a causal language model")
    add("--temperature", type=number(float, low=1e-3), default=1.0,
        help="divides the logits, in sampling and in training alike; the paper trains at 1")
    add("--max-prompt-tokens", type=positive_int, default=64,
        help="prompts above it are dropped before they get any budget; the paper: 1024")
    add("--max-response-tokens", type=positive_int, default=64,
        help="responses are cut there, and graded as they are; the paper: 3072")


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """How much the policy works on at once: less memory, the same result but for rounding."""
    add = parser.add_argument_group("memory").add_argument
    add("--tokens-per-micro-batch", type=positive_int, default=16384,
        help="padded tokens in one forward pass; lower it if memory runs out")


def load_model(args: argparse.Namespace, device: torch.device, checkpoint=None):
    """(model in fp32, tokenizer) from `checkpoint`, if given, or --model.

    Raises InputError if the model cannot be had, or cannot hold the prompts and responses.
    """
    source = checkpoint or args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"--model {source}: cannot be loaded ({type(error).__name__}: {reason})"
        ) from error
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and args.max_prompt_tokens + args.max_response_tokens > context:
        raise InputError(
            "--max-prompt-tokens + --max-response-tokens is above the model's context "
            f"of {context} tokens"
        )
    end_ids = model.generation_config.eos_token_id  # an int, a list or None
    end_ids = set(end_ids if isinstance(end_ids, list) else [end_ids])
    end_ids = (end_ids | {tokenizer.eos_token_id}) - {None}
    if not end_ids:
        raise InputError(f"--model {source}: has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = min(end_ids)
    # Published generation settings may hold top-k or penalties: drop them. Samples must come
    # from the distribution that is trained.
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(end_ids), pad_token_id=tokenizer.pad_token_id
    )
    if tokenizer.chat_template is None:
        print0(f"{source} has no chat template: prompts use a plain one")
    return model, tokenizer


class Policy(nn.Module):
    """A causal language model, for the log-probs of responses: pi = softmax(W h / T).

    W is the output head, h the last hidden state, T the temperature. Raises InputError for a
    model whose logits are not W h: scaled, soft-capped, or from a head that is not linear.
    """

    def __init__(self, model, temperature: float = 1.0, gradient_checkpointing: bool = False):
        super().__init__()
        self.model, self.temperature = model, temperature
        for module in model.modules():  # no dropout: the sampler draws without it
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        _check_head(model)
        if gradient_checkpointing:  # the reentrant kind crashes DDP
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids, attention_mask, response_mask, with_norms: bool = False):
        """(log-probs of the response tokens, gradient norms of the responses or None).

        input_ids, attention_mask, response_mask: (batch, time), padded on the right. Log-probs:
        (tokens,), row after row. with_norms: also the norm of the gradient of each row's
        -sum_t ln pi(y_t) with respect to W, (batch,); there is then no backward pass.
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda):
            output = self.model.base_model(
                input_ids, attention_mask=attention_mask, use_cache=False
            )
            is_target = response_mask[:, 1:]  # (batch, time - 1): position t predicts t + 1
            hidden = output.last_hidden_state[:, :-1][is_target]  # (tokens, hidden)
            targets = input_ids[:, 1:][is_target]  # (tokens,)
            if with_norms:
                return self._logprobs_and_norms(hidden, targets, is_target.sum(dim=1).tolist())
            # The logits of a chunk are computed again in the backward pass, instead of kept.
            logprobs = [
                checkpoint(self._target_logprobs, h, y, use_reentrant=False)
                for h, y in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
            ]
            return torch.cat(logprobs), None

    def _log_softmax(self, hidden):
        """(tokens, hidden) to (tokens, vocabulary), in fp32."""
        logits = self.model.get_output_embeddings()(hidden).float()
        return torch.log_softmax(logits / self.temperature, dim=-1)

    def _target_logprobs(self, hidden, targets):
        return self._log_softmax(hidden).gather(1, targets[:, None]).squeeze(1)  # (tokens,)

    @torch.no_grad()
    def _logprobs_and_norms(self, hidden, targets, lengths: list[int]):
        """As forward's, for rows of `lengths` tokens each; without a backward pass.

        With the hidden states h_t held fixed, the gradient of -sum_t ln pi(y_t) is

            grad_W = sum_t delta_t h_t^T / T,        delta_t = softmax_t - onehot(y_t).

        That is exact for the head; the input path of a tied embedding is left out.
        """
        logprobs, norms = [], []
        for row_hidden, row_targets in zip(hidden.split(lengths), targets.split(lengths)):
            gradient = 0.0  # (vocabulary, hidden), added up over chunks of tokens
            for h, y in zip(row_hidden.split(HEAD_CHUNK), row_targets.split(HEAD_CHUNK)):
                log_softmax = self._log_softmax(h)  # (chunk, vocabulary)
                logprobs.append(log_softmax.gather(1, y[:, None]).squeeze(1))
                delta = log_softmax.exp_()
                delta[torch.arange(len(y), device=y.device), y] -= 1
                gradient = gradient + (delta.T @ h.to(delta.dtype)).float()
            norms.append(torch.linalg.norm(gradient) / self.temperature)
        return torch.cat(logprobs), torch.stack(norms)


@torch.no_grad()
def _check_head(model) -> None:
    """Raise InputError unless the logits are W h: Policy computes them, and norms, from that."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    plain = isinstance(head, nn.Linear)
    plain = plain and all(getattr(config, name, None) in (None, 1.0) for name in LOGIT_CHANGES)
    if plain:  # another name, or a change in code: compare
        ids = torch.arange(4, device=model.device)[None]  # (1, 4)
        hidden = model.base_model(input_ids=ids).last_hidden_state
        plain = torch.allclose(model(input_ids=ids).logits, head(hidden), rtol=1e-3, atol=1e-5)
    if not plain:
        raise InputError(
            f"--model: {type(model).__name__} scales or caps its logits, or has no linear head: "
            "choose another model"
        )


def distribute(policy: Policy) -> DistributedDataParallel:
    """The policy for training: its backward pass averages the gradients over ranks."""
    wrapped = DistributedDataParallel(policy, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # they are constants: nothing to send in every forward pass
    return wrapped


def micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, lists of indices; equally many for every rank.

    lengths: of the samples, in tokens. They are dealt by length, so that ranks have equal
    work and rows little padding. A micro-batch is padded to its longest row, its first, and then
    has at most `max_tokens` tokens, or one row. Ranks that run out get empty ones: all ranks must
    go through as many forward and backward passes, or they wait for each other for ever.
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


def collate(samples: list[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Policy's inputs: input_ids, attention_mask, response_mask, (batch, time) each."""
    rows = {"input_ids": [], "attention_mask": [], "response_mask": []}
    for sample in samples:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.response_ids])).long()
        rows["input_ids"].append(ids)
        rows["attention_mask"].append(torch.ones_like(ids))
        rows["response_mask"].append(torch.arange(len(ids)) >= len(sample.prompt_ids))
    return {name: pad_sequence(row, batch_first=True).to(device) for name, row in rows.items()}


@torch.no_grad()
def fill_logprobs(
    policy: Policy, samples: list[Sample], max_tokens: int, with_norms=False, into="old_logprobs"
) -> None:
    """Fill in an attribute of each sample with its log-probs; with_norms: head_grad_norm as well.

    The work is shared out over the ranks, at most `max_tokens` padded tokens at a time.
    """
    lengths = [sample.total_tokens for sample in samples]
    mine = micro_batches(lengths, dist.get_world_size(), max_tokens)[dist.get_rank()]
    scored = []
    for rows in filter(None, mine):
        batch = [samples[i] for i in rows]
        logprobs, norms = policy(**collate(batch, policy.model.device), with_norms=with_norms)
        rows_of_logprobs = logprobs.cpu().split([len(sample.response_ids) for sample in batch])
        copies = [row.numpy().copy() for row in rows_of_logprobs]  # not views of the whole batch
        scored += zip(rows, copies, norms.tolist() if with_norms else [0.0] * len(batch))
    for i, logprobs, norm in gather(scored):
        setattr(samples[i], into, logprobs)
        if with_norms:
            samples[i].head_grad_norm = norm


def per_token(samples: list[Sample], name: str, device: torch.device) -> torch.Tensor:
    """An attribute of the samples, one number or (response,) each, as fp32 (tokens,)."""
    rows = [np.broadcast_to(getattr(s, name), len(s.response_ids)) for s in samples]
    return torch.from_numpy(np.concatenate(rows)).to(device, torch.float32)
