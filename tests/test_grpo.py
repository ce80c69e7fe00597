"""grpo.py: advantages and weights by hand, and runs that differ from raft.py's by them alone."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SMALL, check_killed_and_resumed, distance, m_step, make_sample, parameters, read_log, run_script, same_log

import conftest
import grpo
from batches import distribute
from data import Problem
from losses import loss_weights
from model import Policy
from pretrained import load_model
from grpo import group_advantages, grpo_objective
from raft import split_updates

flags = partial(conftest.flags, add_flags=grpo.add_flags)
# Groups of 3, 2 and 1 samples, mixed: rewards 1 0 0, 0 0 and 1; 18 tokens in all.
SAMPLES = [make_sample(0, 1.0, [1]), make_sample(1, 0.0, [1] * 3), make_sample(0, 0.0, [1] * 2),
           make_sample(0, 0.0, [1] * 4), make_sample(2, 1.0, [1] * 5), make_sample(1, 0.0, [1] * 3)]


@pytest.mark.parametrize(("kind", "expected"), [
    ("dr", [2 / 3, 0, -1 / 3, -1 / 3, 0, 0]),  # mean 1/3
    ("loo", [1, 0, -1 / 2, -1 / 2, 0, 0]),  # the others' means: 0, 1/2, 1/2
    ("grpo", np.array([2 / 3, 0, -1 / 3, -1 / 3, 0, 0]) / (np.sqrt(1 / 3) + 1e-6)),  # ((2/3)^2 + 2 (1/3)^2) / 2 = 1/3
])
def test_advantages_by_hand(kind, expected):
    assert group_advantages(SAMPLES, kind) == pytest.approx(expected, abs=1e-12)
    order = [5, 2, 0, 4, 1, 3]
    assert group_advantages([SAMPLES[i] for i in order], kind) == pytest.approx([expected[i] for i in order])
    assert len(group_advantages([], kind)) == 0


def test_equal_rewards_and_single_samples_give_exactly_nothing():
    equal = [make_sample(0, 0.1, [1]) for _ in range(3)] + [make_sample(1, 1.0, [1])]  # the mean of 0.1s is not 0.1
    for kind in ("grpo", "dr", "loo"):
        assert not group_advantages(equal, kind).any()


def test_leave_one_out_is_unbiased_and_the_own_mean_shrinks_by_n_minus_1_over_n():
    """E sum_j A_j (r_j - p) / n over all outcomes of n coin throws with p = 0.3: p (1 - p) if A is unbiased."""
    for n in (2, 3, 5):
        totals = {"loo": 0.0, "dr": 0.0, "grpo": 0.0}
        for bits in range(2**n):
            rewards = [float(bits >> j & 1) for j in range(n)]
            probability = np.prod([0.3 if reward else 0.7 for reward in rewards])
            group = [make_sample(0, reward, [1]) for reward in rewards]
            for kind in totals:
                totals[kind] += probability * np.mean(group_advantages(group, kind) * (np.array(rewards) - 0.3))
        assert totals["loo"] == pytest.approx(0.21) and totals["dr"] == pytest.approx(0.21 * (n - 1) / n)
        if n == 2:  # an advantage of 0.5 / sqrt(0.5), in mixed pairs alone; large groups come to p q / sqrt(p q)
            assert totals["grpo"] == pytest.approx(0.21 * math.sqrt(0.5), rel=1e-5)


@pytest.mark.parametrize(("weighting", "expected"), [
    ("prompt", [1 / 27, 1 / 18, 1 / 27, 1 / 27, 1 / 9, 1 / 18]),  # 1 / (m n_i L), m = 3, mean length L = 3
    ("token", [1 / 18] * 6),
    ("sequence", [1 / 6, 1 / 18, 1 / 12, 1 / 24, 1 / 30, 1 / 18]),  # 1 / (6 T)
])
def test_weights_by_hand(weighting, expected):
    advantages, used = grpo_objective(SAMPLES, flags("--advantage", "loo"))
    weights = loss_weights(SAMPLES, used, 3, weighting)
    assert weights == pytest.approx(expected) and advantages.tolist() == [1, 0, -0.5, -0.5, 0, 0]


@pytest.mark.parametrize(("weighting", "expected"), [
    ("prompt", [1 / 27, 1 / 18, 1 / 27, 0, 0, 1 / 18]),  # of the group of three, two are left; each counts as one of three
    ("token", [1 / 18, 1 / 18, 1 / 18, 0, 0, 1 / 18]),
    ("sequence", [1 / 6, 1 / 18, 1 / 12, 0, 0, 1 / 18]),
])
def test_truncated_responses_have_no_loss_and_count_in_their_group_by_hand(weighting, expected):
    samples, problems = [replace(sample) for sample in SAMPLES], [Problem(i, "", "") for i in range(3)]
    samples[3].finished = samples[4].finished = False  # one of the group of three, and all of that of one
    words = ["--advantage", "loo", "--weighting", weighting, "--updates-per-step", 1]
    (update,) = split_updates(problems, samples, flags(*words, "--mask-truncated"))
    assert [s.loss_weight for s in samples] == pytest.approx(expected)
    assert [s.advantage for s in samples] == [1, 0, -0.5, -0.5, 0, 0]  # as without the flag
    assert update == [samples[0], samples[2]]
    (update,) = split_updates(problems, samples, flags(*words))
    assert update == [samples[0], samples[2], samples[3]]
    for sample in samples:
        sample.finished = False
    assert split_updates(problems, samples, flags(*words, "--mask-truncated")) == [[]]


def test_truncated_responses_are_left_out_of_raft_s_loss_too():
    right = [make_sample(0, 1.0, [1] * 3), replace(make_sample(0, 1.0, [1] * 3), finished=False)]
    (update,) = split_updates([Problem(0, "", "")], right, conftest.flags("--mask-truncated"))
    assert update == right[:1] and right[0].loss_weight == pytest.approx(1 / (2 * 3))  # half of the prompt's loss is gone


def test_a_run_without_truncated_responses(device, tmp_path):
    data = tmp_path / "few.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    logs = []
    for name, words in (("all", []), ("finished", ["--mask-truncated"])):
        grpo.main(["--eval-data", str(data), "--samples-per-prompt", "8", "--seed", "1", "--max-response-tokens", "26",
                   "--steps", "1", *words, "--out", str(tmp_path / name)])
        logs.append(read_log(tmp_path / name)[1])
    assert logs[0]["samples"] == logs[1]["samples"] == 128 and 0 < logs[0]["truncated"] == logs[1]["truncated"] < 1
    assert logs[0]["updates"] == logs[1]["updates"] == 1 and logs[0]["grad_norm"] != pytest.approx(logs[1]["grad_norm"], rel=0.01)


def test_the_gradient_is_that_of_a_plain_loop(device, model_and_tokenizer):
    """One update, on policy: -1/(m L) sum_i 1/n_i sum_j A_j sum_t ln pi, L the mean length, by autograd."""
    model, tokenizer = model_and_tokenizer
    policy, texts = Policy(model), ["4+3=7;", "\\boxed{7}", "1+1=2;2+2=4;", "9", "8-8=0;", "0;0"]
    samples = [make_sample(s.problem, s.reward, tokenizer.encode(text)) for s, text in zip(SAMPLES, texts)]
    problems, args = [Problem(i, "", "") for i in range(3)], flags("--updates-per-step", 1, "--grad-clip", 1e9)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    metrics = m_step(distribute(policy), optimizer, problems, samples, args)
    found = torch.cat([p.grad.flatten() for p in policy.parameters()])
    policy.zero_grad()
    length = np.mean([len(s.response_ids) for s in samples])
    for sample, advantage in zip(samples, group_advantages(samples, "grpo")):
        ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.response_ids])).long()[None]
        logprobs = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])
        total = logprobs[len(sample.prompt_ids) - 1 :].sum()
        (-advantage / (3 * [3, 2, 1][sample.problem] * length) * total).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert (found - expected).norm() < 1e-5 * expected.norm() and metrics["updates"] == 1


def test_without_advantages_only_the_kl_trains(device, model_and_tokenizer):
    policy, reference = Policy(model_and_tokenizer[0]), Policy(load_model(flags(), device)[0])
    with torch.no_grad():
        reference.model.get_output_embeddings().weight.mul_(0.9)
    equal, problems = [make_sample(0, 1.0, [9, 9]) for _ in range(2)], [Problem(0, "", "")]
    for kl_coef, updates in ((0.0, 0), (0.1, 1)):
        args = flags("--updates-per-step", 1, "--kl-coef", kl_coef)
        before = policy.model.get_output_embeddings().weight.clone()
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        metrics = m_step(distribute(policy), optimizer, problems, equal, args, reference if kl_coef else None)
        assert (metrics.get("updates", 0), metrics.get("updates_empty", 0)) == (updates, 1 - updates)
        assert torch.equal(policy.model.get_output_embeddings().weight, before) == (updates == 0)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps of grpo.py without interruption, on one rank and on two."""
    folders = {ranks: tmp_path_factory.mktemp("grpo") / str(ranks) for ranks in (1, 2)}
    for ranks, out in folders.items():
        run_script("grpo.py", *SMALL, "--out", out, ranks=ranks)
    return folders


@pytest.mark.slow
def test_one_rank_is_two_ranks(straight):
    one, two = (read_log(straight[ranks], drop=("seconds", "sampler_gap")) for ranks in (1, 2))  # rounding alone
    for a, b in zip(one, two, strict=True):
        assert same_log(a, b)
    ends = [parameters(straight[ranks], 4) for ranks in (1, 2)]
    assert distance(*ends) < 0.05 * distance(ends[0], load_model(flags(), torch.device("cpu"))[0].state_dict())
    assert one[-1]["samples"] == 128 and one[-1]["updates"] == 8 and 0 < one[1]["grad_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(straight, tmp_path, ranks):
    check_killed_and_resumed("grpo.py", SMALL, straight[ranks], tmp_path / "run", ranks)


@pytest.mark.slow
def test_training_helps_and_a_rule_that_does_not_fit_is_warned_of(tmp_path):
    done = run_script("grpo.py", "--steps", 20, "--out", tmp_path / "run")
    log = read_log(tmp_path / "run")
    assert log[-1]["eval_accuracy"] > log[0]["eval_accuracy"] + 0.05 and "warning" not in done.stdout
    done = run_script("raft.py", *SMALL[:-1], 1, "--allocator", "reward", "--out", tmp_path / "other")
    assert done.stdout.count("--allocator reward fits another gradient estimator; here gvm does") == 1
