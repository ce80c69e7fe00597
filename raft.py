"""RAFT and RAFT++ with GVM sampling: the M-step and the training loop. The main script.

    torchrun raft.py                                      # the toy, on a CPU, in a minute
    torchrun raft.py --allocator uniform                  # what GVM is compared with
    torchrun --nproc-per-node 8 raft.py ...               # the paper's run: see README.md

One step, as `train` calls it:
    e_step            in gvm.py: samples are drawn where they help, and graded
    prepare_updates   each sample gets what losses.py needs: advantage, weight, old log-probs
    train_step        an optimizer step on each update's samples
"""

import argparse
from collections import Counter
from contextlib import suppress
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import run
from batches import add_memory_flags, collate, distribute, fill_logprobs, gather_tensor
from batches import micro_batches_here, per_token
from checkpoint import load_optimizer, newest_checkpoint, save_checkpoint
from data import BENCHMARKS, Problem, Sample, add_data_flags, check_prompts, load_prompts
from data import prompts_looked_at
from eval import add_evaluation_flags, evaluate
from folder import LEFT_BY_A_RUN, RunState, add_folder_flags, claim_folder, note_problems
from folder import refuse_other_model, run_folder, say_finished, say_saved, start_log, watch_run
from folder import write_log, write_samples
from grader import REWARDS, Grader, add_reward_flags
from gvm import SampleSource, add_budget_flags, e_step, settle_budget
from losses import LOSSES, OBJECTIVES, add_loss_flags, kl_k3, loss_weights
from model import Policy, load_reference
from pretrained import add_model_flags, load_model
from sampler import add_sampler_flags, make_sampler


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of this script: those of its modules, and of the optimisation."""
    for add_part in (add_model_flags, add_data_flags, add_sampler_flags, add_reward_flags,
                     add_budget_flags, add_loss_flags, add_memory_flags, add_evaluation_flags,
                     add_folder_flags):
        add_part(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=run.number(int, 1, 999_999), default=60, help="draws, each with updates")
    add("--updates-per-step", type=run.positive_int, default=1, help="the paper: 4")
    number = partial(run.number, float)
    add("--lr", type=number(0, 1), default=3e-4, help="of AdamW, constant; the paper: 1e-6")
    add("--weight-decay", type=number(0, 1000), default=0.01, help="of AdamW")
    add("--grad-clip", type=number(1e-6, 10**9), default=1.0, help="largest gradient norm")


def train(args: argparse.Namespace) -> None:
    """The whole run: evaluate; then draw, update, evaluate, save; and again."""
    stop, device = run.StopSignal(), run.join_ranks()
    run.on_every_rank(settle_budget, args, args.objective)
    out = run_folder(args)
    lock = claim_folder(out, LEFT_BY_A_RUN, args.resume)
    checkpoint, state = newest_checkpoint(out) if args.resume else (None, RunState())
    if state.step >= args.steps:
        say_finished(out, state, checkpoint, args)
        return
    policy, reference, learner, optimizer, tokenizer, problems, eval_problems = set_up(
        args, device, checkpoint, state)

    with lock, Grader(REWARDS[args.reward]) as grader:
        sampler = make_sampler(policy.model, tokenizer, args)
        source = SampleSource(policy, sampler, grader, args, stop, state.timer)
        accuracy = partial(evaluate, sampler, grader, eval_problems, args, state.timer)
        save = partial(save_checkpoint, out, state, policy.model, optimizer, tokenizer, args.keep)
        run.on_rank0(start_log, out, args, state)
        if state.step < 0:  # a fresh run: step 0 is the model as it is
            state.step = 0
            run.on_rank0(write_log, out, state, {} if stop.on_any_rank() else accuracy())

        with suppress(run.Stopped):  # from e_step, after a signal: the step is given up
            for step in tqdm(range(state.step + 1, args.steps + 1), disable=dist.get_rank() > 0):
                # E-step: the step's problems, and graded samples, more of some than of others.
                with state.timer("sample"):
                    batch, samples, metrics = e_step(problems, step, state, source, args)

                # For each update its samples, now with advantages, weights and log-probs.
                with state.timer("score"):
                    updates = prepare_updates(policy, reference, batch, samples, args)

                # M-step: the policy after an optimizer step on each of them.
                with state.timer("train"):
                    metrics |= train_step(learner, optimizer, updates, args, not state.last_update)
                state.step = step

                # The accuracy on other problems; what is logged of the step; a checkpoint.
                if (step % args.eval_every == 0 or step == args.steps) and not stop.on_any_rank():
                    metrics |= accuracy()
                run.on_rank0(write_log, out, state, metrics)
                run.on_rank0(write_samples, out, state, batch[: args.keep_samples], samples)
                run.on_every_rank(watch_run, state, metrics, args)
                if step % args.save_every == 0:
                    with state.timer("save"):
                        save()
        save()  # the last step, or the last before a signal
    say_saved(out, state)


def set_up(args: argparse.Namespace, device: torch.device, checkpoint, state: RunState) -> tuple:
    """What `train` works on: models, the optimizer, the tokenizer, problems to train and evaluate.

    learner: the policy, in the form that all ranks train. reference: None without --kl-coef.
    """
    # The reference first: on a GPU it is in bf16, with --fsdp sharded as well, before the policy
    # comes. So no GPU holds two whole models in fp32.
    reference = run.on_every_rank(load_reference, args, device) if args.kl_coef > 0 else None
    if reference and args.fsdp:
        distribute(reference, args.fsdp)
    policy, tokenizer, problems, eval_problems = run.on_every_rank(load, args, device, checkpoint)
    note_problems(state, {args.data: problems, args.eval_data: eval_problems})
    learner = distribute(policy, args.fsdp)
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, fused=device.type == "cuda",
                                  weight_decay=args.weight_decay)
    if checkpoint:
        load_optimizer(checkpoint, policy.model, optimizer)
    return policy, reference, learner, optimizer, tokenizer, problems, eval_problems


def load(args: argparse.Namespace, device: torch.device, checkpoint) -> tuple:
    """What a rank loads by itself: policy, tokenizer, problems, those to evaluate."""
    if BENCHMARKS.keys() & set(args.data.split(",")):
        raise run.InputError(f"--data {args.data}: is there to evaluate; train on another one")
    model, tokenizer = load_model(args, device, checkpoint)
    policy = Policy(model, args.temperature, args.gradient_checkpointing)
    problems = load_prompts(args.data, args.split, tokenizer, args, training=True)
    eval_problems = load_prompts(args.eval_data, args.eval_split, tokenizer, args, training=False)
    check_prompts(model, problems + eval_problems)
    most = len(problems)
    if not args.updates_per_step <= args.prompts_per_step <= prompts_looked_at(args) <= most:
        raise run.InputError("--prompts-per-step: from --updates-per-step to --candidates-per-step,"
                             f" if set, which is at most {most}, the number of problems")
    return policy, tokenizer, problems, eval_problems


# --- before the updates of a step ----------------------------------------------------------------
def prepare_updates(policy, reference, problems, samples, args) -> list[list[Sample]]:
    """split_updates, with the log-probs of the policy before all updates, and of the reference."""
    updates, max_tokens = split_updates(problems, samples, args), args.tokens_per_micro_batch
    # The first update is on-policy and computes them itself; a pilot's came with its norms.
    later = [sample for sample in sum(updates[1:], []) if sample.old_logprobs is None]
    fill_logprobs(policy, later, max_tokens, into="old_logprobs")
    if reference is not None:
        fill_logprobs(reference, sum(updates, []), max_tokens, into="ref_logprobs")
    return updates


def split_updates(problems: list[Problem], samples: list[Sample], args) -> list[list[Sample]]:
    """The samples to train on in each update, with advantage and loss_weight filled in."""
    updates, ids = [], [problem.id for problem in problems]
    for chosen in map(set, np.array_split(ids, args.updates_per_step)):
        part = [sample for sample in samples if sample.problem in chosen]
        advantages, used = OBJECTIVES[args.objective].advantages(part, args)
        weights = loss_weights(part, used, len(chosen), args.weighting)
        if args.mask_truncated:  # no loss; they still count in |D_i|, mean(T) and the baseline
            weights = weights * [sample.finished for sample in part]
        for sample, advantage, weight in zip(part, advantages, weights):
            sample.advantage, sample.loss_weight = advantage, weight
        # Without an advantage the loss has no gradient; the KL has one.
        updates.append([s for s in part if s.loss_weight > 0 and (s.advantage or args.kl_coef)])
    return updates


# --- the updates ---------------------------------------------------------------------------------
def train_step(learner, optimizer, updates: list[list[Sample]], args, is_first=False) -> dict:
    """The updates of a step; returns metrics for the log, means over those that were made.

    is_first: the run has made no update yet. sampler_gap: over tokens whose sampler_logprobs are
    known, None without any.
    """
    sums = Counter()  # a name that is missing counts 0
    for i, samples in enumerate(updates):
        check_gap = is_first and not sums["compared"] and args.truncated_is is None
        sums.update(optimizer_step(learner, optimizer, samples, args, i == 0, check_gap))
    if args.fsdp:  # frees memory; DDP's gradients cannot go, as optimizer_step says
        optimizer.zero_grad()
    for name in ("loss", "kl", "clip_fraction", "grad_norm"):
        sums[name] = sums[name] / sums["updates"] if sums["updates"] else None
    gaps, compared = sums.pop("gaps", 0.0), sums.pop("compared", 0)
    return dict(sums) | {"sampler_gap": gaps / compared if compared else None}


def optimizer_step(learner, optimizer, samples: list[Sample], args, on_policy: bool,
                   check_gap: bool = False) -> dict:
    """One optimizer step on the samples of an update; returns what train_step adds up.

    on_policy: no update of the step has changed the policy yet. check_gap: raise RunError, before
    the policy changes, if the sampler has another model. gaps: a sum over `compared` tokens.
    """
    if not samples:
        return {"updates_empty": 1}  # on a gradient of 0 AdamW would still move
    ranks, num_tokens = dist.get_world_size(), sum(len(s.response_ids) for s in samples)
    totals = torch.zeros(5, dtype=torch.float64)  # of micro_batch_loss
    learner.train()
    optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets: keep them
    batches = list(micro_batches_here(samples, args.tokens_per_micro_batch))
    for i, (indices, batch) in enumerate(batches, start=1):
        # DDP's ranks talk once an update. (FSDP2 ignores this: its ranks talk in every pass.)
        learner.require_backward_grad_sync = i == len(batches)
        sums = micro_batch_loss(learner, batch, args, on_policy)
        is_real = float(bool(indices))  # else it is a pass for the other ranks' sake
        (is_real * ranks * sums[0]).backward()  # times ranks: DDP takes the mean of gradients
        totals += is_real * sums.detach().cpu()
    dist.all_reduce(totals)
    norm = gather_tensor(torch.nn.utils.clip_grad_norm_(learner.parameters(), args.grad_clip))
    if not torch.isfinite(norm):
        return {"updates_not_finite": 1}
    loss, clipped, kl, gaps, compared = totals.tolist()
    if check_gap and compared:
        run.on_every_rank(refuse_other_model, gaps / compared)
    optimizer.step()
    return {"updates": 1, "grad_norm": norm.item(), "loss": loss, "kl": kl / num_tokens,
            "clip_fraction": clipped / num_tokens, "gaps": gaps, "compared": compared}


def micro_batch_loss(learner, batch: list[Sample], args, on_policy: bool) -> torch.Tensor:
    """Sums over tokens, (5,): the loss, w_j (loss_jt + kl_coef KL_jt); clipped ones; KL; gaps to
    the sampler's log-probs; tokens that have these."""
    device = learner.device
    logprobs = learner(**collate(batch, device))  # (tokens,), like all that follow
    old_logprobs = logprobs.detach() if on_policy else per_token(batch, "old_logprobs", device)
    gaps = old_logprobs - per_token(batch, "sampler_logprobs", device, missing=np.nan)
    advantages = per_token(batch, "advantage", device)
    weights = per_token(batch, "loss_weight", device)
    if args.truncated_is is not None:  # the samples come from a slightly different policy
        weights = weights * gaps.exp().clamp(max=args.truncated_is)
    losses, clipped = LOSSES[args.loss](logprobs, old_logprobs, advantages, args)
    kl = torch.zeros_like(losses)
    if args.kl_coef > 0:
        kl = kl_k3(logprobs, per_token(batch, "ref_logprobs", device))
    loss = weights * (losses + args.kl_coef * kl)
    return torch.stack([loss.sum(), clipped.sum(), kl.detach().sum(), gaps.abs().nansum(),
                        (~gaps.isnan()).sum()])


def main(argv=None) -> None:
    """Train with the flags in `argv`, by default those of the command line."""
    train(run.parse_flags(argv, __doc__, add_flags))


if __name__ == "__main__":
    run.run_script(main)
