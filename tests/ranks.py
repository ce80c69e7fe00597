"""What tests run under torchrun: `ranks.py draw OUT`, `update OUT FLAGS`, `save OUT FLAGS`, `k3 OUT FLAGS`, `fail OUT`, `differ OUT`.

Rank 0 writes OUT."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import flags, m_step, make_sample
from transformers import AutoTokenizer

import grpo
from batches import distribute, fill_logprobs, fill_norms, gather_tensor, prompt_states
from checkpoint import load_optimizer, newest_checkpoint, save_checkpoint
from data import Problem, load_prompts
from folder import compare_problems
from grader import Grader
from losses import kl_k3
from model import Policy, linears_to_bf16, load_reference
from pretrained import load_model
from raft import split_updates, train_step
from run import InputError, gather, join_ranks, on_every_rank, run_script
from sampler import HfSampler, draw

PLACE = ("WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells a rank


def toy_samples(tokenizer) -> list:
    """Right and wrong chains of unequal lengths for seven prompts; problem 3 is never solved."""
    chains = ["4+3=7;\\boxed{7}", "7-4=3;3+30=33;\\boxed{33}", "2+2=4;4+4=8;8-1=7;\\boxed{7}", "\\boxed{1}", "9-8=2;"]
    samples = []
    for i in range(24):
        response = tokenizer.encode(chains[i % 5]) + [tokenizer.eos_token_id]
        prompt = tokenizer.encode("<|user|>4+3" + "+1" * (i % 4) + "<|assistant|>")
        samples.append(make_sample(i % 7, float(i % 3 > 0 and i % 7 != 3), response, prompt))
        if i % 4 > 1:  # the sampler was not asked
            samples[-1].sampler_logprobs = None
    return samples


def one_update(samples: list, args) -> dict:
    """Of a fresh toy: log-probs, norms, gradients and, after an SGD step, parameters, keyed by name; and metrics."""
    policy = Policy(load_model(args, torch.device("cpu"))[0])
    reference = Policy(load_model(args, torch.device("cpu"))[0])
    with torch.no_grad():  # away from the reference
        reference.model.get_output_embeddings().weight.mul_(0.9)
    learner = distribute(policy, args.fsdp)
    if args.fsdp:
        distribute(reference, args.fsdp)
    optimizer, gradients = torch.optim.SGD(policy.parameters(), lr=0.1), {}
    optimizer.register_step_pre_hook(lambda *_: gradients.update(
        {f"gradient {name}": gather_tensor(p.grad).clone() for name, p in policy.named_parameters()}))
    fill_norms(policy, samples, args.tokens_per_micro_batch)
    prompts = [Problem(i, "", "", prompt_ids=samples[0].prompt_ids + [5] * i) for i in range(9)]
    scored = {"prompt states": torch.from_numpy(prompt_states(policy, prompts, args.tokens_per_micro_batch)),
              "gradient norms": torch.tensor([sample.head_grad_norm for sample in samples]),
              "log-probs": torch.from_numpy(np.concatenate([sample.old_logprobs for sample in samples]))}
    for sample in samples:  # off-policy, so that ratios and clips matter
        sample.old_logprobs = sample.old_logprobs + 0.3 * (sample.problem - 3)
    problems = [Problem(i, "", "") for i in range(7)]
    updates = [[], *split_updates(problems, samples, args)]  # the first would be on-policy: it is left empty
    fill_logprobs(reference, updates[1], args.tokens_per_micro_batch, into="ref_logprobs")
    metrics = train_step(learner, optimizer, updates, args)
    assert all((p.grad is None) == args.fsdp for p in policy.parameters())  # DDP's buckets stay
    parameters = {name: gather_tensor(p.detach()).clone() for name, p in policy.named_parameters()}
    return scored | gradients | parameters | metrics


def update_and_save(out: Path, args) -> None:
    """One update, and a checkpoint of it as OUT/checkpoints/step-000001; or one more update, from there."""
    checkpoint, state = newest_checkpoint(out)
    model, tokenizer = load_model(args, torch.device("cpu"), checkpoint)
    policy = Policy(model)
    learner, optimizer = distribute(policy, args.fsdp), torch.optim.AdamW(policy.parameters(), lr=1e-3)
    if checkpoint:
        load_optimizer(checkpoint, model, optimizer)
    m_step(learner, optimizer, [Problem(i, "", "") for i in range(7)], toy_samples(tokenizer), args)
    state.step = max(state.step, 0) + 1
    save_checkpoint(out, state, model, optimizer, tokenizer, 2)


def k3_of_itself(args) -> dict:
    """The largest k3 of a fresh toy against its reference, in bf16 as on CUDA."""
    Policy._autocast = lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    policy, reference = Policy(load_model(args, torch.device("cpu"))[0]), load_reference(args, torch.device("cpu"))
    linears_to_bf16(reference.model)
    for one in (policy, reference):
        distribute(one, args.fsdp)
    samples = toy_samples(AutoTokenizer.from_pretrained(args.model))
    fill_logprobs(policy, samples, args.tokens_per_micro_batch, into="old_logprobs")
    fill_logprobs(reference, samples, args.tokens_per_micro_batch, into="ref_logprobs")
    pairs = [(torch.from_numpy(s.old_logprobs), torch.from_numpy(s.ref_logprobs)) for s in samples]
    found = torch.cat([kl_k3(*pair) for pair in pairs])
    in_bf16 = [name for name, tensor in reference.named_parameters() if tensor.dtype == torch.bfloat16]
    return {"tokens": len(found), "largest": found.max().item(), "in bf16": len(in_bf16)}


def lack_the_model() -> None:
    """As if --model were missing on rank 1."""
    if dist.get_rank() == 1:
        raise InputError("--model here: is missing")


def main() -> None:
    """Run the named part on this rank."""
    part, out, *rest = sys.argv[1:]
    device = join_ranks()
    if part == "fail":
        on_every_rank(lack_the_model)
    if part == "differ":
        compare_problems({}, {"data": [Problem(0, "1+1", str(2 + dist.get_rank()))]})
    words = ["--kl-coef", 0.1, "--grad-clip", 1e9, "--updates-per-step", 1, *rest]
    args = flags(*words)
    model, tokenizer = load_model(args, device)
    if part == "draw":
        with Grader(workers=1) as grader:
            problems = load_prompts(args.data, args.split, tokenizer, args, 9, training=True)
            sampler, counts = HfSampler(model, tokenizer, args), [40, 0, 12, 50, 12, 11, 25, 85, 21]
            samples = draw(sampler, grader, problems, counts, seed_key=(0, 0, 1), temperature=1.0)
        result = json.dumps([[s.problem, s.index, s.response_ids.tolist(), s.reward] for s in samples])
        if dist.get_rank() == 0:
            with open(out, "w", encoding="utf-8") as file:
                file.write(result)
    elif part == "k3":
        result = k3_of_itself(args)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(result))
    elif part == "save":
        update_and_save(Path(out), args)
    else:
        samples = toy_samples(tokenizer)
        single = [sample for sample in samples if sample.reward > 0][:1]  # leaves every rank but one without a sample
        results = {"raft": one_update(samples, args), "single": one_update(single, args),
                   "grpo": one_update(samples, flags(*words, add_flags=grpo.add_flags)),
                   "places": gather([{name: int(os.environ.get(name, "-1")) for name in PLACE}])}  # by rank
        if dist.get_rank() == 0:
            torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
