"""raft.py: losses and weights by hand, gradients that no memory flag or rank changes, and runs that survive a kill."""

import functools
import json
import shutil
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    SMALL, check_killed_and_resumed, check_same_update, check_sigterm_saves_the_step_and_exits, distance, flags, m_step,
    make_sample, parameters, read_log, run_script, same_log, slow,
)
from transformers import AutoTokenizer

import raft
from batches import collate, distribute, fill_logprobs
from checkpoint import RunState
from data import Problem
from losses import LOSSES, kl_k3, loss_weights, raft_objective
from model import Policy
from pretrained import load_model
from raft import micro_batch_loss, optimizer_step, split_updates, train, train_step
from run import InputError, RunError

# Three prompts: two right and one wrong sample, one right, one wrong. Their mean length is (1 + 3 + 2 + 4 + 5) / 5 = 3.
GROUPS = [make_sample(0, 1.0, [1]), make_sample(0, 1.0, [1] * 3), make_sample(0, 0.0, [1] * 2),
          make_sample(1, 1.0, [1] * 4), make_sample(2, 0.0, [1] * 5)]


def weigh(samples, num_prompts, args):
    """(advantages, loss weights) of RAFT's objective."""
    advantages, used = raft_objective(samples, args)
    return advantages, loss_weights(samples, used, num_prompts, args.weighting)


@pytest.mark.parametrize(("weighting", "expected"), [
    ("prompt", [1 / (3 * 2 * 3), 1 / (3 * 2 * 3), 0, 1 / (3 * 1 * 3), 0]),  # 1 / (m |D_i|) over the mean length
    ("token", [1 / 15, 1 / 15, 0, 1 / 15, 0]),  # 15 tokens in all
    ("sequence", [1 / (3 * 1), 1 / (3 * 3), 0, 1 / (3 * 4), 0]),  # three right samples
])
def test_weights_by_hand(weighting, expected):
    args = flags("--weighting", weighting)
    advantages, weights = weigh(GROUPS, 3, args)
    assert weights == pytest.approx(expected) and advantages.tolist() == [1, 1, 0, 1, 0]
    order = [3, 0, 4, 2, 1]
    assert weigh([GROUPS[i] for i in order], 3, args)[1] == pytest.approx([expected[i] for i in order])
    assert not weigh([GROUPS[2], GROUPS[4]], 2, args)[1].any() and len(weigh([], 2, args)[1]) == 0


def test_prompt_weights_do_not_depend_on_how_many_samples_a_prompt_got():
    more = GROUPS + [make_sample(0, 1.0, [1] * 3) for _ in range(7)]
    for used in (np.array([sample.reward > 0 for sample in more]), np.ones(len(more), dtype=bool)):
        weights = loss_weights(more, used, 3, "prompt")
        per_prompt = [sum(w for w, s in zip(weights, more) if s.problem == i) for i in range(3)]
        assert per_prompt[0] == pytest.approx(per_prompt[1]) and (per_prompt[2] > 0) == used[4]


def test_prompt_weights_count_the_prompts_of_the_update_and_not_those_of_the_step():
    problems, samples = [Problem(i, "", "") for i in range(6)], [make_sample(i, 1.0, [9, 9]) for i in range(6)]
    updates = split_updates(problems, samples, flags("--updates-per-step", 3))
    assert [[sample.problem for sample in part] for part in updates] == [[0, 1], [2, 3], [4, 5]]
    # 1 / (m |D_i|) over the mean length, with m = 2: the weights of an update's tokens add up to 1.
    assert [sample.loss_weight for sample in samples] == pytest.approx([1 / (2 * 1 * 2)] * 6)


def test_losses_by_hand():
    logprobs, old = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.1])), torch.log(torch.tensor([0.5, 0.25, 0.4, 0.5]))
    ones, mixed = torch.ones(4), torch.tensor([-2.0, -2.0, 3.0, -2.0])
    losses, clipped = LOSSES["raft"](logprobs, old, ones, flags())
    assert losses.tolist() == pytest.approx((-logprobs).tolist()) and not clipped.any()
    assert LOSSES["raft"](logprobs, old, mixed, flags())[0].tolist() == pytest.approx((-mixed * logprobs).tolist())
    # Ratios 1, 2, 1.25, 0.2: clipped above at 1.28, and below not at all, since the minimum is taken.
    both = Namespace(clip_low=0.2, clip_high=0.28)
    losses, clipped = LOSSES["raft++"](logprobs, old, ones, both)
    assert losses.tolist() == pytest.approx([-1.0, -1.28, -1.25, -0.2])
    assert clipped.tolist() == [False, True, False, False]
    # With A < 0 it is the other way round: 0.2 is taken for 0.8, and 2 stays 2.
    losses, clipped = LOSSES["raft++"](logprobs, old, mixed, both)
    assert losses.tolist() == pytest.approx([2.0, 4.0, -3.75, 1.6])
    assert clipped.tolist() == [False, False, False, True]


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.log(torch.tensor([0.5, 0.5, 0.1])).requires_grad_()
    for sign, expected in ((1.0, [-1.0, 0.0, -0.2]), (-1.0, [1.0, 2.0, 0.0])):  # minus A times the ratio
        logprobs.grad = None
        old, advantages = torch.log(torch.tensor([0.5, 0.25, 0.5])), torch.full((3,), sign)
        losses, clipped = LOSSES["raft++"](logprobs, old, advantages, flags())
        losses.sum().backward()
        assert logprobs.grad.tolist() == pytest.approx(expected)
        assert clipped.tolist() == [gradient == 0 for gradient in logprobs.grad.tolist()]


def test_kl_by_hand():
    logprobs, reference = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.5, 0.4]))
    assert kl_k3(logprobs, reference).tolist() == pytest.approx([0.0, 2 - 1 - np.log(2)])
    policy, other = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.3, 0.4])  # its mean under pi is the KL
    assert (policy * kl_k3(policy.log(), other.log())).sum() == pytest.approx((policy * (policy / other).log()).sum())


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """From ranks and micro-batch budget to log-probs, norms, gradients, parameters and metrics of one update."""
    folder = tmp_path_factory.mktemp("updates")

    @functools.cache
    def update_of(ranks, budget, *fsdp):
        out = folder / f"{ranks}-{budget}.pt"
        run_script("tests/ranks.py", "update", out, "--tokens-per-micro-batch", budget, *fsdp, ranks=ranks)
        return torch.load(out, weights_only=True)

    return update_of


@pytest.mark.parametrize("case", ["raft", "grpo", "single"])  # "single": one sample: the other rank has none
@pytest.mark.parametrize("split", [slow(1, 60), slow(2, 100_000), slow(2, 1), pytest.param((2, 60, "--fsdp"))])
def test_an_update_does_not_depend_on_ranks_or_micro_batches_or_fsdp(updates, split, case):
    reference, other = updates(1, 100_000)[case], updates(*split)[case]
    check_same_update(reference, other)
    assert case == "single" or 0 < reference["clip_fraction"] < 1 and reference["kl"] > 0


@pytest.mark.slow
def test_ddp_and_fsdp_go_on_from_each_other_s_checkpoints(tmp_path):
    """Two updates of AdamW, the first and the second on one rank or on two with FSDP2; KL off, as the reference moves."""
    kinds, ends = {"one": (1, []), "fsdp": (2, ["--fsdp"])}, {}
    for first, (ranks, words) in kinds.items():
        run_script("tests/ranks.py", "save", tmp_path / first, "--kl-coef", 0, *words, ranks=ranks)
        for then, (ranks, words) in kinds.items():
            out = tmp_path / f"{first}-{then}"
            shutil.copytree(tmp_path / first, out)
            run_script("tests/ranks.py", "save", out, "--kl-coef", 0, *words, ranks=ranks)
            ends[first, then] = parameters(out, 2)
    before, expected = parameters(tmp_path / "one", 1), ends["one", "one"]
    for name in expected:
        assert (expected[name] - before[name]).abs().max() > 1e-4, name  # moments and all: an update by lr 1e-3
    for found in ends.values():
        assert distance(found, expected) < 0.01 * distance(expected, before)


@pytest.fixture
def small(device, model_and_tokenizer):
    """(policy, the same for training, AdamW with momentum, a copy of its parameters) of the toy."""
    policy = Policy(model_and_tokenizer[0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    return policy, distribute(policy), optimizer, before


def unchanged(policy, before) -> bool:
    return all(torch.equal(parameter, old) for parameter, old in zip(policy.parameters(), before))


def test_a_step_without_right_samples_changes_nothing(small):
    policy, ddp_policy, optimizer, before = small
    wrong, problems = [make_sample(i, 0.0, [9, 9]) for i in range(2)], [Problem(i, "", "") for i in range(2)]
    metrics = m_step(ddp_policy, optimizer, problems, wrong, flags("--updates-per-step", 2))
    assert (metrics.get("updates", 0), metrics["updates_empty"], metrics["loss"]) == (0, 2, None)
    assert unchanged(policy, before)


def test_an_update_that_is_not_finite_changes_nothing_and_is_counted(small):
    policy, ddp_policy, optimizer, before = small
    old = np.array([0.0, np.nan], np.float32)
    samples = [make_sample(0, 1.0, [9, 9], old_logprobs=old, advantage=1.0, loss_weight=1.0)]
    assert optimizer_step(ddp_policy, optimizer, samples, flags(), on_policy=False) == {"updates_not_finite": 1}
    assert unchanged(policy, before)
    samples[0].old_logprobs[1] = -1.0
    metrics = optimizer_step(ddp_policy, optimizer, samples, flags(), on_policy=False)
    assert metrics["updates"] == 1 and not unchanged(policy, before)


def test_a_sampler_of_another_model_is_refused_before_the_policy_moves(small):
    policy, ddp_policy, optimizer, before = small
    sample = make_sample(0, 1.0, [9, 9], old_logprobs=np.array([-1.0, -1.0], np.float32), advantage=1.0, loss_weight=1.0)
    sample.sampler_logprobs = sample.old_logprobs - 0.2
    with pytest.raises(RunError, match="off by 0.2 nats a token"):
        optimizer_step(ddp_policy, optimizer, [sample], flags(), on_policy=False, check_gap=True)
    assert unchanged(policy, before)
    sample.sampler_logprobs = sample.old_logprobs - 0.05
    assert optimizer_step(ddp_policy, optimizer, [sample], flags(), on_policy=False, check_gap=True)["updates"] == 1


def test_the_gradient_is_clipped_to_the_flag_and_its_norm_is_logged_as_it_was(device, model_and_tokenizer):
    policy = Policy(model_and_tokenizer[0])
    samples = [make_sample(0, 1.0, [9, 9], advantage=1.0, loss_weight=0.5)]
    fill_logprobs(policy, samples, 100, into="old_logprobs")
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    metrics = optimizer_step(distribute(policy), optimizer, samples, flags("--grad-clip", 0.01), on_policy=False)
    moved = sum((new - old).square().sum() for new, old in zip(policy.parameters(), before)).sqrt().item()
    assert moved == pytest.approx(0.01, rel=1e-3) and metrics["grad_norm"] > 0.1


def test_all_updates_of_a_step_share_the_policy_from_before_it(small):
    policy, ddp_policy, optimizer, before = small
    problems, samples = [Problem(i, "", "") for i in range(3)], [make_sample(i, 1.0, [9, 8, 7]) for i in range(3)]
    expected = policy(**collate(samples, torch.device("cpu"))).detach().split(3)
    args = flags("--updates-per-step", 3)
    metrics = m_step(ddp_policy, optimizer, problems, samples, args)
    assert metrics["updates"] == 3 and not unchanged(policy, before)
    assert samples[0].old_logprobs is None  # the first update takes its own
    for sample, logprobs in zip(samples[1:], expected[1:]):
        assert sample.old_logprobs == pytest.approx(logprobs.numpy(), abs=1e-4)
    assert metrics["loss"] < -1.01  # on its own policy, each update's would be -1


@pytest.mark.parametrize("words", [[], ["--loss", "raft"], ["--truncated-is", 2]])
def test_the_first_update_needs_no_scoring(device, words):
    """Without old log-probs it is the update that it would be with those of the policy before it."""
    found = []
    for scored in (True, False):
        policy = Policy(load_model(flags(), device)[0])
        samples = [make_sample(i, 1.0, [9, 8, 7 + i], sampler_logprobs=np.full(3, -1.0, np.float32), advantage=1.0,
                               loss_weight=0.5) for i in range(3)]
        if scored:
            fill_logprobs(policy, samples, 1000, into="old_logprobs")
        metrics = optimizer_step(distribute(policy), torch.optim.SGD(policy.parameters(), lr=0.1), samples, flags(*words),
                                 on_policy=not scored)
        found.append(metrics | {name: p.detach().clone() for name, p in policy.named_parameters()})
    assert found[0]["gaps"] > found[0]["compared"] == 9
    for name, value in found[0].items():
        assert np.allclose(value, found[1][name], rtol=1e-4, atol=1e-5), name


def test_samples_whose_log_probs_the_sampler_did_not_tell_are_left_out_of_the_gap_alone(device):
    """Three samples of 1, 2 and 3 tokens, off by 0.1, 0.2 and 0.3, in two micro-batches."""
    problems = [Problem(i, "", "") for i in range(3)]

    def metrics_of(told) -> dict:
        policy, args = Policy(load_model(flags(), device)[0]), flags("--tokens-per-micro-batch", 10)
        samples = [make_sample(i, 1.0, [9] * (i + 1)) for i in range(3)]
        fill_logprobs(policy, samples, 100, into="old_logprobs")
        for i, sample in enumerate(samples):
            sample.sampler_logprobs = sample.old_logprobs - 0.1 * (i + 1) if i in told else None
        return m_step(distribute(policy), torch.optim.SGD(policy.parameters(), lr=0.1), problems, samples, args)

    gaps = {(0, 1, 2): 1.4 / 6, (0, 2): 1.0 / 4, (): None}
    whole, part, none = found = [metrics_of(told) for told in gaps]
    assert [metrics.pop("sampler_gap") for metrics in found] == [pytest.approx(gap, abs=1e-5) for gap in gaps.values()]
    assert whole == part == none and whole["updates"] == 1


def test_another_model_is_refused_at_the_first_update_with_a_gap(small):
    policy, ddp_policy, optimizer, before = small
    updates = [[make_sample(i, 1.0, [9, 9], advantage=1.0, loss_weight=1.0, sampler_logprobs=None)] for i in range(2)]
    assert train_step(ddp_policy, optimizer, updates[:1], flags(), is_first=True)["sampler_gap"] is None
    updates[1][0].old_logprobs, updates[1][0].sampler_logprobs = np.full(2, -1.0), np.full(2, -1.2)
    with pytest.raises(RunError, match="off by 0.2 nats a token"):
        train_step(ddp_policy, optimizer, updates, flags(), is_first=True)
    assert train_step(ddp_policy, optimizer, updates, flags())["sampler_gap"] == pytest.approx(0.2)


@pytest.mark.parametrize(("loss", "cap"), [("raft++", None), ("raft++", 2.0), ("raft", 1.5)])
def test_truncated_importance_weights_by_hand(small, loss, cap):
    policy, ddp_policy, optimizer, before = small
    ratios = [np.array([0.5, 1.0, 1.8]), np.array([4.0])]  # of the trainer's and the sampler's probabilities
    old = [np.log([0.1, 0.2, 0.3]), np.log([0.4])]
    samples = [make_sample(i, 1.0, [9] * len(ratio), old_logprobs=o, sampler_logprobs=o - np.log(ratio))
               for i, (ratio, o) in enumerate(zip(ratios, old))]
    args = flags("--updates-per-step", 1, "--loss", loss, *(["--truncated-is", cap] if cap else []))
    updates = split_updates([Problem(i, "", "") for i in range(2)], samples, args)
    metrics = train_step(ddp_policy, optimizer, [[], *updates], args)  # an empty one first: this one is off-policy
    gaps = np.abs(np.log(np.concatenate(ratios)))
    assert metrics["sampler_gap"] == pytest.approx(gaps.mean())
    assert metrics["updates"] == 1 and not unchanged(policy, before)
    # Two prompts of one right sample, with a mean length of 2: a weight of 1/4, times what the cap leaves of the ratio.
    weights = np.minimum(np.concatenate(ratios), cap) / 4 if cap else np.full(4, 1 / 4)
    logprobs = policy(**collate(samples, torch.device("cpu"))).detach()
    losses, _ = LOSSES[loss](logprobs, torch.tensor(np.concatenate(old)), torch.ones(4), args)
    expected = (torch.tensor(weights) * losses).sum().item()
    assert micro_batch_loss(ddp_policy, samples, args, on_policy=False)[0].item() == pytest.approx(expected, rel=1e-4)


# --- runs ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def train_here(device, tmp_path):
    """Train in this process for one step of one update, on four problems; returns the log and the final weights."""
    data = tmp_path / "four.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+2", "answer": str(i + 2)}) + "\n" for i in range(1, 5)))

    def train_once(*words):
        out = tmp_path / "-".join(map(str, words))
        train(flags("--data", data, "--eval-data", data, "--eval-samples", 1, "--prompts-per-step", 4, "--steps", 1,
                    "--updates-per-step", 1, *words, "--out", out))
        return read_log(out), parameters(out, 1)

    return train_once


def test_the_temperature_is_that_of_sampler_policy_and_reference(train_here):
    log, _ = train_here("--temperature", 0.7, "--kl-coef", 0.1)
    assert log[1]["updates"] == 1 and log[1]["sampler_gap"] < 1e-4  # the one update began at the initial model
    assert log[1]["kl"] == pytest.approx(0, abs=1e-7)


def test_weight_decay_is_the_flag_s(train_here):
    """AdamW: lr times decay times the weights themselves is taken away, on top of the step."""
    without, with_decay = (train_here("--lr", 1e-3, "--weight-decay", decay)[1] for decay in (0, 20))
    initial = load_model(flags(), torch.device("cpu"))[0].state_dict()
    for name, weights in without.items():
        assert torch.allclose(weights - with_decay[name], 1e-3 * 20 * initial[name], atol=1e-6), name


RUNS = {  # ranks, and flags: as published; a pilot for three steps; predictions
    "published": (1, SMALL), "plan": (2, [*SMALL, "--e-step-every", 3]), "predicted": (1, [*SMALL, "--candidates-per-step", 16])}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """From a name in RUNS to the folder of four steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")

    @functools.cache
    def run_of(name):
        ranks, words = RUNS[name]
        run_script("raft.py", *words, "--out", folder / name, ranks=ranks)
        return folder / name

    return run_of


@pytest.mark.parametrize("name", ["published", slow("plan"), slow("predicted")])
def test_killed_and_resumed_equals_uninterrupted(straight, tmp_path, name):
    ranks, words = RUNS[name]
    check_killed_and_resumed("raft.py", words, straight(name), tmp_path / "run", ranks)


@pytest.mark.slow
def test_the_log_counts_everything(straight, toy):
    one, two = read_log(straight("predicted")), read_log(straight("plan"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1, 2, 3, 4]
    assert [line["samples"] for line in one] == [0, 32, 64, 96, 128]
    assert two[3]["samples"] == 3 * 32 + 3 * 8 * 2 and two[4]["samples"] > two[3]["samples"] + 48  # pilots on top
    for lines in (one, two):
        assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 2, 4]
        assert all(line["updates"] + line["updates_empty"] == 2 * line["step"] for line in lines)
        assert all(("predicted_accept_rate" in line) == (lines is one) for line in lines[1:])
        assert lines[-1]["tokens"] > lines[-1]["samples"] and 0 < lines[-1]["accept_rate"] < 1 and lines[-1]["kl"] >= 0
    record = json.loads((straight("predicted") / "args.json").read_text())
    assert record["flags"]["steps"] == 4 and record["versions"]["torch"] == torch.__version__
    assert one[0]["eval_accuracy"] == two[0]["eval_accuracy"]
    checkpoint = straight("predicted") / "checkpoints" / "step-000004"
    assert AutoTokenizer.from_pretrained(checkpoint).chat_template and AutoTokenizer.from_pretrained(toy)


@pytest.mark.parametrize(("kept", "prompts"), [(2, 2), (0, 0), (1000, 8)])
def test_samples_of_some_prompts_are_kept(device, tmp_path, kept, prompts):
    """All samples of these prompts, with the step, the reference and the score."""
    train(flags(*SMALL, "--keep-samples", kept, "--out", tmp_path / "run"))
    path = tmp_path / "run" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if kept else []
    assert path.exists() == (kept > 0)
    groups = Counter((row["step"], row["problem"]) for row in rows)
    assert Counter(step for step, _ in groups) == ({step: prompts for step in (1, 2, 3, 4)} if kept else {})
    if kept == 1000:  # all of a step
        scores = np.mean([row["score"] for row in rows if row["step"] == 4])
        assert scores == read_log(tmp_path / "run")[4]["accept_rate"]
    assert all((row["answer"] == row["reference"]) == row["score"] for row in rows)


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_sigterm_saves_the_step_and_exits(tmp_path, ranks):
    check_sigterm_saves_the_step_and_exits("raft.py", [], tmp_path / "run", ranks)


@pytest.mark.parametrize("words", [["--fsdp"], []])
def test_the_reference_is_shared_out_before_the_policy_is_loaded(device, monkeypatch, words):
    """Else a GPU would hold two whole models in fp32."""
    order = []

    def spy(name):
        function = getattr(raft, name)
        monkeypatch.setattr(raft, name, lambda *args: [order.append((name, *map(type, args[:1]))), function(*args)][1])

    for name in ("load_reference", "load_model", "distribute"):
        spy(name)
    raft.set_up(flags("--kl-coef", 0.1, *words), device, None, RunState())
    loads = [("load_reference", Namespace), ("load_model", Namespace)]
    assert order == ([loads[0], ("distribute", Policy), *loads[1:], ("distribute", Policy)] if words else
                     [*loads, ("distribute", Policy)])


@pytest.mark.parametrize(("words", "complaint"), [
    (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--data", "gsm8k"], "--data gsm8k: is there to evaluate"),
    (["--model", "missing"], "--model missing: cannot be loaded"),
    (["--pilot-samples", 5], "--samples-per-prompt is below --pilot-samples"),
    (["--e-step-every", 2, "--allocator", "uniform"], "no pilot is taken with --allocator uniform"),
    (["--prompts-per-step", 100_000], "--prompts-per-step: from"),
    (["--updates-per-step", 40], "--prompts-per-step: from --updates-per-step"),
    (["--max-prompt-tokens", 1], "every prompt is longer"),
])
def test_bad_input_is_one_line_and_leaves_no_run_behind(device, tmp_path, words, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        train(flags("--out", tmp_path / "run", *words))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "args.json").exists()


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_users_see_one_line_and_exit_code_2(straight, ranks):
    before = (straight("published") / "log.jsonl").read_text()
    done = run_script("raft.py", "--out", straight("published"), ranks=ranks, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("raft.py: error")]
    assert len(ours) == 1 and "--resume" in ours[0] and (straight("published") / "log.jsonl").read_text() == before
    assert ranks > 1 or done.returncode == 2 and done.stderr.splitlines() == ours


@pytest.mark.parametrize("allocator", ["gvm", slow("uniform")])
def test_training_helps(tmp_path, allocator):
    run_script("raft.py", "--allocator", allocator, "--steps", 20, "--out", tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[-1]["eval_accuracy"] > log[0]["eval_accuracy"] + 0.05
    assert log[-1]["samples"] == 20 * 16 * 4


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_any_number_of_ranks_is_resumed_by_any_other(straight, tmp_path, first, then):
    words = [*RUNS["predicted"][1], "--out", tmp_path / "run"]
    run_script("raft.py", *words, "--steps", 2, ranks=first)
    run_script("raft.py", *words, "--resume", ranks=then)
    for found, expected in zip(read_log(tmp_path / "run"), read_log(straight("predicted")), strict=True):
        gaps = {name for name in found if name.startswith("sampler_gap")}  # rounding alone
        found, expected = ({name: x for name, x in line.items() if name not in gaps} for line in (found, expected))
        assert same_log(found, expected)
    resumed, expected = parameters(tmp_path / "run", 4), parameters(straight("predicted"), 4)
    assert distance(resumed, expected) < 0.05 * distance(expected, load_model(flags(), torch.device("cpu"))[0].state_dict())
