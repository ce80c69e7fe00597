"""What does a step cost? Operations, memory and network traffic and tokens of each GPU, counted from the model's shapes.

    python tests/step_cost.py --model qwen2.5-1.5b --prompts-per-step 1024 --samples-per-prompt 8 --updates-per-step 4
    python tests/step_cost.py ... --tflops 400 --memory-gb 2500 --network-gb 300 --ktokens 55

Takes raft.py's flags, and what it cannot know: mean lengths, the share of samples that are trained on. Throughputs are
the reader's: with them a phase takes at least as long as the slowest of its parts. Matrix products and attention are a
phase, and the operations between them another, since one waits for the other: these read and write tensors, which are
counted on fake ones. Grading, saving, padding and waiting for the slowest rank are not counted.

vLLM schedules a token in about 18 us of Python (measured on a CPU with an engine that computes nothing): --ktokens 55.
With --truncated-is it is asked for the log-prob of every token: 24 us, --ktokens 42.

A GPU's share of each phase. P: parameters; B: those of the layers; V H: vocabulary times hidden, the head; A: heads
times their size; L: layers. A multiplication and its addition are two operations.
"""

import argparse
import functools
import sys
from collections import namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402 (the project's modules lie one folder up)
from memory import BF16, FP32, SHAPES, cache_bytes, count_pass, head_size, parameter_counts  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from transformers import AutoConfig  # noqa: E402

import raft  # noqa: E402
import run  # noqa: E402
from gvm import RULES, settle_budget  # noqa: E402
from model import HEAD_BYTES  # noqa: E402
from batches import cut_in_pieces  # noqa: E402

GIGA, TERA = 1e9, 1e12
Cost = namedtuple("Cost", "operations moved sent tokens", defaults=(0.0, 0.0))  # moved and sent: bytes; tokens: sampled
# Not counted as traffic: products, whose time is that of their operations; and what touches little of a tensor.
APART = ("mm", "addmm", "bmm", "embedding", "gather", "scatter_add", "index", "index_put_")
# Bytes of traffic for each logit, with its computation in bf16 and the rest in fp32. Forward: to fp32, log_softmax.
FORWARD = (BF16 + FP32) + 2 * FP32
# And to a norm: exp, back to bf16 for the product.
NORM = FORWARD + 2 * FP32 + (FP32 + BF16)
# Forward twice; back: zeros, the gradient of log_softmax, to bf16.
TRAINING = 2 * FORWARD + FP32 + 3 * FP32 + (FP32 + BF16)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags beside raft.py's."""
    add = parser.add_argument
    add("--gpus", type=run.positive_int, default=8, help="ranks")
    add("--prompt-tokens", type=run.positive_int, default=150, help="mean length of a prompt")
    add("--response-tokens", type=run.positive_int, default=700, help="mean length of a response")
    add("--longest", type=run.positive_int, default=3072, help="tokens of the longest response of a draw")
    add("--trained-share", type=run.number(float, low=0, high=1), default=0.5, help="samples with a gradient")
    add("--tflops", type=run.non_negative, help="1e12 operations a second that a GPU reaches in bf16")
    add("--memory-gb", type=run.non_negative, help="1e9 bytes a second from its memory")
    add("--network-gb", type=run.non_negative, help="1e9 bytes a second to other GPUs")
    add("--ktokens", type=run.non_negative, help="1e3 tokens a second that the sampler's Python schedules")


class Traffic(TorchDispatchMode):
    """While it is on: bytes that operations read and write, but for views and for what is APART."""

    def __init__(self, _=()):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read, written = ([tensor for tensor in tree_leaves(found) if isinstance(tensor, torch.Tensor)]
                         for found in ((args, kwargs), result))
        known = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not function._schema.is_mutable and all(t.untyped_storage()._cdata in known for t in written)
        name = function.overloadpacket.__name__
        if not is_view and name not in APART and not name.startswith("_scaled_dot_product"):
            self.bytes += sum(tensor.nbytes for tensor in written)
            self.bytes += sum(tensor.nbytes for tensor in read if "zeros" not in name)
        return result


@functools.cache
def body_traffic(config_json: str, **how) -> tuple[float, float]:
    """Bytes of traffic of a pass through the layers: (for each token, for each pass). how: of count_pass."""
    one, two = (count_pass(Traffic, config_json, 1, time, **how).bytes for time in (64, 128))
    return (two - one) / 64, 2 * one - two


def scored_share(args) -> float:
    """The share of a step's samples whose gradient norms are computed: a pilot's that is a part of them."""
    return args.pilot_samples / args.samples_per_prompt if args.e_step_every == 1 else 0.0


def draws(args) -> list[tuple[float, int, int]]:
    """The sampler's calls: (how many in a step, on average; prompts; samples of each, on average)."""
    prompts, pilot, steps = args.prompts_per_step, args.pilot_samples, args.e_step_every
    if not pilot:
        return [(1.0, prompts, args.samples_per_prompt)]
    if steps > 1:  # the pilot only informs
        return [(1 / steps, prompts * steps, pilot), (1.0, prompts, args.samples_per_prompt)]
    return [(1.0, prompts, pilot), (1.0, prompts, args.samples_per_prompt - pilot)]


def decode_steps(samples: float, args) -> float:
    """Steps in which a rank decodes its samples, with --sampler-batch-size at once: until all but these have begun,
    and then the longest."""
    slots = args.sampler_batch_size or 1024
    return max(samples - slots, 0) / slots * args.response_tokens + args.longest


def prompts_read(prompts: int, each: int, gpus: int) -> float:
    """Prompts that a rank reads, if each has as many samples: a cache spares it the second time."""
    problems = [problem for problem in range(prompts) for _ in range(each)]
    pieces = cut_in_pieces(problems, gpus)
    return sum(len({problems[piece[0]] for piece in pieces[rank::gpus]}) for rank in range(gpus)) / gpus


def sizes(config) -> tuple[int, int, int, int]:
    """(P, B, V H, L A)."""
    text, (total, _, root) = config.get_text_config(), parameter_counts(config)
    attention = text.num_hidden_layers * text.num_attention_heads * head_size(text)
    return total, total - root, text.vocab_size * text.hidden_size, attention


def forward_operations(config, args) -> float:
    """Of one sample. A token meets the tokens before it, twice: queries with keys, weights with values."""
    _, body, head, attention = sizes(config)
    tokens = args.prompt_tokens + args.response_tokens
    return 2 * body * tokens + 2 * attention * tokens**2 + 2 * head * args.response_tokens


def head_chunks(config, response: float, at_least: float = 0.0) -> float:
    """Chunks of logits of so many response tokens."""
    return max(response * config.get_text_config().vocab_size * FP32 / HEAD_BYTES, at_least)


def sampling_cost(config, args) -> Cost:
    """Of the sampler's calls, on average over steps."""
    _, body, head, attention = sizes(config)
    prompt, response = args.prompt_tokens, args.response_tokens
    decoded = response * (2 * (body + head) + 4 * attention * (prompt + response / 2))
    operations = moved = tokens = 0.0
    for calls, prompts, each in draws(args):
        samples = prompts * each / args.gpus
        read = prompts_read(prompts, each, args.gpus) * (2 * body * prompt + 2 * attention * prompt**2)
        operations += calls * (samples * decoded + read)
        moved += calls * (decode_steps(samples, args) * BF16 * (body + head)
                          + samples * response * cache_bytes(config.get_text_config()) * (prompt + response / 2))
        tokens += calls * samples * response
    return Cost(operations, moved, tokens=tokens)


def scoring_costs(config, args) -> tuple[Cost, Cost]:
    """Of norms, old log-probs, the reference's, and predictions: (products, the rest)."""
    _, body, head, attention = sizes(config)
    prompt, response = args.prompt_tokens, args.response_tokens
    own = args.prompts_per_step * args.samples_per_prompt / args.gpus  # without a pilot that only informs
    pilot = args.prompts_per_step * args.pilot_samples / args.gpus * (args.e_step_every > 1)
    with_norms = own * scored_share(args) + pilot
    if not RULES[args.allocator].needs_wrong:  # right samples only
        with_norms *= args.trained_share
    # The others' log-probs; a step's first update has its own.
    later = 1 - 1 / args.updates_per_step
    plain = own * args.trained_share * ((1 - scored_share(args)) * later + (args.kl_coef > 0))
    candidates = (args.candidates_per_step or 0) / args.gpus  # whose prompts a prediction reads
    layers = config.get_text_config().num_hidden_layers
    candidates *= (layers + 1) // 2 / layers  # by half of the layers
    read = candidates * (2 * body * prompt + 2 * attention * prompt**2)
    tokens = (with_norms + plain) * (prompt + response) + candidates * prompt
    passes, vocabulary = tokens / args.tokens_per_micro_batch, config.get_text_config().vocab_size
    each, once = body_traffic(config.to_json_string(use_diff=False), training=False)
    plain_chunks, norm_chunks = head_chunks(config, plain * response), with_norms * head_chunks(config, response, at_least=1)
    moved = (tokens * each + passes * once + response * vocabulary * (plain * FORWARD + with_norms * NORM)
             # The head's weights to bf16, for each chunk. For norms its product is added to the sum over chunks, which
             # begins with zeros and ends in a number.
             + head * ((plain_chunks + norm_chunks) * (FP32 + BF16) + norm_chunks * (BF16 + 2 * FP32) + with_norms * 2 * FP32))
    operations = (with_norms + plain) * forward_operations(config, args) + with_norms * 2 * head * response + read
    return Cost(operations, passes * BF16 * body), Cost(0.0, moved)


def training_costs(config, args) -> tuple[Cost, Cost]:
    """Of forward and backward passes: (products, the rest)."""
    text, (total, _, head, _) = config.get_text_config(), sizes(config)
    trained = args.prompts_per_step * args.samples_per_prompt / args.gpus * args.trained_share
    tokens, responses = trained * (args.prompt_tokens + args.response_tokens), trained * args.response_tokens
    forward = trained * forward_operations(config, args)
    # Backward takes twice the forward pass. What is not kept is computed again: the head; with --gradient-checkpointing
    # all layers, but for the last product of each, which nobody needs.
    last_products = 2 * text.num_hidden_layers * text.hidden_size * text.intermediate_size * tokens
    again = forward - last_products if args.gradient_checkpointing else 2 * head * responses
    micro_batches = max(tokens / args.tokens_per_micro_batch, args.updates_per_step)
    others = (args.gpus - 1) / args.gpus  # of a tensor that is gathered or shared out, what is sent
    if args.fsdp:  # gathered forward and backward, gradients shared out: in every micro-batch
        sent = micro_batches * 3 * FP32 * total * others
    else:  # an all-reduce sends a tensor twice
        sent = args.updates_per_step * 2 * FP32 * total * others
    each, once = body_traffic(config.to_json_string(use_diff=False), training=True,
                              checkpointing=args.gradient_checkpointing)
    moved = (tokens * each + micro_batches * once + responses * text.vocab_size * TRAINING
             # The head's weights to bf16, twice; their gradient from it, and added to the sum over chunks.
             + head * head_chunks(config, responses, micro_batches) * (3 * (FP32 + BF16) + 3 * FP32))
    return Cost(3 * forward + again, micro_batches * 3 * BF16 * total, sent), Cost(0.0, moved)


def step_cost(config, args) -> dict[str, Cost]:
    """For each phase, what one GPU does in one step."""
    total, calls = sizes(config)[0], sum(number for number, *_ in draws(args))
    held, others = total / (args.gpus if args.fsdp else 1), (args.gpus - 1) / args.gpus
    scoring, training = scoring_costs(config, args), training_costs(config, args)
    return {
        "sampling": sampling_cost(config, args),
        "weights to the engine": Cost(0.0, calls * (FP32 + BF16) * total, calls * FP32 * total * others * args.fsdp),
        "scoring: products": scoring[0], "scoring: the rest": scoring[1],
        "training: products": training[0], "training: the rest": training[1],
        # AdamW reads weight, gradient and two moments, and writes all but the gradient.
        "optimizer": Cost(0.0, args.updates_per_step * 7 * FP32 * held),
    }


def main(argv=None) -> None:
    """Print the table."""
    args = run.parse_flags(argv, __doc__, raft.add_flags, add_flags)
    run.join_ranks()
    settle_budget(args, args.objective)
    config = SHAPES[args.model] if args.model in SHAPES else AutoConfig.from_pretrained(args.model)
    units = {"1e12 ops": TERA, "GB memory": GIGA, "GB sent": GIGA, "1e3 tokens": 1e3}
    speeds = [speed and speed * unit for speed, unit in zip(
        (args.tflops, args.memory_gb, args.network_gb, args.ktokens), units.values())]
    heads = "".join(f"{unit:>12}" for unit in units)
    print(f"{f'one step, each of {args.gpus} GPUs':28}{heads}{'s, at least':>13}")
    costs = step_cost(config, args)
    costs["sum"] = Cost(*map(sum, zip(*costs.values())))
    total_seconds = 0.0
    for phase, amounts in costs.items():
        seconds = [amount / speed for amount, speed in zip(amounts, speeds) if speed]
        shown = f"{max(seconds):13.1f}" if seconds and phase != "sum" else ""
        total_seconds += max(seconds) if shown else 0.0
        if phase == "sum" and seconds:
            shown = f"{total_seconds:13.1f}"
        cells = "".join(f"{amount / unit:12.1f}" for amount, unit in zip(amounts, units.values()))
        print(f"{phase:28}{cells}{shown}")


if __name__ == "__main__":
    run.run_script(main)
