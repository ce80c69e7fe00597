"""The policy: log-probs of responses, gradient norms, states of prompts; and the KL's reference.

    policy = Policy(model, temperature=1.0)                            # of pretrained.load_model
    logprobs = policy(input_ids, response_mask)                        # to train on
    logprobs, norms = policy.logprobs_and_norms(input_ids, response_mask)
"""

import argparse
from contextlib import suppress

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as computed_again

from pretrained import load_model
from run import InputError

HEAD_BYTES = 1 << 30  # of the logits, (tokens, vocabulary) in fp32, that are held at once
# Config entries by which models change their logits after the head (Gemma 2, Cohere, Granite).
LOGIT_CHANGES = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")


class _EnoughLayers(Exception):
    """Ends a forward pass whose last layers nobody needs."""


def decoder_layers(model) -> list[nn.Module]:
    """The layers of a transformers model, first to last; by name, or by that of a class above it,
    since fully_shard gives a layer a class of its own."""
    names = set(model._no_split_modules)
    return [module for module in model.modules()
            if names & {kind.__name__ for kind in type(module).__mro__}]


def summarise_states(hidden: torch.Tensor) -> torch.Tensor:
    """Of a prompt's states, (time, hidden): the last token's, and their mean; (2 hidden,)."""
    return torch.cat([hidden[-1], hidden.mean(dim=0)])


class Policy(nn.Module):
    """A causal language model: pi = softmax(W h / T), of which responses are scored and trained.

    W is the output head, h the last hidden state, T the temperature. Raises InputError for a
    model whose logits are not W h: scaled, soft-capped, or from a head that is not linear.
    All inputs are padded on the right, where no token before looks: (batch, time).
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

    def forward(self, input_ids, response_mask) -> torch.Tensor:
        """Log-probs of the response tokens, (tokens,), row after row: what is trained."""
        with self._autocast():
            hidden, targets = self._states_before_responses(input_ids, response_mask)
            # The logits of a chunk are not kept, but computed again in the backward pass.
            chunks = zip(hidden.split(self.head_chunk), targets.split(self.head_chunk))
            logprobs = [computed_again(self._target_logprobs, *chunk, use_reentrant=False)
                        for chunk in chunks]
            return torch.cat(logprobs)

    @torch.no_grad()
    def logprobs_and_norms(self, input_ids, response_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probs as forward's, without a gradient; a gradient norm for each row, (batch,)).

        The norm is that of the gradient of -sum_t ln pi(y_t) with respect to W, the hidden states
        held fixed. It needs no backward pass.
        """
        with self._autocast():
            hidden, targets = self._states_before_responses(input_ids, response_mask)
            lengths = response_mask[:, 1:].sum(dim=1).tolist()
            return self._head_norms(hidden, targets, lengths)

    @torch.no_grad()
    def prompt_states(self, input_ids, prompt_mask) -> torch.Tensor:
        """What the model knows of each prompt, (batch, 2 hidden), in fp64: in the middle layer, the
        state of its last token, and the mean over its tokens."""
        with self._autocast():
            hidden = self._middle_states(input_ids)
            return torch.stack([summarise_states(row[is_prompt].double())
                                for row, is_prompt in zip(hidden, prompt_mask)])

    def _autocast(self):
        """bf16 on CUDA. Its cache would hold a bf16 copy of the whole model."""
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False,
                              enabled=self.device.type == "cuda")

    def _hidden_states(self, input_ids):  # (batch, time, hidden)
        return self.model.base_model(input_ids, use_cache=False).last_hidden_state

    def _middle_states(self, input_ids):  # (batch, time, hidden)
        """After half of the layers, where the pass is stopped. The others turn to the next token,
        which after a prompt is always the same: they tell less of it (figures/README.md)."""
        found, layers = [], decoder_layers(self.model)

        def keep_and_stop(layer, inputs, output):
            found.append(output[0] if isinstance(output, tuple) else output)  # as in older models
            raise _EnoughLayers

        with layers[(len(layers) - 1) // 2].register_forward_hook(keep_and_stop):
            with suppress(_EnoughLayers):
                self.model.base_model(input_ids, use_cache=False)
        return found[0]

    def _states_before_responses(self, input_ids, response_mask):
        """Hidden states, (tokens, hidden), that predict the response tokens, (tokens,)."""
        is_target = response_mask[:, 1:]  # (batch, time - 1): position t predicts t + 1
        hidden = self._hidden_states(input_ids)
        return hidden[:, :-1][is_target], input_ids[:, 1:][is_target]

    def _log_softmax(self, hidden):  # (tokens, hidden) to (tokens, vocabulary), in fp32
        logits = self.model.get_output_embeddings()(hidden).float()
        if self.temperature != 1:  # at 1 it would copy them for nothing
            logits = logits / self.temperature
        return torch.log_softmax(logits, dim=-1)

    def _target_logprobs(self, hidden, targets):
        return self._log_softmax(hidden).gather(1, targets[:, None]).squeeze(1)  # (tokens,)

    @torch.no_grad()
    def _head_norms(self, hidden, targets, lengths: list[int]):
        """(log-probs, norms) as above, for rows of `lengths` tokens each.

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


def load_reference(args: argparse.Namespace, device: torch.device) -> Policy:
    """The policy of --model as it is, from which the KL is taken; never from a checkpoint."""
    reference = Policy(load_model(args, device)[0], args.temperature).requires_grad_(False)
    if device.type == "cuda":
        linears_to_bf16(reference.model)
    return reference


def linears_to_bf16(model) -> None:
    """Round what autocast rounds in every pass, so that no result changes. It leaves in fp32 the
    norms, the embedding (with a head that is tied to it) and buffers such as rotary frequencies."""
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            module.bfloat16()


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
