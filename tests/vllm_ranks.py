"""What test_vllm.py runs under torchrun: `vllm_ranks.py facts OUT`, written by rank 0, and `vllm_ranks.py fail OUT`."""

import json
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from conftest import flags, m_step

from batches import distribute, fill_logprobs
from data import Problem, encode_prompt, load_prompts
from grader import Grader
from model import Policy, load_model
from run import join_ranks, run_script
from sampler import HfSampler, draw, make_sampler

LONG = "1+" * 135  # with these, prompts share more than 256 tokens: eight blocks of vLLM's cache


def main() -> None:
    """Run the named part on this rank."""
    from vllm import SamplingParams

    part, out = sys.argv[1:]
    device = join_ranks()
    args = flags("--sampler", "vllm", "--max-prompt-tokens", 320, "--temperature", 0.8, "--loss", "raft")
    model, tokenizer = load_model(args, device)
    policy, sampler = Policy(model, args.temperature), make_sampler(model, tokenizer, args)
    problems = load_prompts(args.data, args.split, tokenizer, args, 9, training=True)
    long = [Problem(100 + i, f"{LONG}{i}", str(135 + i)) for i in range(2)]
    long = [replace(problem, prompt_ids=encode_prompt(tokenizer, problem)) for problem in long]
    many = [Problem(200 + i, f"{i}{LONG}1", str(136 + i)) for i in range(40)]  # nothing in common: more tokens than a batch
    many = [replace(problem, prompt_ids=encode_prompt(tokenizer, problem)) for problem in many]
    ddp_policy, optimizer = distribute(policy), torch.optim.AdamW(policy.parameters(), lr=1e-3)

    with Grader(workers=1) as grader:
        def sample(problems: list[Problem], counts: list[int], step: int) -> list:
            samples = draw(sampler, grader, problems, counts, seed_key=(0, 0, step),
                           temperature=args.temperature)
            fill_logprobs(policy, samples, args.tokens_per_micro_batch, into="old_logprobs")
            return samples

        def gap(samples: list) -> float:
            """The largest difference between the sampler's and the trainer's log-probs."""
            return float(max(np.abs(s.sampler_logprobs - s.old_logprobs).max() for s in samples))

        def greedy(one) -> list:
            drawn = draw(one, grader, problems[:5], [2] * 5, seed_key=(0, 0, 1), temperature=0.0)
            return [s.response_ids.tolist() for s in drawn]

        def train(samples: list) -> None:
            m_step(ddp_policy, optimizer, problems, samples, args)

        first = sample(problems, [4, 0, 1, 5, 2, 1, 2, 5, 2], 1)  # two ranks share out every problem
        if part == "fail" and dist.get_rank() == 1:
            raise RuntimeError("boom")
        facts = {"samples": [[s.problem, s.index, s.response_ids.tolist(), s.finished, s.reward] for s in first],
                 "greedy": [greedy(sampler), greedy(HfSampler(model, tokenizer, args))],
                 "alone": sample(problems[7:8], [1], 1)[0].response_ids.tolist(), "gap": gap(first)}
        crowd = sample(many, [1] * len(many), 1)
        facts |= {"prompt tokens": sum(len(s.prompt_ids) for s in crowd), "gap in a crowd": gap(crowd),
                  "last of a crowd": [crowd[-1].response_ids.tolist(), sample(many[-1:], [1], 1)[0].response_ids.tolist()]}
        train(first)
        facts |= {"gap after a step": gap(sample(problems, [4] * 9, 2)), "long gap": gap(sample(long, [2, 2], 2))}
        train(first)
        engine, sync = sampler.llm, sampler.sync
        engine.wake_up()
        twice = [{"prompt_token_ids": long[0].prompt_ids[:100]}] * 2
        one_token = SamplingParams(max_tokens=1, detokenize=False)
        facts |= {"spared of 100": [result.num_cached_tokens for result in engine.generate(twice, one_token)]}
        engine.sleep = engine.wake_up = lambda *_, **__: None  # sleeping would empty the prefix cache, too
        sampler.sync = lambda: None
        facts |= {"gap without sync": gap(sample(problems, [4] * 9, 3))}
        sampler.sync, reset, engine.reset_prefix_cache = sync, engine.reset_prefix_cache, lambda: True
        sample(long, [2, 2], 3)  # leaves its keys and values in the cache
        train(first)
        facts |= {"long gap without reset": gap(sample(long, [2, 2], 4))}
        engine.reset_prefix_cache = reset
        facts |= {"long gap with reset": gap(sample(long, [2, 2], 4))}
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(facts, file)


if __name__ == "__main__":
    run_script(main)
