"""Does a model fit? Bytes on each GPU in the phases of a step, from the model's config alone.

    python tests/memory.py --gpus 8 --model qwen2.5-1.5b ...        # and raft.py's flags, as raft.py gets them
    python tests/memory.py --gpus 8 --model FOLDER --fsdp ...       # any config that transformers knows

Prints gigabytes (1e9 bytes) of each kind; a phase that does not fit says "no", and rows below show what flags help.

Measured: activations. The model runs forward and backward on fake tensors, which have shapes and types but no data, and
every byte that lives is counted, temporaries and autocast's bf16 copies of a layer's weights included. Fake CPU tensors stand
for CUDA's, since the meta device has no autocast. All else is arithmetic on shapes.

Assumed: rows of the greatest length, all of it response; vLLM samples, and its activations take part of what is called
key-value cache here; its CUDA graphs take 2 GB (1 to 2 by its own reports) beside its share, asleep or not; AdamW is fused (else its step takes 4 more bytes a
parameter); FSDP2 gathers fp32 weights and shares gradients out after every micro-batch. The greatest of each kind are
added up, though they need not come at the same time.

Not counted: CUDA's context, NCCL, fragments (a GPU of "80 GB" has 85e9 bytes); the start, when a rank holds one whole model in fp32, and its share of
the reference, less than later.
"""

import argparse
import functools
import json
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402 (the project's modules lie one folder up)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.weak import WeakIdKeyDictionary  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config  # noqa: E402

import model as policy_module  # noqa: E402
import raft  # noqa: E402
import run  # noqa: E402

FP32, BF16 = 4, 2  # bytes
CUDA_GRAPHS = 2e9
SHAPES = {  # what --model knows without a file
    "qwen2.5-1.5b": Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                                num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
    "qwen2.5-7b": Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                              num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags beside raft.py's."""
    parser.add_argument("--gpus", type=run.positive_int, default=8, help="ranks")
    parser.add_argument("--gpu-gigabytes", type=run.non_negative, default=80.0, help="of one GPU, in 1e9 bytes")


def parameter_counts(config) -> tuple[int, int, int]:
    """Parameters (of the model, of one layer, of what is in no layer); a tied head counts once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [sum(p.numel() for p in module.parameters()) for module in model.modules()
              if type(module).__name__ in model._no_split_modules]
    total = sum(p.numel() for p in model.parameters())
    return total, max(layers), total - sum(layers)


def reference_bytes(config) -> tuple[int, int]:
    """Bytes of the KL reference: (all, of what is in no layer). Its linear layers are in bf16, the rest is in fp32."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    policy_module.linears_to_bf16(model)
    layers = [sum(p.nbytes for p in module.parameters()) for module in model.modules()
              if type(module).__name__ in model._no_split_modules]
    total = sum(p.nbytes for p in model.parameters())
    return total, total - sum(layers)


def head_size(text_config) -> int:
    """Numbers in a query, key or value of one attention head."""
    stated = getattr(text_config, "head_dim", None)
    return stated or text_config.hidden_size // text_config.num_attention_heads


def cache_bytes(text_config) -> int:
    """Bytes of the keys and values of one token, in bf16."""
    return 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_size(text_config) * BF16


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of the tensors that were made since and are not freed, `now` and at the `peak`."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.storages = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in known})  # not counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.storages:  # not a view
                storage = tensor.untyped_storage()
                self.storages[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        """A storage of `size` bytes was made, or freed if that is negative."""
        self.now += size
        self.peak = max(self.peak, self.now)


def count_pass(counter: type, config_json: str, rows: int, time: int, training: bool, checkpointing=False, bf16=True):
    """A LiveBytes, or the like, that was on while (rows, time) tokens went through the model up to its head.

    training: forward and backward; otherwise forward, without gradients. bf16: under autocast, as on CUDA; its copies
    of the weights are counted. The weights themselves and their gradients are not.
    """
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config_json))).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        with counter(known) as found:
            ids = torch.zeros(rows, time, dtype=torch.long)
            with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=bf16,
                                                                         cache_enabled=False):
                output = model.base_model(ids, use_cache=False)
                loss = output.last_hidden_state[:, :-1].flatten(0, 1).square().sum()  # keeps the states, as a head does
            del output
            if training:
                loss.backward()
    return found


@functools.cache  # it takes seconds, and most flags do not change it
def activation_bytes(config_json: str, rows: int, time: int, **how) -> int:
    """The most bytes that live at once in count_pass's pass."""
    return count_pass(LiveBytes, config_json, rows, time, **how).peak


def phases(config, gpus: int, fsdp: bool, args) -> dict[str, dict[str, float]]:
    """Bytes on each GPU: for each phase of a step, those of each kind. args: flags.

    P parameters take 4 P for weights, 4 P for gradients, 8 P for AdamW's two moments, and a bit more than 2 P for the
    reference; FSDP2 divides each by the number of GPUs.
    """
    total, layer, root = parameter_counts(config)
    vocabulary, hidden = config.get_text_config().vocab_size, config.get_text_config().hidden_size
    shares = gpus if fsdp else 1
    share, (reference, its_root) = total / shares, reference_bytes(config) if args.kl_coef > 0 else (0, 0)
    held = {"weights, fp32": FP32 * share, "gradients, fp32": FP32 * share, "AdamW's state, fp32": 2 * FP32 * share,
            "reference, bf16 and fp32": reference / shares, "engine's CUDA graphs": CUDA_GRAPHS}
    # DDP's gradients are its buckets, which stay; FSDP2's are freed after the step.
    idle = held | {"gradients, fp32": 0 if fsdp else FP32 * share}
    # FSDP2 leaves the root (embedding, head) whole after a forward pass: the policy's until it goes backward, the
    # reference's for good. Of the layers, one is in use and whole, and the next is on its way.
    reference_root = its_root * fsdp
    whole_root = FP32 * root * fsdp + reference_root
    two_layers = 2 * FP32 * layer * fsdp
    longest = args.max_prompt_tokens + args.max_response_tokens
    rows = max(args.tokens_per_micro_batch // longest, 1)  # of a micro-batch
    measure = functools.partial(activation_bytes, config.to_json_string(use_diff=False), rows, longest)
    chunk = min(policy_module.HEAD_BYTES, rows * longest * vocabulary * FP32)
    engine = args.vllm_memory * args.gpu_gigabytes * 1e9
    # The logits of a decoding step as they come and in fp32, and their log-probs.
    engine_logits = (args.sampler_batch_size or 1024) * vocabulary * (BF16 + 2 * FP32)
    return {
        "sampling": idle | {"FSDP2's gathered weights": whole_root, "engine's weights, bf16": BF16 * total,
                                              "engine's logits": engine_logits,
                              "key-value cache": engine - BF16 * total - engine_logits},
        "scoring": idle | {
            "FSDP2's gathered weights": whole_root + two_layers, "activations": measure(training=False),
            "chunk of logits": 2 * chunk,  # logits and log_softmax
            "norm's buffers": vocabulary * hidden * (FP32 + BF16),  # the sum over chunks, and what is added
        },
        "training": held | {
            "FSDP2's gathered weights": whole_root + two_layers,
            "FSDP2's whole gradients": FP32 * root * fsdp + two_layers,  # a layer's, and the copy that is shared out
            "activations": measure(training=True, checkpointing=args.gradient_checkpointing),
            "chunk of logits": 3 * chunk,  # log_softmax and two gradients
            "head's gradient": vocabulary * hidden * (FP32 + BF16),  # the sum over chunks, and the weight in bf16
        },
        "optimizer": held | {"FSDP2's gathered weights": reference_root},
    }


def sums(found: dict[str, dict[str, float]], args) -> list[str]:
    """The gigabytes of each phase; "no" if it does not fit, or if the engine's share is too small for its weights."""
    sizes = [(sum(kinds.values()) / 1e9, min(kinds.values())) for kinds in found.values()]
    return [f"{size:.2f}" if size <= args.gpu_gigabytes and least >= 0 else f"no: {size:.2f}" for size, least in sizes]


def sums_with_other_flags(config, args) -> dict[str, list[str]]:
    """What could help: the sums with each flag by itself, and with all of them."""
    row, half = args.max_prompt_tokens + args.max_response_tokens, args.vllm_memory / 2
    changes = {f"--tokens-per-micro-batch {row}": {"tokens_per_micro_batch": row},
               "--gradient-checkpointing": {"gradient_checkpointing": True},
               f"--vllm-memory {half:g}": {"vllm_memory": half}, "--fsdp": {"fsdp": True}}
    changes["all four"] = functools.reduce(dict.__or__, changes.values())
    changed = {f"with {flag}": argparse.Namespace(**vars(args) | change) for flag, change in changes.items()}
    return {flag: sums(phases(config, args.gpus, new.fsdp, new), new) for flag, new in changed.items()}


def main(argv=None) -> None:
    """Print the table; if a phase does not fit, with a row for each flag that may help."""
    args = run.parse_flags(argv, __doc__, raft.add_flags, add_flags)
    config = SHAPES[args.model] if args.model in SHAPES else AutoConfig.from_pretrained(args.model)
    found = phases(config, args.gpus, args.fsdp, args)
    rows = {f"GB on each of {args.gpus} GPUs, {'FSDP2' if args.fsdp else 'DDP'}": list(found)}
    for kind in dict.fromkeys(kind for kinds in found.values() for kind in kinds):
        rows[kind] = [f"{kinds[kind] / 1e9:.2f}" if kinds.get(kind) else "" for kinds in found.values()]
    rows["sum"] = sums(found, args)
    if "no" in "".join(rows["sum"]):
        rows |= sums_with_other_flags(config, args)
    for kind, cells in rows.items():
        if any(cells):
            print(f"{kind:36}" + "".join(f"{cell:>12}" for cell in cells))
    tokens = max(found["sampling"]["key-value cache"], 0) / cache_bytes(config.get_text_config())
    print(f"{parameter_counts(config)[0]:,} parameters; the cache holds {tokens:,.0f} tokens")


if __name__ == "__main__":
    run.run_script(main)
