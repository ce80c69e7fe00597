"""A model and its tokenizer, from a folder or the hub; what does not fit is refused with a reason.

    model, tokenizer = load_model(args, device)
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data import TOY, Problem, encode_prompt
from files import refuse_pipe
from run import InputError, number, positive_int, print0


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
