"""The policy: loading, log-probs and norms in one forward pass; DDP and FSDP2; checkpoints."""

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict as state_dicts
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import TOY, InputError, Problem, encode_prompt
from run import RunState, digest, gather, number, on_rank0, positive_int, print0, read_json
from run import remove_old_checkpoints, write_json

HEAD_BYTES = 1 << 30  # of the logits, (tokens, vocabulary) in fp32, that are held at once
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


def load_model(args: argparse.Namespace, device: torch.device, checkpoint=None):
    """(model in fp32, tokenizer) from `checkpoint`, if given, or --model.

    Raises InputError if the model cannot be had whole, or cannot hold the prompts and responses.
    """
    source = checkpoint or args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # there is no list of what a broken folder can raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = "" if Path(source).is_dir() else "no such folder, nor a model of the hub; "
        raise InputError(f"--model {source}: cannot be loaded ({known}{reason}); give a folder or "
                         "hub name of a causal language model") from error
    _check_weights(source, model, report)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and args.max_prompt_tokens + args.max_response_tokens > context:
        raise InputError("--max-prompt-tokens + --max-response-tokens is above the model's "
                         f"context of {context} tokens; lower one of them")
    found = model.generation_config.eos_token_id  # an int, a list or None
    end_ids = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id} - {None}
    _check_tokenizer(source, tokenizer, end_ids, model.get_input_embeddings().num_embeddings)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = min(end_ids)
    # Without top-k or penalties: samples come from the distribution that is trained.
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(end_ids), pad_token_id=tokenizer.pad_token_id)
    return model.to(device), tokenizer


def _check_weights(source, model, report: dict) -> None:
    """InputError for tensors that are not in the files, which are random, or not finite."""
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
    faults = {"its files lack tensors of the model": missing, "holds NaN or infinity": broken}
    for fault, names in faults.items():
        if names:
            raise InputError(f"--model {source}: {fault} ({names[0]}, {len(names)} in all); get "
                             "it again")
    if unused:
        print0(f"warning: {source} has tensors without a use ({unused[0]}, {len(unused)} in all)")


def _check_tokenizer(source, tokenizer, end_ids: set[int], vocabulary: int) -> None:
    """InputError unless questions survive encoding, to ids that the model knows."""
    if not end_ids or min(end_ids) < 0:
        raise InputError(f"--model {source}: has no end-of-sequence token; set eos_token_id")
    one, other = (encode_prompt(tokenizer, Problem(0, text, "")) for text in ("4+3", "9-1"))
    if one == other:
        raise InputError(f"--model {source}: its tokenizer cannot tell questions apart; is "
                         "tokenizer.json missing?")
    highest = max(*tokenizer.get_vocab().values(), *end_ids)
    if highest >= vocabulary:
        raise InputError(f"--model {source}: its tokenizer has the id {highest}, but the model "
                         f"knows {vocabulary} tokens; they do not belong together")
    if tokenizer.chat_template is None:
        print0(f"{source} has no chat template: prompts use a plain one")


class Policy(nn.Module):
    """A causal language model, for the log-probs of responses: pi = softmax(W h / T).

    W is the output head, h the last hidden state, T the temperature. Raises InputError for a
    model whose logits are not W h: scaled, soft-capped, or from a head that is not linear.
    """

    def __init__(self, model, temperature: float = 1.0, gradient_checkpointing: bool = False):
        super().__init__()
        self.model, self.temperature, self.device = model, temperature, model.device
        for module in model.modules():  # no dropout: the sampler draws without it
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        _check_head(model)
        self.head_chunk = max(HEAD_BYTES // (4 * model.get_output_embeddings().out_features), 1)
        if gradient_checkpointing:  # the reentrant kind crashes DDP
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids, mask, with_norms: bool = False, as_states: bool = False):
        """(log-probs of the masked tokens, of responses; gradient norms of the rows or None).

        input_ids, mask: (batch, time), padded on the right, where no token before looks. Log-probs:
        (tokens,), row after row. with_norms: also the norm of the gradient of each row's
        -sum_t ln pi(y_t) with respect to W, (batch,); there is then no backward pass. as_states:
        instead, of masked prompts, the last token's hidden state and the mean, (batch, 2 hidden).
        """
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.is_cuda,
                            cache_enabled=False):  # the cache would hold a bf16 copy of the model
            hidden = self.model.base_model(input_ids, use_cache=False).last_hidden_state
            if as_states:
                rows = [row[is_prompt].double() for row, is_prompt in zip(hidden, mask)]
                return torch.stack([torch.cat([row[-1], row.mean(dim=0)]) for row in rows])
            is_target = mask[:, 1:]  # (batch, time - 1): position t predicts t + 1
            hidden, targets = hidden[:, :-1][is_target], input_ids[:, 1:][is_target]  # per token
            if with_norms:
                return self._logprobs_and_norms(hidden, targets, is_target.sum(dim=1).tolist())
            # The logits of a chunk are computed again in the backward pass, instead of kept.
            chunks = zip(hidden.split(self.head_chunk), targets.split(self.head_chunk))
            logprobs = [checkpoint(self._target_logprobs, *c, use_reentrant=False) for c in chunks]
            return torch.cat(logprobs), None

    def _log_softmax(self, hidden):  # (tokens, hidden) to (tokens, vocabulary), in fp32
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
        logprobs, norms, size = [], [], self.head_chunk
        head = self.model.get_output_embeddings().weight
        for row_hidden, row_targets in zip(hidden.split(lengths), targets.split(lengths)):
            gradient = torch.zeros_like(head, dtype=torch.float32)  # added up over chunks
            for h, y in zip(row_hidden.split(size), row_targets.split(size)):
                log_softmax = self._log_softmax(h)  # (chunk, vocabulary)
                logprobs.append(log_softmax.gather(1, y[:, None]).squeeze(1))
                delta = log_softmax.exp_()
                delta[torch.arange(len(y), device=y.device), y] -= 1
                gradient += delta.T @ h.to(delta.dtype)  # in bf16 on CUDA
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
        raise InputError(f"--model: {type(model).__name__} scales or caps its logits, or has no "
                         "linear head; choose another model")


def distribute(policy: Policy, shard: bool = False) -> nn.Module:
    """The policy for training: its backward pass takes the mean of the gradients over ranks.

    By DDP, or with `shard` by FSDP2, which changes `policy` itself: each rank holds a part of each
    tensor, and a layer is gathered when it is used.
    """
    if not shard:  # buffers are constants: there is nothing to send in every forward pass
        return DistributedDataParallel(
            policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    for module in list(policy.modules()):
        if type(module).__name__ in policy.model._no_split_modules:  # a decoder layer
            fully_shard(module)
    return fully_shard(policy)  # what is in no layer: embedding and head


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what FSDP2 has spread over the ranks, gathered on each."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """For each rank its micro-batches, lists of indices; equally many for every rank.

    lengths: in tokens. Samples are dealt by length, for equal work and little padding. A batch has
    at most `max_tokens` tokens, padded to its longest row, or one row; ranks wait in each of them.
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


# --- checkpoints -----------------------------------------------------------------------------
# Whole tensors under plain names, so that any number of ranks can load what any other has saved.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(out: Path, state: RunState, model, optimizer, tokenizer, keep: int) -> None:
    """Write OUT/checkpoints/step-N, a folder for from_pretrained; keep the newest `keep`.

    It is there whole or not at all. It is not written twice, nor after updates that are not finite.
    """
    if state.saved == state.step or state.not_finite > 0:
        return
    state.saved = state.step
    weights, moments = state_dicts.get_model_state_dict(model, options=WHOLE), None
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: weights[name] for name in names & weights.keys()}  # a tied head only once
    if optimizer.state:  # it has none before its first step, and asking would make a step
        moments = state_dicts.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    final = out / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")

    def write():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if moments is not None:
                torch.save(moments, partial / "optimizer.pt")
            write_json(partial / "state.json", asdict(state))
            digests = {path.name: digest(path) for path in partial.iterdir()}
            write_json(partial / "digests.json", digests)
            digest(partial / "digests.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            shutil.rmtree(partial, ignore_errors=True)  # it may not have come so far
            raise InputError(f"--out: the checkpoint of step {state.step} cannot be written "
                             f"({error}); make room, then --resume") from error
        shutil.rmtree(final, ignore_errors=True)  # a broken one, which --resume passed over
        partial.rename(final)
        remove_old_checkpoints(final, state, keep)

    on_rank0(write)


def newest_checkpoint(out: Path) -> tuple[Path | None, RunState]:
    """The newest whole checkpoint, or None, and its state; for all ranks. Warns of damaged ones."""

    def find():
        saved = sorted(out.glob("checkpoints/step-??????"), reverse=True)
        for path in saved:
            try:
                digests = read_json(path / "digests.json")
                if digests and all(digest(path / n) == value for n, value in digests.items()):
                    return path, RunState(**read_json(path / "state.json"))
            except (OSError, InputError, TypeError):
                pass  # as good as another digest
            print0(f"warning: {path} is damaged, trying the one before")
        if saved:
            raise InputError(f"--resume: no checkpoint in {out} is whole; choose another --out")
        return None, RunState()

    return gather([on_rank0(find)])[0]


def load_optimizer(checkpoint: Path, model, optimizer) -> None:
    """Load the optimizer's state from a checkpoint, if it had one. Called on all ranks."""
    path = checkpoint / "optimizer.pt"
    if path.exists():
        flags = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        moments = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state_dicts.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        optimizer.param_groups[0].update(flags)  # they win over those of the checkpoint
        for state in optimizer.state.values():  # copies: the file may be deleted, not stay mapped
            state.update({name: value.clone() for name, value in state.items()})
