"""Does it work on this GPU? In minutes; on a CPU a short form of it, for the script itself.

    python tests/gpu_check.py                                # one GPU; on an H100 add --peak-tflops 989
    torchrun --nproc-per-node 2 tests/gpu_check.py           # two: DDP, FSDP2, an engine each, save and resume

Prints a table as the checks go on, "check | measured | expected | ok", and exits with 1 if a row is not ok. It needs
torch and transformers only: answers are graded by comparing text; what needs vLLM or math-verify says "not run" where
it is not installed. On a CPU the toy's shape stands for that of 1.5B parameters, and the policy computes in fp32, so
bf16 is tried on norms and on the KL reference alone. Checks with an engine have a process of their own: seven engines
start, which takes most of the time. `--only "vllm seeds"` is one check alone.
"""

import argparse
import copy
import functools
import gc
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from gpu_rows import PlainGrader, Row, at_most, flags, not_run, random_policy, seconds, shape, toy  # first: sets the path

import memory  # the modules lie beside this one, and one folder up
import numpy as np
import torch
import torch.distributed as dist
from gpu_vllm import vllm_at_scale, vllm_draws, vllm_of_two, vllm_seeds
from safetensors.torch import load_file
from transformers import AutoTokenizer

import raft
import run
from batches import collate, distribute, fill_logprobs, gather_tensor
from checkpoint import RunState, load_optimizer, newest_checkpoint, save_checkpoint
from data import TOY, Sample
from losses import kl_k3
from model import Policy, linears_to_bf16
from pretrained import load_model

LINE = "{:66} | {:18} | {:14} | {}"


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


@torch.no_grad()
def reference_of_itself(device, options) -> list[Row]:
    """k3 of a policy against the KL reference that is made of it: 0, if only what autocast rounds was rounded."""
    config, args, _ = shape(device, checkpointing=True)
    policy, samples = random_policy(config, args, device)
    reference, batch = copy.deepcopy(policy).requires_grad_(False), collate(samples[:1], device)
    linears_to_bf16(reference.model)
    in_bf16 = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    with mock.patch.object(Policy, "_autocast", lambda _: in_bf16):  # on a CPU, too
        k3 = kl_k3(policy(**batch), reference(**batch))
    kinds = sorted({str(buffer.dtype) for buffer in reference.buffers()})
    return [at_most(f"KL reference of the policy itself, {len(k3)} tokens: largest k3", k3.max().item(), 1e-6),
            Row("KL reference: its buffers", ", ".join(kinds), "torch.float32", kinds == ["torch.float32"])]


def save_and_load(device, options) -> list[Row]:
    """Seconds of a checkpoint of the shape's model and AdamW's state: to save it, and to go on from it."""
    config, args, _ = shape(device, checkpointing=True)
    policy, samples = random_policy(config, args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=device.type == "cuda")
    raft.optimizer_step(distribute(policy), optimizer, samples[:1], args, on_policy=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_checkpoint(Path(folder), RunState(step=1), policy.model, optimizer, AutoTokenizer.from_pretrained(TOY), 1)
        saved = time.perf_counter()
        path, _ = newest_checkpoint(Path(folder))
        model, _ = load_model(args, device, path)
        load_optimizer(path, policy.model, optimizer)
        taken = saved - start, time.perf_counter() - saved
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    equal = all(map(torch.equal, policy.model.parameters(), model.parameters()))
    return [Row(f"a checkpoint of {size:.2f} GB is saved in", f"{taken[0]:.1f} s"),
            Row("... checked and loaded in", f"{taken[1]:.1f} s"),
            Row("... with the weights that were saved", str(equal), "True", equal)]


def raft_as_a_process(device, options) -> list[Row]:
    """raft.py as users run it, with a KL reference and vLLM where it is installed: two steps, then two more."""
    if importlib.util.find_spec("math_verify") is None:
        return [not_run("raft.py as a process", "math-verify")]
    sampler = "vllm" if importlib.util.find_spec("vllm") else "hf"
    script = Path(__file__).parents[1] / "raft.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, "--sampler", sampler, "--kl-coef", "0.001", "--eval-samples", "1",
                   "--vllm-memory", "0.3", "--out", f"{folder}/run"]
        for more in (["--steps", "2"], ["--steps", "4", "--resume"]):
            subprocess.run([*command, *more], check=True, stdout=sys.stderr, timeout=240)
        log = [json.loads(line) for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    steps, gap = [line["step"] for line in log], max(line["sampler_gap"] or 0.0 for line in log[1:])
    kl = log[1]["kl"]  # before the first update the policy is the reference
    return [Row(f"raft.py as a process, sampler {sampler}: steps in its log", str(steps), "[0, 1, 2, 3, 4]",
                steps == [0, 1, 2, 3, 4]),
            at_most("raft.py as a process: sampler_gap, largest", gap, 0.01),
            at_most("raft.py as a process: kl at step 1", abs(kl), 1e-6)]


# --- checks of two ranks --------------------------------------------------------------------------
def two_ranks_equal_one(device, options) -> list[Row]:
    """What one update of the toy by SGD changes, by DDP and FSDP2 on these ranks, and in a process without either."""
    args, rows = flags("--updates-per-step", 1, "--grad-clip", 1e6), []  # no clipping
    *_, problems, samples = toy(device, args)
    [trained] = raft.split_updates(problems, samples, args)
    alone = Policy(load_model(args, device)[0])
    raft.micro_batch_loss(alone, trained, args, on_policy=True)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in alone.parameters()])
    for fsdp in (False, True):
        policy = Policy(load_model(args, device)[0])
        before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
        learner = distribute(policy, fsdp)
        raft.optimizer_step(learner, torch.optim.SGD(policy.parameters(), lr=1.0), trained, args, on_policy=True)
        change = torch.cat([gather_tensor(p.detach()).flatten() for p in policy.parameters()]) - before
        error = ((change + gradient).norm() / gradient.norm()).item()
        name = "FSDP2" if fsdp else "DDP"
        rows.append(at_most(f"{name} on two ranks against one: relative error of an update", error,
                            0.02 if device.type == "cuda" else 1e-4))  # of numbers near 1 in fp32
    return rows


def two_ranks_save_and_resume(device, options) -> list[Row]:
    """Two steps of the toy on two ranks, and two more from the checkpoint."""
    folder = run.of_rank0(tempfile.mkdtemp())
    words = ["--sampler", "hf", "--eval-samples", "1", "--out", f"{folder}/run"]
    with redirect_stdout(sys.stderr), mock.patch("raft.Grader", PlainGrader):
        raft.main([*words, "--steps", "2"])
        raft.main([*words, "--steps", "4", "--resume"])
    steps = [json.loads(line)["step"] for line in Path(folder, "run", "log.jsonl").read_text().splitlines()]
    dist.barrier()
    run.on_rank0(shutil.rmtree, folder)
    return [Row("two ranks, resumed at step 2: steps in the log", str(steps), "[0, 1, 2, 3, 4]", steps == [0, 1, 2, 3, 4])]


CHECKS = {
    "bf16": bf16_against_fp32, "KL reference": reference_of_itself, "RAFT++": raft_learns_and_resumes, "norms": norms,
    "FSDP2 against DDP": fsdp_equals_ddp,
    "update with checkpointing": functools.partial(training_cost, checkpointing=True),
    "update without checkpointing": functools.partial(training_cost, checkpointing=False),
    "save and load": save_and_load, "raft.py": raft_as_a_process, "vllm sampler": vllm_draws, "vllm seeds": vllm_seeds,
    "vllm tied": functools.partial(vllm_at_scale, tied=True), "vllm untied": functools.partial(vllm_at_scale, tied=False),
}
CHECKS_OF_TWO = {"DDP and FSDP2": two_ranks_equal_one, "save and resume": two_ranks_save_and_resume, "vllm": vllm_of_two}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    parser.add_argument("--peak-tflops", type=run.number(float, low=1), help="of the GPU in bf16; H100 SXM: 989")
    parser.add_argument("--only", choices=CHECKS, help="one check, without the head of the table")


def rows_of(name: str, check, device, options) -> list[Row]:
    """A check's rows; if it raises, one that says so: the other checks go on."""
    try:
        return check(device, options)
    except Exception as error:  # whatever a new machine brings
        if dist.get_world_size() > 1:  # the other rank waits
            raise
        traceback.print_exc()
        return [Row(name, f"{type(error).__name__}: {error}".splitlines()[0][:120], "no error", False)]


def passes_in_own_process(name: str) -> bool:
    """Whether a check's rows, which another process prints, are ok: an engine would keep its memory in this one."""
    try:
        return subprocess.run([sys.executable, __file__, "--only", name], timeout=240).returncode == 0
    except subprocess.TimeoutExpired:
        print(LINE.format(name, "takes too long", "240 s", "NO"), flush=True)
        return False


def main(argv=None) -> None:
    """Print the table; exit code 1 if a row is not ok."""
    options = run.parse_flags(argv, __doc__, add_flags)
    device, all_ok = run.join_ranks(), True
    checks = CHECKS if dist.get_world_size() == 1 else CHECKS_OF_TWO
    if options.only:
        checks = {options.only: CHECKS[options.only]}
    else:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        run.print0(f"{machine} torch {torch.__version__}\n" + LINE.format("check", "measured", "expected", "ok"))
    for name, check in checks.items():
        if name.startswith("vllm ") and not options.only and importlib.util.find_spec("vllm"):
            all_ok = passes_in_own_process(name) and all_ok
            continue
        rows = rows_of(name, check, device, options)
        for row in rows:
            run.print0(LINE.format(*row[:3], "yes" if row.ok else "NO"))
        all_ok = all_ok and all(row.ok for row in rows)
        gc.collect()
        torch.cuda.empty_cache()  # nothing on a CPU
    sys.exit(0 if all_ok else 1)


if __name__ == "__main__":
    run.run_script(main)
