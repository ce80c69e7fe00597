"""What the pieces cost, in one run, so that the numbers can be compared with each other.

    python tests/bench_speed.py                                # the toy
    python tests/bench_speed.py MODEL PROBLEMS                 # and another model, on a file of problems

Prints, for each model: gradient norms in closed form against one autograd call a sample; what the norms add to the
forward pass that yields the log-probs; trained tokens per second. And for 100,000 prompts, the weights by posterior,
and the allocation of 800,000 samples with its peak memory.
"""

import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from conftest import flags  # noqa: E402

from allocator import allocate  # noqa: E402
from batches import collate, distribute, micro_batches  # noqa: E402
from data import Sample, encode_prompt, load_problems  # noqa: E402
from model import Policy  # noqa: E402
from pretrained import load_model  # noqa: E402
from predictor import Predictor  # noqa: E402
from raft import optimizer_step  # noqa: E402
from run import join_ranks  # noqa: E402
from sampler import HfSampler  # noqa: E402


def seconds(function, repeats: int) -> float:
    """The fastest of some calls, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def draw_samples(model, tokenizer, args, number: int) -> list[Sample]:
    """One response to each of the first problems, all called right."""
    problems = load_problems(args.data)[:number]
    prompts = [encode_prompt(tokenizer, problem) for problem in problems]
    responses = HfSampler(model, tokenizer, args)(prompts, list(range(number)), 1.0)
    return [Sample(i, 0, ids, response, finished, reward=1.0, sampler_logprobs=logprobs)
            for i, (ids, (response, logprobs, finished)) in enumerate(zip(prompts, responses))]


def norms_by_autograd(policy: Policy, samples: list[Sample]) -> list[float]:
    """The head's gradient norm, one forward and backward pass a sample."""
    head, norms = policy.model.get_output_embeddings().weight, []
    for sample in samples:
        logprobs = policy(**collate([sample], head.device))
        norms.append(torch.autograd.grad(-logprobs.sum(), head)[0].norm().item())
    return norms


def forward(policy: Policy, samples: list[Sample], budget: int, norms: bool) -> list[float]:
    """Log-probs of all samples without gradients, and their norms on request."""
    found = [0.0] * len(samples)
    with torch.no_grad():
        for rows in micro_batches([sample.total_tokens for sample in samples], 1, budget)[0]:
            batch = collate([samples[i] for i in rows], torch.device("cpu"))
            values = policy.logprobs_and_norms(**batch)[1] if norms else [policy(**batch).sum()] * len(rows)
            for i, value in zip(rows, values):
                found[i] = float(value)
    return found


def bench_model(name: str, args, number: int, repeats: int) -> None:
    """Print the costs of one model."""
    model, tokenizer = load_model(args, torch.device("cpu"))
    policy = Policy(model)
    samples = draw_samples(model, tokenizer, args, number)
    tokens = sum(len(sample.response_ids) for sample in samples)
    budget = args.tokens_per_micro_batch
    autograd = seconds(lambda: norms_by_autograd(policy, samples), repeats)
    with_norms = seconds(lambda: forward(policy, samples, budget, norms=True), repeats)
    without = seconds(lambda: forward(policy, samples, budget, norms=False), repeats)
    closed, exact = np.array(forward(policy, samples, budget, True)), np.array(norms_by_autograd(policy, samples))
    for sample in samples:
        sample.old_logprobs = np.full(len(sample.response_ids), -1.0, np.float32)
        sample.advantage = sample.loss_weight = 1.0
    ddp_policy, optimizer = distribute(policy), torch.optim.AdamW(policy.parameters(), lr=0.0)
    trained = seconds(lambda: optimizer_step(ddp_policy, optimizer, samples, args, on_policy=False), repeats)
    print(f"{name}: {number} samples, {tokens} response tokens, {torch.get_num_threads()} threads")
    print(f"  log-prob forward              {without:8.3f} s")
    print(f"  with closed-form norms        {with_norms:8.3f} s   +{with_norms / without - 1:.0%}")
    print(f"  one autograd call a sample    {autograd:8.3f} s   {autograd / with_norms:.1f}x the line above")
    # A tied head's autograd gradient has the embedding's input path as well, which the closed form leaves out.
    print(f"  correlation of log norms      {np.corrcoef(np.log(closed), np.log(exact))[0, 1]:8.3f}")
    print(f"  training                      {tokens / trained:8.0f} response tokens a second")


def bench_allocator() -> None:
    """Print what a prediction takes, and time and peak memory for a hundred thousand prompts."""
    generator, ones = np.random.default_rng(0), np.ones(4096)
    right = generator.binomial(2, generator.beta(0.5, 0.5, 4096))
    predictor = Predictor({})
    features = predictor.features(generator.normal(size=(4096, 256)))

    def predict_and_learn() -> None:
        predictor.predict(features)
        predictor.learn(features, right, 2 * ones)

    print(f"Predictor: 4,096 prompts, 256 numbers of each, predicted and learnt from: {seconds(predict_and_learn, 3):.2f} s")
    weights = np.exp(2 * generator.normal(size=100_000))
    taken = seconds(lambda: allocate(weights, 800_000), 3)
    tracemalloc.start()
    allocate(weights, 800_000)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(f"allocate: 100,000 prompts, 800,000 samples: {taken:.2f} s, {peak:.0f} MiB at the peak")


def main() -> None:
    """Run every part."""
    bench_allocator()
    join_ranks()
    bench_model("toy", flags(), number=128, repeats=5)
    if len(sys.argv) == 3:
        words = ["--model", sys.argv[1], "--data", sys.argv[2], "--max-prompt-tokens", 512,
                 "--max-response-tokens", 128, "--tokens-per-micro-batch", 2048]
        bench_model(sys.argv[1], flags(*words), number=12, repeats=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
