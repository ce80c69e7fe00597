"""What the vllm sampler costs: `python tests/bench_vllm.py [flags of raft.py] [--problems 8]`, with vLLM installed.

Response tokens a second of the hf sampler, of the vllm sampler, and of a bare `LLM.generate` on the same requests, and
the time of a weight sync: in one run, in turns, the best of three. --samples-per-prompt is the number for each problem.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import flags  # noqa: E402 (the project's modules lie one folder up)

from data import load_prompts  # noqa: E402
from pretrained import load_model  # noqa: E402
from run import join_ranks, run_script  # noqa: E402
from sampler import HfSampler, VllmSampler  # noqa: E402


def bare_generate(sampler: VllmSampler, requests: list[dict], count: int) -> list:
    """vLLM as its documentation has it: count samples of each request, seeded; no log-probs, no weight sync."""
    from vllm import SamplingParams

    settings = [SamplingParams(n=count, temperature=1.0, max_tokens=sampler.max_tokens, seed=1000 * i,
                               stop_token_ids=sampler.end_ids, detokenize=False) for i in range(len(requests))]
    outputs = sampler.llm.generate(requests, settings, use_tqdm=False)
    return [output.token_ids for request in outputs for output in request.outputs]


def main() -> None:
    """Print the table."""
    words, number = sys.argv[1:], 8
    if "--problems" in words:
        at = words.index("--problems")
        number, words = int(words[at + 1]), words[:at] + words[at + 2 :]
    args, device = flags(*words), join_ranks()
    model, tokenizer = load_model(args, device)
    problems, count = load_prompts(args.data, args.split, tokenizer, args, number, training=True), args.samples_per_prompt
    prompts = [problem.prompt_ids for problem in problems for _ in range(count)]
    seeds = list(range(count * len(problems)))
    hf, vllm = HfSampler(model, tokenizer, args), VllmSampler(model, tokenizer, args)

    def bare() -> list:
        vllm.llm.wake_up()
        drawn = bare_generate(vllm, [{"prompt_token_ids": problem.prompt_ids} for problem in problems], count)
        vllm.llm.sleep(level=2)  # empties the prefix cache, as the sampler does
        return drawn

    ways = {"hf sampler": lambda: [ids for ids, *_ in hf(prompts, seeds, 1.0)],
            "vllm sampler": lambda: [ids for ids, *_ in vllm(prompts, seeds, 1.0)], "bare vLLM": bare}
    speeds = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            start = time.perf_counter()
            drawn = way()
            speeds[name].append(sum(map(len, drawn)) / (time.perf_counter() - start))
    for name, found in speeds.items():
        print(f"{name:13s} {max(found):8.1f} tokens/s, {max(found) / max(speeds['bare vLLM']):.3f} of bare vLLM")
    syncs = []
    for _ in range(3):
        start = time.perf_counter()
        vllm.sync()
        syncs.append(time.perf_counter() - start)
        vllm.llm.sleep(level=2)
    print(f"weight sync   {1000 * min(syncs):8.1f} ms")


if __name__ == "__main__":
    run_script(main)
