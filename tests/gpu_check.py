"""Does it work on this GPU? In minutes, by one process on one GPU; on a CPU a short form of it, for the script itself.

    python tests/gpu_check.py                                # on an H100 add --peak-tflops 989

Prints a table as the checks go on, "check | measured | expected | ok", and exits with 1 if a row is not ok. It needs
torch and transformers only: answers are graded by comparing text, and vLLM is checked where it is installed. On a CPU
the toy's shape stands for that of 1.5B parameters, and the policy computes in fp32, so bf16 is tried on norms alone.
"""

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # all models are here, or made here
sys.path.insert(0, str(Path(__file__).parents[1]))
if importlib.util.find_spec("math_verify") is None:  # eval.py notes its version
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "not installed" if name == "math-verify" else version(name)

import memory  # noqa: E402 (the project's modules lie one folder up)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

import raft  # noqa: E402
import run  # noqa: E402
from answers import extract_boxed  # noqa: E402
from batches import collate, distribute, fill_logprobs, gather_tensor  # noqa: E402
from data import EVALUATION, TOY, Sample, load_prompts  # noqa: E402
from grader import Grader  # noqa: E402
from model import Policy, load_model  # noqa: E402
from sampler import HfSampler, VllmSampler, draw  # noqa: E402

LINE = "{:66} | {:18} | {:14} | {}"
Row = namedtuple("Row", "check measured expected ok", defaults=("-", True))  # texts, and whether it is as expected


def at_most(check: str, value: float, bound: float) -> Row:
    """A row that is ok if value <= bound; NaN is not."""
    return Row(check, f"{value:.3g}", f"<= {bound:g}", bool(value <= bound))


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


# --- checks: functions of (device, options) that return rows ------------------------------------
def bf16_against_fp32(device, options) -> list[Row]:
    """The toy's log-probs and the gradient of an update on this device, against a copy of it in fp32 on the CPU."""
    args = flags("--loss", "raft", "--updates-per-step", 1)  # its gradient does not depend on the old log-probs
    policy, _, problems, samples = toy(device, args)
    copy = Policy(load_model(args, torch.device("cpu"))[0])
    fill_logprobs(copy, samples, args.tokens_per_micro_batch, into="ref_logprobs")
    gaps = np.concatenate([np.abs(sample.old_logprobs - sample.ref_logprobs) for sample in samples])
    [trained], gradients = raft.split_updates(problems, samples, args), []
    for one in (policy, copy):
        raft.micro_batch_loss(one, trained, args, on_policy=True)[0].backward()
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in one.parameters()]))
    distance = 1 - torch.cosine_similarity(*gradients, dim=0).item()
    # What autocast to bf16 makes of them on a CPU: 0.002, 0.09, 0.0003.
    mean, most, angle = (0.01, 0.3, 0.01) if device.type == "cuda" else (1e-6, 1e-6, 1e-6)
    return [at_most(f"log-probs against fp32, {len(gaps)} tokens: mean", gaps.mean(), mean),
            at_most("log-probs against fp32: largest", gaps.max(), most),
            at_most(f"gradient of {len(trained)} samples: 1 - cosine", distance, angle)]


def raft_learns_and_resumes(device, options) -> list[Row]:
    """Six steps of RAFT++ on the toy, and the last three again, from the checkpoint in a copy of the run's folder."""
    words = ["--data", str(TOY / "spared.jsonl"), "--prompts-per-step", "32", "--samples-per-prompt", "8", "--sampler", "hf",
             "--updates-per-step", "2", "--steps", "6", "--eval-every", "6", "--save-every", "3", "--out"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr), mock.patch("raft.Grader", PlainGrader):
        outs = Path(folder, "straight"), Path(folder, "resumed")
        raft.main([*words, str(outs[0])])
        shutil.copytree(*outs)
        shutil.rmtree(outs[1] / "checkpoints" / "step-000006")
        raft.main([*words, str(outs[1]), "--resume"])
        logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in outs]
        straight, resumed = (load_file(out / "checkpoints" / "step-000006" / "model.safetensors") for out in outs)
    first, last = (logs[0][step]["eval_accuracy"] for step in (0, 6))
    moved = max((straight[name] - resumed[name]).abs().max().item() for name in straight)
    gap, between, weights = (0.01, 0.1, 1e-2) if device.type == "cuda" else (1e-5, 0.0, 0.0)
    return [Row("RAFT++, 6 steps: accuracy", f"{first:.3f} to {last:.3f}", "up by 0.05", last - first >= 0.05),
            at_most("RAFT++, step 6: sampler_gap", logs[0][6]["sampler_gap"], gap),
            at_most("resumed at step 3: accuracy differs by", abs(logs[1][6]["eval_accuracy"] - last), between),
            at_most("resumed at step 3: parameters differ by", moved, weights)]


def training_flop(config, lengths: list[int]) -> float:
    """Floating-point operations of an update: 6 P T + 6 L d sum_i t_i^2, for rows of t_i tokens, T in all.

    Each of P parameters takes a multiplication and an addition a token, forward, and twice that backward (a tied
    embedding counts as the head). Attention has two products of 2 d operations for each of t_i^2 / 2 pairs, in each
    of L layers, and again thrice that; d is the hidden size. What checkpointing computes again does not count.
    """
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(t**2 for t in lengths)
    return 6 * memory.parameter_counts(config)[0] * sum(lengths) + attention


def training_cost(device, options, checkpointing: bool) -> list[Row]:
    """Memory and time of an update with AdamW; of fewer rows where memory.py says that all do not fit."""
    before, is_cuda = torch.cuda.memory_allocated(), device.type == "cuda"  # 0 on a CPU
    config, args, predicted = shape(device, checkpointing)
    policy, samples = random_policy(config, args, device)
    optimizer, lengths = torch.optim.AdamW(policy.parameters(), lr=0, fused=is_cuda), [s.total_tokens for s in samples]
    step = functools.partial(raft.optimizer_step, distribute(policy), optimizer, samples, args, on_policy=True)
    if not step().get("updates"):  # the first makes AdamW's state; after it DDP makes its buckets anew
        raise RuntimeError("the gradient is not finite")
    taken, size, share = seconds(step, device), ("not measured", f"{predicted / 1e9:.2f}"), "-"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        size = f"{peak / 1e9:.2f}", f"{predicted / 1e9:.2f} ± 10 %", abs(peak / predicted - 1) <= 0.1
    if options.peak_tflops:
        share = f"{training_flop(config, lengths) / taken / (options.peak_tflops * 1e12):.1%}"
    name = f"update of {sum(lengths):,} tokens, {'with' if checkpointing else 'without'} checkpointing: "
    return [Row(name + "GB", *size), Row(name + "tokens/s", f"{sum(lengths) / taken:,.0f}"),
            Row(name + "of the peak FLOP/s", share)]


@torch.no_grad()
def norm_errors(policy: Policy, samples: list[Sample], name: str) -> list[Row]:
    """Relative errors of norms, from the same hidden states: logits and delta^T h in bf16, or the product alone."""
    batch, kind = collate(samples, policy.device), policy.device.type
    in_bf16 = functools.partial(torch.autocast, kind, torch.bfloat16, cache_enabled=False)
    with in_bf16(enabled=kind == "cuda"):
        states = policy.model.base_model(batch["input_ids"], use_cache=False)
    is_target = batch["response_mask"][:, 1:]
    hidden, targets = states.last_hidden_state[:, :-1][is_target].float(), batch["input_ids"][:, 1:][is_target]
    lengths = is_target.sum(dim=1).tolist()
    exact = policy._head_norms(hidden, targets, lengths)[1]  # (samples,)
    with in_bf16():
        rounded, products = policy._head_norms(hidden, targets, lengths)[1], []
    for row_hidden, row_targets in zip(hidden.split(lengths), targets.split(lengths)):
        gradient = 0.0
        for h, y in zip(row_hidden.split(policy.head_chunk), row_targets.split(policy.head_chunk)):
            delta = policy._log_softmax(h).exp()
            delta[torch.arange(len(y), device=y.device), y] -= 1
            gradient = gradient + (delta.bfloat16().T @ h.bfloat16()).float()
        products.append(torch.linalg.norm(gradient))
    errors, product_errors = ((found / exact - 1).abs() for found in (rounded, torch.stack(products)))
    return [at_most(f"norms in bf16, {name}: mean error", errors.mean().item(), 0.02),
            Row(f"norms in bf16, {name}: largest error", f"{errors.max().item():.3g}"),
            at_most(f"delta^T h alone in bf16, {name}: largest error", product_errors.max().item(), 0.01)]


def norms(device, options) -> list[Row]:
    """What norms add to a forward pass of random weights, and their error there and on the toy's own responses."""
    policy, *_, samples = toy(device, flags())
    rows = norm_errors(policy, samples, "toy")
    config, args, _ = shape(device, checkpointing=True)  # all rows
    policy, samples = random_policy(config, args, device)
    batch = collate(samples, device)
    with torch.no_grad():
        without, taken = (seconds(functools.partial(call, **batch), device) for call in (policy, policy.logprobs_and_norms))
    return [*rows, *norm_errors(policy, samples, "random weights"),
            Row("norms, random weights: share of a forward pass", f"{taken / without - 1:.0%} of {without:.3g} s")]


def fsdp_equals_ddp(device, options) -> list[Row]:
    """What one update of the toy by SGD changes, with FSDP2 on one rank and with DDP."""
    args = flags("--updates-per-step", 1, "--grad-clip", 1e6)  # no clipping
    *_, problems, samples = toy(device, args)
    [trained], changes = raft.split_updates(problems, samples, args), []
    for fsdp in (False, True):
        args.fsdp, policy = fsdp, Policy(load_model(args, device)[0])
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        learner = distribute(policy, args.fsdp)
        raft.optimizer_step(learner, torch.optim.SGD(policy.parameters(), lr=1.0), trained, args, on_policy=True)
        changes.append([gather_tensor(p.detach()) - old for p, old in zip(policy.parameters(), before, strict=True)])
    worst = max(((b - a).abs().max() / a.abs().max()).item() for a, b in zip(*changes))
    return [at_most("FSDP2 against DDP, one rank: an update's changes", worst, 1e-4 if device.type == "cuda" else 1e-6)]


def vllm_draws(device, options) -> list[Row]:
    """A draw of the toy by vLLM: its log-probs, speed, weight sync and memory. Last: the engine stays."""
    if device.type != "cuda" or importlib.util.find_spec("vllm") is None:
        return [Row("vllm sampler", "skipped: needs CUDA and vllm")]
    with redirect_stdout(sys.stderr):
        _, sampler, _, samples = toy(device, flags("--vllm-memory", 0.3), 512, VllmSampler)
    start, prompts = time.perf_counter(), [sample.prompt_ids for sample in samples]
    drawn = sum(len(ids) for ids, *_ in sampler(prompts, list(range(len(prompts))), 1.0))
    speed, free = drawn / (time.perf_counter() - start), [torch.cuda.mem_get_info()[0]]  # bytes of the whole GPU
    start = time.perf_counter()
    sampler.sync()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    free.append(torch.cuda.mem_get_info()[0])
    sampler.llm.sleep(level=2)
    gaps = np.concatenate([np.abs(sample.old_logprobs - sample.sampler_logprobs) for sample in samples])
    return [at_most("vllm sampler: difference of log-probs, mean", gaps.mean(), 0.01),
            Row("vllm sampler: difference of log-probs, largest", f"{gaps.max():.3g}"),
            Row("vllm sampler: weight sync of the toy", f"{taken:.2f} s"),
            Row("vllm sampler: GB free asleep, awake", ", ".join(f"{size / 1e9:.2f}" for size in free)),
            Row("vllm sampler: tokens/s, a sync included", f"{speed:,.0f}")]


CHECKS = {
    "bf16": bf16_against_fp32, "RAFT++": raft_learns_and_resumes, "norms": norms, "FSDP2 against DDP": fsdp_equals_ddp,
    "update with checkpointing": functools.partial(training_cost, checkpointing=True),
    "update without checkpointing": functools.partial(training_cost, checkpointing=False), "vllm sampler": vllm_draws,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    parser.add_argument("--peak-tflops", type=run.number(float, low=1), help="of the GPU in bf16; H100 SXM: 989")


def main(argv=None) -> None:
    """Print the table; exit code 1 if a row is not ok."""
    options = run.parse_flags(argv, __doc__, add_flags)
    device, all_ok = run.join_ranks(), True
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", f"torch {torch.__version__}")
    print(LINE.format("check", "measured", "expected", "ok"), flush=True)
    for name, check in CHECKS.items():
        try:
            rows = check(device, options)
        except Exception as error:  # whatever a new machine brings; the other checks go on
            traceback.print_exc()
            rows = [Row(name, f"{type(error).__name__}: {error}".splitlines()[0][:120], "no error", False)]
        for row in rows:
            print(LINE.format(*row[:3], "yes" if row.ok else "NO"), flush=True)
        all_ok = all_ok and all(row.ok for row in rows)
        gc.collect()
        torch.cuda.empty_cache()  # nothing on a CPU
    sys.exit(0 if all_ok else 1)


if __name__ == "__main__":
    run.run_script(main)
