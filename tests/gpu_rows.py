"""What the checks of gpu_check.py share: rows, the toy, and a policy of random weights of the shape to be tried."""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections import namedtuple
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all models are here, or made here
sys.path.insert(0, str(Path(__file__).parents[1]))
if importlib.util.find_spec("math_verify") is None:  # eval.py notes its version
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "not installed" if name == "math-verify" else version(name)

import memory  # noqa: E402 (the project's modules lie one folder up)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import raft  # noqa: E402
import run  # noqa: E402
from answers import extract_boxed  # noqa: E402
from batches import fill_logprobs  # noqa: E402
from data import EVALUATION, TOY, Sample, load_prompts  # noqa: E402
from grader import Grader  # noqa: E402
from model import Policy  # noqa: E402
from pretrained import load_model  # noqa: E402
from sampler import HfSampler, draw  # noqa: E402

Row = namedtuple("Row", "check measured expected ok", defaults=("-", True))  # texts, and whether it is as expected


def at_most(check: str, value: float, bound: float) -> Row:
    """A row that is ok if value <= bound; NaN is not."""
    return Row(check, f"{value:.3g}", f"<= {bound:g}", bool(value <= bound))


def not_run(check: str, package: str) -> Row:
    """A row for what cannot be tried without a package."""
    return Row(check, f"not run: no {package}")


class PlainGrader(Grader):
    """Compares text, which will do for the toy, and needs no worker."""

    def __call__(self, responses: list[str], answers: list[str]) -> list[tuple[bool, bool]]:
        return [(extract_boxed(text) == answer, False) for text, answer in zip(responses, answers, strict=True)]


def flags(*words) -> argparse.Namespace:
    """The flags of raft.py and memory.py, with their defaults."""
    return run.parse_flags(list(map(str, words)), memory.__doc__, raft.add_flags, memory.add_flags)


def toy(device: torch.device, args, number: int = 64, kind=HfSampler) -> tuple:
    """(policy, sampler, problems, samples): one graded response, with old_logprobs, to each problem."""
    model, tokenizer = load_model(args, device)
    policy, sampler = Policy(model), kind(model, tokenizer, args)
    problems = load_prompts(args.data, args.split, tokenizer, args, number, training=True)
    samples = draw(sampler, PlainGrader(), problems, [1] * number, seed_key=(0, EVALUATION, 0), temperature=1.0)
    fill_logprobs(policy, samples, args.tokens_per_micro_batch, into="old_logprobs")
    return policy, sampler, problems, samples


def shape(device: torch.device, checkpointing: bool) -> tuple:
    """(config, flags, bytes that training takes by memory.py): 4 rows of 4,096 tokens, or what fits; see above."""
    config, words, capacity = AutoConfig.from_pretrained(TOY), ["--tokens-per-micro-batch", 2048], np.inf
    if device.type == "cuda":
        config, capacity = memory.SHAPES["qwen2.5-1.5b"], torch.cuda.get_device_properties(device).total_memory
        words = ["--max-prompt-tokens", 1024, "--max-response-tokens", 3072, "--tokens-per-micro-batch", 16384]
    args = flags("--loss", "raft", *words, *["--gradient-checkpointing"] * checkpointing)
    while True:
        kinds = memory.phases(config, 1, False, args)["training"]
        predicted = sum(kinds.values()) - kinds["engine's CUDA graphs"]
        if predicted < 0.92 * capacity or args.tokens_per_micro_batch <= 4096:
            return config, args, predicted
        args.tokens_per_micro_batch //= 2


def random_policy(config, args, device: torch.device) -> tuple:
    """(policy of random fp32 weights, rows that fill a micro-batch, nearly all response; the second needs padding)."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    longest, samples = args.max_prompt_tokens + args.max_response_tokens, []
    for row in range(args.tokens_per_micro_batch // longest):
        ids = torch.randint(3, config.vocab_size, (longest - 1 - 3 * (row == 1),), dtype=torch.int32).numpy()
        samples.append(Sample(row, 0, [3], ids, True, advantage=1.0, loss_weight=1 / len(ids),
                              sampler_logprobs=np.zeros(len(ids), np.float32)))
    return Policy(model, gradient_checkpointing=args.gradient_checkpointing), samples


def seconds(function, device: torch.device, repeats: int = 3) -> float:
    """The fastest of some calls, after one that warms up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
