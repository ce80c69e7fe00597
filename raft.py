"""RAFT and RAFT++ with GVM sampling: the M-step and the training loop. The main script.

    torchrun raft.py                                      # the toy, on a CPU, in minutes
    torchrun raft.py --allocator uniform                  # what GVM is compared with
    torchrun --nproc-per-node 8 raft.py ...               # the paper's run: see README.md

One step, as `train` calls it:
    draw_step         the E-step, in gvm.py: samples are drawn where they help, and graded
    prepare_updates   the M-step: what each update trains on, with weights and old log-probs
    train_step        ... and each `update`: a step on sum_j w_j sum_t loss_jt, samples j, tokens t
"""

import argparse
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import run
from data import BENCHMARKS, Grader, InputError, Problem, RunError, Sample
from eval import add_report_flags, evaluate
from gvm import SampleSource, add_budget_flags, check_budget, draw_step
from model import Policy, add_model_flags, distribute, load_model, load_optimizer, micro_batches
from model import newest_checkpoint, save_checkpoint, whole
from run import non_negative, number, positive_int
from sampler import add_sampler_flags, collate, compare_problems, fill_logprobs, load_prompts
from sampler import make_sampler


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of this script."""
    for add_part in (add_model_flags, add_sampler_flags, add_budget_flags):
        add_part(parser)
    add = parser.add_argument_group("objective").add_argument
    add("--objective", choices=OBJECTIVES, default="raft", help="an entry of OBJECTIVES")
    add("--loss", choices=LOSSES, default="raft++", help="raft: -A ln pi; raft++: Eq. 8, clipped")
    add("--clip-low", type=non_negative, default=0.2, help="raft++: ratio >= 1 - this, if A < 0")
    add("--clip-high", type=non_negative, default=0.28, help="raft++: ratio <= 1 + this, if A > 0")
    add("--kl-coef", type=non_negative, default=0.0, help="of the KL to the initial model")
    add("--truncated-is", type=number(float, low=1), metavar="C",
        help="weigh tokens by min(pi_old / sampler's pi, C); for a sampler_gap above 0.01")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=positive_int, default=60, help="each draws once and updates a few times")
    add("--prompts-per-step", type=positive_int, default=32, help="the paper: 1024")
    add("--updates-per-step", type=positive_int, default=1, help="optimizer steps; the paper: 4")
    add("--lr", type=non_negative, default=3e-4, help="of AdamW, constant; the paper: 1e-6")
    add("--weight-decay", type=non_negative, default=0.01, help="of AdamW")
    add("--grad-clip", type=number(float, low=1e-6), default=1.0, help="largest gradient norm")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add_report_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run, seen by all nodes; None: runs/OBJECTIVE-ALLOCATOR-SEED")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    add("--save-every", type=positive_int, default=10, help="steps; the last is always saved")
    add("--keep", type=positive_int, default=2, help="checkpoints kept")


def raft_objective(samples: list[Sample], args) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, used), (samples,) each: right samples are trained on, all alike."""
    is_right = np.array([sample.reward > 0 for sample in samples], dtype=bool)
    return is_right.astype(float), is_right


def loss_weights(samples: list[Sample], used: np.ndarray, num_prompts: int, weighting: str):
    """Weight w_j of each sample's token sum in the loss of one update, (samples,); 0 if not used.

    used: (samples,), what the estimator averages over: right samples in RAFT, all in GRPO.
    m = num_prompts, solved or not; D_i: the used samples of prompt i; T_j: the tokens of sample j.
    prompt:   1 / (m |D_i| mean(T)), Algorithm 1: each solved prompt counts the same, however many
              samples it got. mean(T), over the update, gives the loss the scale of the others.
    token:    1 / sum(T), over the update, wrong samples included, as in the released code.
    sequence: 1 / (T_j sum_i |D_i|), Eq. 8. Like `token`, it favours prompts with many samples.
    """
    lengths = np.array([len(sample.response_ids) for sample in samples], dtype=float)
    if weighting == "prompt":
        sizes = Counter(sample.problem for sample, is_used in zip(samples, used) if is_used)
        sizes = np.array([max(sizes[sample.problem], 1) for sample in samples])  # |D_i|
        return used / (num_prompts * sizes * lengths.sum() / max(len(lengths), 1))
    if weighting == "token":
        return used / lengths.sum()
    if weighting == "sequence":
        return used / (max(used.sum(), 1) * lengths)
    raise ValueError(f"unknown weighting {weighting}")


def raft_loss(logprobs, old_logprobs, advantages, args):
    """(losses, clipped), (tokens,) each: -A ln pi; no gradient is clipped away."""
    return -advantages * logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


def clipped_loss(logprobs, old_logprobs, advantages, args):
    """-min(s A, clip(s, 1 - low, 1 + high) A), s = pi / pi_old: Eq. 8, and PPO's for any A."""
    low, high = 1 - args.clip_low, 1 + args.clip_high
    ratio = torch.exp(logprobs - old_logprobs)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = (advantages > 0) & (ratio > high) | (advantages < 0) & (ratio < low)
    return losses, clipped


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """k3 estimates KL(pi || ref), (tokens,): r - 1 - ln r with r = ref / pi; never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio


# What --objective and --loss may name: a function and an entry each. grpo.py adds an objective.
OBJECTIVES = {"raft": raft_objective}
LOSSES = {"raft": raft_loss, "raft++": clipped_loss}
MEANS = ("loss", "clip_fraction", "kl", "sampler_gap")  # what an update adds up over tokens

# --- one step --------------------------------------------------------------------------------
def split_updates(problems: list[Problem], samples: list[Sample], args) -> list[list[Sample]]:
    """The samples to train on in each update, with advantage and loss_weight filled in."""
    updates, ids = [], [problem.id for problem in problems]
    for chosen in map(set, np.array_split(ids, args.updates_per_step)):
        part = [sample for sample in samples if sample.problem in chosen]
        advantages, used = OBJECTIVES[args.objective](part, args)
        weights = loss_weights(part, used, len(chosen), args.weighting)
        for sample, advantage, weight in zip(part, advantages, weights):
            sample.advantage, sample.loss_weight = advantage, weight
        # Without an advantage the loss has no gradient; the KL has one.
        updates.append([s for s in part if s.loss_weight > 0 and (s.advantage or args.kl_coef)])
    return updates


def per_token(samples: list[Sample], name: str, device: torch.device) -> torch.Tensor:
    """An attribute of the samples, one number or (response,) each, as fp32 (tokens,)."""
    rows = [np.broadcast_to(getattr(s, name), len(s.response_ids)) for s in samples]
    return torch.from_numpy(np.concatenate(rows)).to(device, torch.float32)


def micro_batch_loss(learner, batch: list[Sample], args) -> torch.Tensor:
    """Sums over tokens, (4,), as in MEANS. The first: sum_j w_j sum_t (loss_jt + kl_coef KL_jt)."""
    device = learner.device
    logprobs, _ = learner(**collate(batch, device))  # (tokens,), like all that follow
    old_logprobs = logprobs.detach()  # in a step's first update, before which nothing has changed
    if batch[0].old_logprobs is not None:
        old_logprobs = per_token(batch, "old_logprobs", device)
    gaps = old_logprobs - per_token(batch, "sampler_logprobs", device)
    advantages = per_token(batch, "advantage", device)
    weights = per_token(batch, "loss_weight", device)
    if args.truncated_is is not None:  # the samples come from a slightly different policy
        weights = weights * gaps.exp().clamp(max=args.truncated_is)
    losses, clipped = LOSSES[args.loss](logprobs, old_logprobs, advantages, args)
    kl = torch.zeros_like(losses)
    if args.kl_coef > 0:
        kl = kl_k3(logprobs, per_token(batch, "ref_logprobs", device))
    loss = weights * (losses + args.kl_coef * kl)
    return torch.stack([loss.sum(), clipped.sum(), kl.detach().sum(), gaps.abs().sum()])


def micro_batches_here(learner, samples: list[Sample], max_tokens: int):
    """Yield this rank's micro-batches of an update, and whether they count: (batch, 1 or 0)."""
    lengths = [sample.total_tokens for sample in samples]
    batches = micro_batches(lengths, dist.get_world_size(), max_tokens)[dist.get_rank()]
    for i, indices in enumerate(batches):
        # DDP's ranks talk once an update; FSDP2's in every pass, to keep a part of the gradient.
        learner.require_backward_grad_sync = i + 1 == len(batches)
        # A rank without samples runs the shortest one, which does not count: all must talk.
        yield [samples[j] for j in indices or [np.argmin(lengths)]], 1 if indices else 0


def update(learner, optimizer, samples: list[Sample], args) -> dict:
    """One optimizer step on the samples of an update; returns what is summed over updates."""
    if not samples:
        return {"updates_empty": 1}  # on a gradient of 0 AdamW would still move
    ranks, num_tokens = dist.get_world_size(), sum(len(s.response_ids) for s in samples)
    totals = torch.zeros(len(MEANS), dtype=torch.float64)
    learner.train()
    optimizer.zero_grad(set_to_none=False)  # the gradients are views of DDP's buckets: keep them
    for batch, counted in micro_batches_here(learner, samples, args.tokens_per_micro_batch):
        sums = micro_batch_loss(learner, batch, args)
        (counted * ranks * sums[0]).backward()  # which takes the mean over ranks; we want the sum
        totals += counted * sums.detach().cpu()
    dist.all_reduce(totals)
    norm = whole(torch.nn.utils.clip_grad_norm_(learner.parameters(), args.grad_clip))
    if not torch.isfinite(norm):
        return {"updates_not_finite": 1}
    optimizer.step()
    totals[1:] /= num_tokens  # the loss is a sum already
    return {"updates": 1, "grad_norm": norm.item()} | dict(zip(MEANS, totals.tolist()))


def prepare_updates(learner, reference, problems, samples, args) -> list[list[Sample]]:
    """split_updates, and the log-probs that the updates need: of the policy before all of them."""
    updates, max_tokens = split_updates(problems, samples, args), args.tokens_per_micro_batch
    for sample in updates[0]:  # it is trained by that very policy: see micro_batch_loss
        sample.old_logprobs = None
    later = [sample for sample in sum(updates[1:], []) if sample.old_logprobs is None]
    fill_logprobs(learner, later, max_tokens)
    if reference is not None:
        fill_logprobs(reference, sum(updates, []), max_tokens, into="ref_logprobs")
    return updates


def train_step(learner, optimizer, updates: list[list[Sample]], args) -> dict:
    """The updates of a step; returns metrics for the log."""
    sums = Counter()  # a name that is missing counts 0
    for part in updates:
        sums.update(update(learner, optimizer, part, args))
    if args.fsdp:  # DDP's gradients stay: they are views of its buckets
        optimizer.zero_grad()
    for name in (*MEANS, "grad_norm"):
        sums[name] = sums[name] / sums["updates"] if sums["updates"] else None
    return dict(sums)


def watch(state: run.RunState, metrics: dict) -> None:
    """Notice a run that has diverged; RunError after ten updates in a row that were not finite."""
    state.not_finite = 0 if metrics.get("updates") else state.not_finite
    state.not_finite += metrics.get("updates_not_finite", 0)
    if state.not_finite >= 10:
        raise RunError("ten updates in a row were not finite; --resume with a lower --lr")
    if metrics.get("accept_rate"):
        state.last_solved = state.step
    if state.last_solved and state.step == state.last_solved + 10:
        run.print0("warning: no sample of the last ten steps was right; if the run has diverged, "
                   f"go on from a checkpoint before step {state.last_solved}, with a lower --lr")


def load(args: argparse.Namespace, device: torch.device, checkpoint) -> tuple:
    """What a rank loads by itself: policy, reference, tokenizer, problems, those to evaluate."""
    check_budget(args, args.objective)
    if BENCHMARKS.keys() & set(args.data.split(",")):
        raise InputError(f"--data {args.data}: is there to evaluate; name a hub data set to train")
    model, tokenizer = load_model(args, device, checkpoint)
    policy = Policy(model, args.temperature, args.gradient_checkpointing)
    reference = Policy(load_model(args, device)[0], args.temperature) if args.kl_coef > 0 else None
    if reference and device.type == "cuda":
        reference.bfloat16()  # it computes in bf16 there anyway
    problems = load_prompts(args.data, args.split, tokenizer, args)
    eval_problems = load_prompts(args.eval_data, args.eval_split, tokenizer, args)
    looked_at = args.candidates_per_step or args.prompts_per_step
    if not args.updates_per_step <= args.prompts_per_step <= looked_at <= len(problems):
        raise InputError("--prompts-per-step: from --updates-per-step to --candidates-per-step, if "
                         f"set, which is at most {len(problems)}, the number of problems")
    return policy, reference, tokenizer, problems, eval_problems


def train(args: argparse.Namespace) -> None:
    """The whole run: draw, update, evaluate, save; and again."""
    stop, device = run.StopSignal(), run.join_ranks()
    out = Path(args.out or f"runs/{args.objective}-{args.allocator}-{args.seed}")
    lock = run.claim_folder(out, "args.json", args.resume)
    checkpoint, state = newest_checkpoint(out) if args.resume else (None, run.RunState())
    if state.step >= args.steps:
        run.print0(f"{out}: is at step {state.step} of --steps {args.steps}; nothing is left to do")
        return
    policy, reference, tokenizer, problems, eval_problems = run.on_every_rank(
        load, args, device, checkpoint)
    compare_problems(state, {args.data: problems, args.eval_data: eval_problems})
    learner = distribute(policy, args.fsdp)  # the policy, in the form that all ranks train
    if reference and args.fsdp:
        distribute(reference, args.fsdp)
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, fused=device.type == "cuda",
                                  weight_decay=args.weight_decay)
    if checkpoint:
        load_optimizer(checkpoint, policy.model, optimizer)
    save = partial(save_checkpoint, out, state, policy.model, optimizer, tokenizer, args.keep)

    with lock, Grader() as grader:
        sampler = make_sampler(policy.model, tokenizer, args)
        source = SampleSource(policy, sampler, grader, args, stop, state.timer)
        run.on_rank0(run.start_log, out, args, state.log_bytes)
        with suppress(run.Stopped):  # from draw_step, after a signal: the step is given up
            for step in tqdm(range(state.step + 1, args.steps + 1), disable=dist.get_rank() > 0):
                metrics = {}
                if step > 0:  # step 0 is the evaluation before training
                    with state.timer("sample"):  # the E-step
                        batch, samples, metrics = draw_step(problems, step, state, source, args)
                    with state.timer("score"):  # the M-step
                        updates = prepare_updates(learner, reference, batch, samples, args)
                    with state.timer("train"):
                        metrics |= train_step(learner, optimizer, updates, args)
                state.step = step
                if (step % args.eval_every == 0 or step == args.steps) and not stop.on_any_rank():
                    with state.timer("eval"):
                        metrics |= evaluate(sampler, grader, eval_problems, args)
                run.on_rank0(run.write_log, out, state, metrics)
                run.on_every_rank(watch, state, metrics)
                if step > 0 and step % args.save_every == 0:
                    with state.timer("save"):
                        save()
        save()  # the last step, or the last before a signal
    run.print0(f"saved in {out}/checkpoints")


def main(argv=None) -> None:
    """Train with the flags in `argv`, by default those of the command line."""
    train(run.parse_flags(argv, __doc__, add_flags))


if __name__ == "__main__":
    run.run_script(main)
