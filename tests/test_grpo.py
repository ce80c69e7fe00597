"""grpo.py: advantages and weights by hand, and runs that differ from raft.py's by them alone."""

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
from model import Policy, load_model
from grpo import group_advantages, grpo_objective

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
        totals = {"loo": 0.0, "dr": 0.0}
        for bits in range(2**n):
            rewards = [float(bits >> j & 1) for j in range(n)]
            probability = np.prod([0.3 if reward else 0.7 for reward in rewards])
            group = [make_sample(0, reward, [1]) for reward in rewards]
            for kind in totals:
                totals[kind] += probability * np.mean(group_advantages(group, kind) * (np.array(rewards) - 0.3))
        assert totals["loo"] == pytest.approx(0.21) and totals["dr"] == pytest.approx(0.21 * (n - 1) / n)


@pytest.mark.parametrize(("weighting", "expected"), [
    ("prompt", [1 / 27, 1 / 18, 1 / 27, 1 / 27, 1 / 9, 1 / 18]),  # 1 / (m n_i L), m = 3, mean length L = 3
    ("token", [1 / 18] * 6),
    ("sequence", [1 / 6, 1 / 18, 1 / 12, 1 / 24, 1 / 30, 1 / 18]),  # 1 / (6 T)
])
def test_weights_by_hand(weighting, expected):
    advantages, used = grpo_objective(SAMPLES, flags("--advantage", "loo"))
    weights = loss_weights(SAMPLES, used, 3, weighting)
    assert weights == pytest.approx(expected) and advantages.tolist() == [1, 0, -0.5, -0.5, 0, 0]


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
