"""What tests run under torchrun: `ranks.py draw OUT` and `ranks.py update OUT BUDGET`; rank 0 writes OUT."""

import json
import sys

import torch
import torch.distributed as dist
from conftest import flags, make_sample

from data import Grader, Problem
from eval import HfSampler, draw, load_model, load_prompts, setup
from grpo import compare_groups
from gvm import Policy, score
from raft import keep_right, train_step


def toy_samples(tokenizer) -> list:
    """Right and wrong chains of unequal lengths for seven prompts; problem 3 is never solved."""
    chains = ["4+3=7;\\boxed{7}", "7-4=3;3+30=33;\\boxed{33}", "2+2=4;4+4=8;8-1=7;\\boxed{7}", "\\boxed{1}", "9-8=2;"]
    samples = []
    for i in range(24):
        response = tokenizer.encode(chains[i % 5]) + [tokenizer.eos_token_id]
        prompt = tokenizer.encode("<|user|>4+3" + "+1" * (i % 4) + "<|assistant|>")
        samples.append(make_sample(i % 7, float(i % 3 > 0 and i % 7 != 3), response, prompt))
    return samples


def one_update(samples: list, objective, args) -> dict:
    """Gradients and, after an SGD step, parameters of a fresh toy; keyed by name."""
    model, tokenizer = load_model(args, torch.device("cpu"))
    policy, reference = Policy(model), Policy(load_model(args, torch.device("cpu"))[0])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    score(policy, samples, args.tokens_per_micro_batch)
    for sample in samples:  # off-policy, so that ratios and clips matter
        sample.old_logprobs = sample.old_logprobs + 0.3 * (sample.problem - 3)
    with torch.no_grad():  # and away from the reference
        reference.model.get_output_embeddings().weight.mul_(0.9)
    problems = [Problem(i, "", "") for i in range(7)]
    figures = train_step(policy, reference, optimizer, samples, problems, objective, args)
    tensors = {f"gradient {name}": p.grad.clone() for name, p in policy.named_parameters()}
    return tensors | {name: p.detach().clone() for name, p in policy.named_parameters()} | figures


def main() -> None:
    """Run the named part on this rank."""
    part, out, *rest = sys.argv[1:]
    device = setup()
    args = flags("--kl-coef", 0.1, "--grad-clip", 1e9, "--updates-per-step", 1, *rest)
    model, tokenizer = load_model(args, device)
    if part == "draw":
        with Grader(1) as grader:
            problems = load_prompts(args.data, args.split, tokenizer, args, 9)
            sampler, counts = HfSampler(model, tokenizer, args), [3, 0, 1, 4, 1, 1, 2, 7, 2]
            samples = draw(sampler, grader, problems, counts, (0, 0, 1), 1.0)
        result = json.dumps([[s.problem, s.index, s.response_ids.tolist(), s.reward] for s in samples])
        if dist.get_rank() == 0:
            with open(out, "w", encoding="utf-8") as file:
                file.write(result)
    else:
        samples = toy_samples(tokenizer)
        single = [sample for sample in samples if sample.reward > 0][:1]  # leaves every rank but one without a sample
        results = {"raft": one_update(samples, keep_right, args), "single": one_update(single, keep_right, args),
                   "grpo": one_update(samples, compare_groups, args)}
        if dist.get_rank() == 0:
            torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
