"""The checks of gpu_check.py that need vLLM; as a script, `gpu_vllm.py OUT`, what one of them runs in another process."""

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from gpu_rows import PlainGrader, Row, at_most, flags, not_run, random_policy, shape, toy  # first: it sets the path

import run
from batches import distribute, fill_logprobs
from data import EVALUATION, Sample, load_prompts
from model import Policy
from pretrained import load_model
from sampler import VllmSampler, draw


def is_missing() -> bool:
    """Whether vLLM is not installed."""
    return importlib.util.find_spec("vllm") is None


def free_memory(device) -> float:
    """GB that are free on the whole GPU; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] / 1e9 if device.type == "cuda" else 0.0


def vllm_draws(device, options) -> list[Row]:
    """A draw of the toy by vLLM: its log-probs, speed, weight sync and memory."""
    if is_missing():
        return [not_run("vllm sampler", "vllm")]
    with redirect_stdout(sys.stderr):
        # With --truncated-is every sample has the sampler's log-probs.
        _, sampler, _, samples = toy(device, flags("--vllm-memory", 0.3, "--truncated-is", 2), 512, VllmSampler)
    start, prompts = time.perf_counter(), [sample.prompt_ids for sample in samples]
    drawn = sum(len(ids) for ids, *_ in sampler(prompts, list(range(len(prompts))), 1.0))
    speed, free = drawn / (time.perf_counter() - start), [free_memory(device)]
    start = time.perf_counter()
    sampler.sync()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    free.append(free_memory(device))
    sampler.llm.sleep(level=2)
    gaps = np.concatenate([np.abs(sample.old_logprobs - sample.sampler_logprobs) for sample in samples])
    return [at_most("vllm sampler: difference of log-probs, mean", gaps.mean(), 0.01),
            Row("vllm sampler: difference of log-probs, largest", f"{gaps.max():.3g}"),
            Row("vllm sampler: weight sync of the toy", f"{taken:.2f} s"),
            Row("vllm sampler: GB free asleep, awake", ", ".join(f"{size:.2f}" for size in free)),
            Row("vllm sampler: tokens/s, a sync included", f"{speed:,.0f}")]


def three_draws(device) -> list[list]:
    """Token ids of 64 responses of the toy: by seeds, by the same seeds again, by others."""
    with redirect_stdout(sys.stderr):
        args = flags("--vllm-memory", 0.3)
        model, tokenizer = load_model(args, device)
        sampler = VllmSampler(model, tokenizer, args)
    prompts = [problem.prompt_ids for problem in load_prompts(args.data, args.split, tokenizer, args, 64, training=True)]
    # At a temperature at which hardly any text comes twice.
    return [[ids.tolist() for ids, *_ in sampler(prompts, list(range(first, first + 128, 2)), 2.0)]
            for first in (0, 0, 1000)]


def vllm_seeds(device, options) -> list[Row]:
    """Texts of the same seeds, in this process and in another; and of other seeds."""
    if is_missing():
        return [not_run("vllm seeds", "vllm")]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, f"{folder}/out"], check=True, stdout=sys.stderr, timeout=200)
        [there, *_] = json.loads(Path(folder, "out").read_text())
    first, again, others = three_draws(device)
    same = 0.5 if device.type == "cuda" else 1.0  # in bf16 rounding may tip a token
    rows = []
    for name, found in (("again", again), ("in another process", there)):
        share = np.mean([one == other for one, other in zip(first, found)])
        rows.append(Row(f"vllm, the same seeds {name}: equal texts", f"{share:.2f}", f">= {same}", bool(share >= same)))
    share = np.mean([one == other for one, other in zip(first, others)])
    return [*rows, at_most("vllm, other seeds: equal texts", share, 0.3)]


def vllm_at_scale(device, options, tied: bool) -> list[Row]:
    """Random weights of the shape in an engine: three rounds of changed weights, and how fast it decodes."""
    if is_missing():
        return [not_run(f"vllm, {'tied' if tied else 'untied'} head", "vllm")]
    config, args, _ = shape(device, checkpointing=True)
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    policy, _ = random_policy(config, args, device)
    policy.model.generation_config.eos_token_id = [1]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config.architectures = [type(policy.model).__name__]
        config.save_pretrained(folder)
        args.model, args.vllm_memory, args.truncated_is = folder, 0.4, 2.0  # for every sample's log-probs
        sampler = VllmSampler(policy.model, None, args)
    name, rng = f"vllm, {'tied' if tied else 'untied'} head", np.random.default_rng(0)
    prompts = [rng.integers(3, config.vocab_size, 50).tolist() for _ in range(32)]
    sampler.max_tokens, gaps, stale, free = 64, [], [], []
    for _ in range(3):
        samples = [Sample(i, 0, ids, response.ids, True, sampler_logprobs=response.logprobs) for i, (ids, response)
                   in enumerate(zip(prompts, sampler(prompts, list(range(0, 64, 2)), 1.0)))]
        free.append(free_memory(device))
        gaps.append(gap(policy, samples))
        with torch.no_grad():
            for parameter in policy.parameters():  # an update, and a large one
                parameter.add_(torch.randn_like(parameter) * 0.01)
        stale.append(gap(policy, samples))
    least = 0.05 if device.type == "cuda" else 1e-3
    rows = [at_most(f"{name}, three updates: largest gap of log-probs", max(gaps),
                    0.02 if device.type == "cuda" else 1e-4),
            Row(f"{name}: least gap to the weights from before", f"{min(stale):.3g}", f">= {least}", min(stale) >= least),
            at_most(f"{name}: GB that do not come back when it sleeps", max(free) - min(free), 0.5)]
    return rows + (decoding_speeds(sampler, prompts, device) if tied else [])


def gap(policy: Policy, samples: list[Sample]) -> float:
    """The mean difference between the sampler's and the trainer's log-probs."""
    fill_logprobs(policy, samples, 16384, into="old_logprobs")
    return float(np.concatenate([np.abs(s.old_logprobs - s.sampler_logprobs) for s in samples]).mean())


def decoding_speeds(sampler: VllmSampler, prompts: list, device) -> list[Row]:
    """Tokens a second with so many requests at once, with log-probs and without: what Python and the GPU cost."""
    from vllm import SamplingParams

    sampler.sync()
    rows, length = [], 256 if device.type == "cuda" else 16
    for slots in (256, 512, 1024) if device.type == "cuda" else (16, 32):
        for logprobs in (0, None):
            requests = [{"prompt_token_ids": prompts[i % len(prompts)]} for i in range(slots)]
            params = [SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, seed=i, logprobs=logprobs)
                      for i in range(slots)]
            start = time.perf_counter()
            sampler.llm.generate(requests, params, use_tqdm=False)
            speed = slots * length / (time.perf_counter() - start)
            with_or_without = "without" if logprobs is None else "with"
            rows.append(Row(f"vllm, {slots} requests at once, {with_or_without} log-probs: tokens/s", f"{speed:,.0f}"))
    sampler.llm.sleep(level=2)
    return rows


def vllm_of_two(device, options) -> list[Row]:
    """An engine on each rank, that gets its weights from a policy which FSDP2 has spread over both."""
    if is_missing():
        return [not_run("vllm with FSDP2 on two ranks", "vllm")]
    with redirect_stdout(sys.stderr):
        args = flags("--vllm-memory", 0.3, "--truncated-is", 2)
        model, tokenizer = load_model(args, device)
        policy = Policy(model)
        distribute(policy, shard=True)
        sampler = VllmSampler(model, tokenizer, args)
        problems = load_prompts(args.data, args.split, tokenizer, args, 64, training=True)
    samples = draw(sampler, PlainGrader(), problems, [2] * 64, seed_key=(0, EVALUATION, 0), temperature=1.0)
    return [at_most("vllm with FSDP2 on two ranks: gap of log-probs, mean", gap(policy, samples),
                    0.01 if device.type == "cuda" else 1e-4)]


if __name__ == "__main__":
    drawn = three_draws(run.join_ranks())
    Path(sys.argv[1]).write_text(json.dumps(drawn))
