"""The policy: loading a model and checking it, log-probs of responses, gradient norms, states.

    model, tokenizer = load_model(args, device)
    policy = Policy(model, temperature=1.0)
    logprobs = policy(input_ids, response_mask)                        # to train on
    logprobs, norms = policy.logprobs_and_norms(input_ids, response_mask)
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as computed_again
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import TOY, Problem, encode_prompt
from files import refuse_pipe
from run import InputError, number, positive_int, print0

HEAD_BYTES = 1 << 30  # of the logits, (tokens, vocabulary) in fp32, that are held at once
# Config entries by which models change their logits after the head (Gemma 2, Cohere, Granite).
LOGIT_CHANGES = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The model, and the lengths and temperature at which it is sampled and trained."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=str(TOY), help="folder or hub name of a causal language model")
    add("--temperature", type=number(float, 1e-3, 100), default=1.0,
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
    try:  # without trust_remote_code=False, transformers would ask at the keyboard
        for path in Path(source).glob("*"):
            refuse_pipe(path)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # there is no list of what a broken folder can raise
        if "trust_remote_code=True" in str(error):  # transformers' advice
            raise InputError(f"--model {source}: needs code of its own, which is never run here; "
                             "choose a model that transformers knows") from error
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
    vocabulary = model.get_input_embeddings().num_embeddings
    _choose_template(source, tokenizer)
    _check_tokenizer(source, tokenizer, end_ids, vocabulary)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token_id = min(end_ids)  # it is masked: any will do
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
    # A special token that the model lacks, as Gemma 3's for images, is no fault until it is used.
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max({*tokenizer.get_vocab().values()} - special | end_ids | {*one, *other})
    if highest >= vocabulary:
        raise InputError(f"--model {source}: its tokenizer has the id {highest}, but the model "
                         f"knows {vocabulary} tokens; they do not belong together")


def _choose_template(source, tokenizer) -> None:
    """Of several chat templates the default one: prompts need no other, nor do checkpoints."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        if "default" not in templates:
            raise InputError(f"--model {source}: has chat templates named {sorted(templates)}, and "
                             "no default; rename one to default in the model's folder")
        tokenizer.chat_template = templates["default"]
    if tokenizer.chat_template is None:
        print0(f"{source} has no chat template: prompts use a plain one")


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
        """What the model knows of each prompt, (batch, 2 hidden), in fp64: the last hidden state of
        its last token, and the mean over its tokens."""
        with self._autocast():
            hidden = self._hidden_states(input_ids)
            prompts = [row[is_prompt].double() for row, is_prompt in zip(hidden, prompt_mask)]
            return torch.stack([torch.cat([row[-1], row.mean(dim=0)]) for row in prompts])

    def _autocast(self):
        """bf16 on CUDA. Its cache would hold a bf16 copy of the whole model."""
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False,
                              enabled=self.device.type == "cuda")

    def _hidden_states(self, input_ids):  # (batch, time, hidden)
        return self.model.base_model(input_ids, use_cache=False).last_hidden_state

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
