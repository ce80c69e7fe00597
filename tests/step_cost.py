"""What does a step cost? Operations, memory traffic and network traffic of each GPU, counted from the model's shapes.

    python tests/step_cost.py --model qwen2.5-1.5b --prompts-per-step 1024 --samples-per-prompt 8 --updates-per-step 4
    python tests/step_cost.py ... --tflops 400 --memory-gb 2500 --network-gb 300

Takes raft.py's flags, and what it cannot know: mean lengths, the share of samples that are trained on. Throughputs are
the reader's: with them a phase takes at least as long as the slowest of its three parts. Grading, saving and what
Python does in between are not counted.

A GPU's share of each phase. P: parameters; B: those of the layers; V H: vocabulary times hidden, the head; A: heads
times their size; L: layers. A multiplication and its addition are two operations.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from memory import BF16, FP32, SHAPES, cache_bytes, head_size, parameter_counts  # noqa: E402 (lies in this folder)
from transformers import AutoConfig  # noqa: E402

import raft  # noqa: E402 (the project's modules lie one folder up)
import run  # noqa: E402
from gvm import RULES, settle_budget  # noqa: E402
from model import HEAD_BYTES  # noqa: E402

GIGA, TERA = 1e9, 1e12


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


def scored_share(args) -> float:
    """The share of a step's samples whose gradient norms are computed: from which a pilot or a regression learns."""
    if args.candidates_per_step is not None:
        return 1.0
    return args.pilot_samples / args.samples_per_prompt if args.e_step_every == 1 else 0.0


def draws(args) -> tuple[float, float]:
    """(calls of the sampler in a step, samples of a pilot that only informs), both on average over steps."""
    if not args.pilot_samples:
        return 1.0, 0.0
    if args.e_step_every == 1:
        return 2.0, 0.0  # the pilot, and the rest
    return 1.0 + 1 / args.e_step_every, args.prompts_per_step * args.pilot_samples


def step_cost(config, args) -> dict[str, tuple[float, float, float]]:
    """For each phase (operations, bytes of memory traffic, bytes sent) of one GPU in one step."""
    text, (total, _, root) = config.get_text_config(), parameter_counts(config)
    body, head = total - root, text.vocab_size * text.hidden_size
    attention = text.num_hidden_layers * text.num_attention_heads * head_size(text)  # L A
    cache, prompt, response = cache_bytes(text), args.prompt_tokens, args.response_tokens
    tokens = prompt + response
    calls, pilot = draws(args)
    samples = (args.prompts_per_step * args.samples_per_prompt + pilot) / args.gpus
    own = args.prompts_per_step * args.samples_per_prompt / args.gpus  # without a pilot that only informs
    others = (args.gpus - 1) / args.gpus  # of a tensor that is gathered or shared out, what is sent

    # A token meets the tokens before it, twice: queries with keys, weights with values; 2 operations each.
    whole_pass = 2 * body * tokens + 2 * attention * tokens**2 + 2 * head * response  # one sample, forward
    decoded = response * (2 * (body + head) + 4 * attention * (prompt + response / 2))
    costs = {"sampling": (
        samples * decoded + samples / args.samples_per_prompt * 2 * body * prompt,  # prompts once: the prefix cache
        calls * args.longest * BF16 * (body + head) + samples * response * cache * (prompt + response / 2), 0.0)}
    costs["weights to the engine"] = (0.0, calls * (FP32 + BF16) * total, calls * FP32 * total * others * args.fsdp)

    with_norms = own * scored_share(args) + pilot / args.gpus
    if not RULES[args.allocator].needs_wrong:  # right samples only
        with_norms *= args.trained_share
    # The others' log-probs; a step's first update has its own.
    later = 1 - 1 / args.updates_per_step
    without = own * args.trained_share * (1 - scored_share(args)) * later
    reference = own * args.trained_share * (args.kl_coef > 0)
    chunk = HEAD_BYTES / FP32 / text.vocab_size  # tokens; for norms, of one sample
    # A chunk reads the head. For norms it also writes a gradient, and adds it to the sum over chunks.
    heads_read = 4 * with_norms * max(response / chunk, 1) + (without + reference) * response / chunk
    candidates = (args.candidates_per_step or 0) / args.gpus  # whose prompts a prediction reads
    read = candidates * (2 * body * prompt + 2 * attention * prompt**2)
    costs["scoring"] = ((with_norms + without + reference) * whole_pass + with_norms * 2 * head * response + read,
                        heads_read * FP32 * head, 0.0)

    trained = own * args.trained_share
    # Backward takes twice the forward pass. What is not kept is computed again: the head; with --gradient-checkpointing
    # all layers, but for the last product of each, which nobody needs.
    last_products = 2 * text.num_hidden_layers * text.hidden_size * text.intermediate_size * tokens
    again = whole_pass - last_products if args.gradient_checkpointing else 2 * head * response
    micro_batches = max(trained * tokens / args.tokens_per_micro_batch, args.updates_per_step)
    if args.fsdp:  # gathered forward and backward, gradients shared out: in every micro-batch
        sent = micro_batches * 3 * FP32 * total * others
    else:  # an all-reduce sends a tensor twice
        sent = args.updates_per_step * 2 * FP32 * total * others
    costs["training"] = (trained * (3 * whole_pass + again),
                         micro_batches * 3 * FP32 * total + 4 * FP32 * head * trained * response / chunk,
                         sent if args.gpus > 1 else 0.0)
    held = total / (args.gpus if args.fsdp else 1)
    # AdamW reads weight, gradient and two moments, and writes all but the gradient.
    costs["optimizer"] = (0.0, args.updates_per_step * 7 * FP32 * held, 0.0)
    return costs


def main(argv=None) -> None:
    """Print the table."""
    args = run.parse_flags(argv, __doc__, raft.add_flags, add_flags)
    run.join_ranks()
    settle_budget(args, args.objective)
    config = SHAPES[args.model] if args.model in SHAPES else AutoConfig.from_pretrained(args.model)
    speeds = [args.tflops and args.tflops * TERA, args.memory_gb and args.memory_gb * GIGA,
              args.network_gb and args.network_gb * GIGA]
    heads = f"{'1e12 ops':>12}{'GB memory':>12}{'GB sent':>12}{'s, at least':>13}"
    print(f"{f'one step, each of {args.gpus} GPUs':28}{heads}")
    costs = step_cost(config, args)
    costs["sum"] = tuple(map(sum, zip(*costs.values())))
    total_seconds = 0.0
    for phase, (operations, moved, sent) in costs.items():
        seconds = [amount / speed for amount, speed in zip((operations, moved, sent), speeds) if speed]
        shown = f"{max(seconds):13.1f}" if seconds and phase != "sum" else ""
        total_seconds += max(seconds) if shown else 0.0
        if phase == "sum" and seconds:
            shown = f"{total_seconds:13.1f}"
        print(f"{phase:28}{operations / TERA:12.1f}{moved / GIGA:12.1f}{sent / GIGA:12.1f}{shown}")


if __name__ == "__main__":
    run.run_script(main)
