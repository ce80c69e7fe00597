"""figures/methods.py: what samples say of p by hand and against a known prior, and budgets that are spent in rounds."""

import sys

import numpy as np
import pytest
from conftest import ROOT, make_sample, settled

from allocator import allocate, estimator_variance, gvm_weights, reward_weights
from gvm import SampleSource

sys.path.insert(0, str(ROOT / "figures"))

from methods import draw_in_rounds, posterior_weights  # noqa: E402 (lies in figures/)


def expected_rate(right, drawn) -> np.ndarray:
    """The posterior mean of p, through posterior_weights: a rule whose weight is sqrt(p)."""
    ones = np.ones(len(right))
    return posterior_weights(lambda p, *norms: np.sqrt(p), right, drawn, ones, ones) ** 2


def test_the_posterior_is_as_good_as_one_that_knows_the_prior():
    rng = np.random.default_rng(0)
    for a, b in ((2.0, 5.0), (0.5, 0.5), (0.3, 2.0)):
        p = rng.beta(a, b, 3000)
        right = rng.binomial(4, p)
        found, best = expected_rate(right, np.full(3000, 4)), (right + a) / (4 + a + b)
        assert np.mean((found - p) ** 2) < 1.02 * np.mean((best - p) ** 2) < 0.9 * np.mean((right / 4 - p) ** 2)


def test_the_posterior_learns_from_all_prompts_and_from_many_samples():
    assert expected_rate([0, 30, 90], [100, 100, 100]) == pytest.approx([0.0, 0.3, 0.9], abs=0.02)
    assert expected_rate([1, 50_000], [2, 100_000]) == pytest.approx([0.5, 0.5], abs=0.02)
    few = expected_rate([0] + [0] * 20, [2] * 21)[0], expected_rate([0] + [2] * 20, [2] * 21)[0]
    assert 0 < few[0] < 0.05 < 0.15 < few[1]  # unsolved among the unsolved, and among the solved
    rates = expected_rate([0, 1, 2, 3, 4], [4] * 5)
    assert (np.diff(rates) > 0).all() and rates == pytest.approx(1 - rates[::-1])
    order = np.array([3, 0, 4, 1, 2])
    assert expected_rate(order, [4] * 5) == pytest.approx(rates[order])


def test_posterior_weights_never_starve_and_fill_in_the_norms():
    def rule(p, right, wrong):
        return gvm_weights(p, right)

    weights = posterior_weights(rule, [0, 2, 2], [4, 4, 4], [0.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert weights.min() > 0 and weights[2] / weights[1] == pytest.approx(5 / 3)
    typical = posterior_weights(rule, [0, 2, 2], [4, 4, 4], [9.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert typical == pytest.approx(weights)  # sqrt((9 + 25) / 2) stands in for whatever the unsolved one says
    rewards = posterior_weights(lambda *known: reward_weights(*known), [4, 2], [4, 4], [1.0, 1.0], [0.0, 2.0])
    assert rewards.min() > 0  # always right so far
    unsolved = posterior_weights(rule, [0, 0], [1, 1], [0.0, 0.0], [1.0, 1.0])
    assert unsolved.tolist() == [0, 0] and posterior_weights(rule, [], [], [], []).tolist() == []
    given = np.array([0.0, 3.0])
    posterior_weights(rule, [0, 1], [2, 2], given, given)
    assert given.tolist() == [0.0, 3.0]  # arguments are left alone


def population(rng, prompts: int = 200):
    """p, G+, G-: a quarter never solved, a quarter nearly always, the others Beta(0.7, 1)."""
    kind = rng.random(prompts)
    p = np.where(kind < 0.25, 0.0, np.where(kind < 0.5, rng.beta(30, 1, prompts), rng.beta(0.7, 1, prompts)))
    return p, *np.exp(0.3 * rng.normal(size=(2, prompts)))


def spend(rng, p, right, wrong, rule, budget: int, pilot: int, rounds: int, shrink: bool) -> np.ndarray:
    """The counts after a pilot and some rounds, for prompts with these acceptance rates and norms."""
    solved_before = np.cumsum(rng.random((len(p), 4000)) < p[:, None], axis=1)
    counts = np.full(len(p), pilot)
    for rounds_left in range(rounds, 0, -1):
        solved = solved_before[np.arange(len(p)), counts - 1]
        norms = np.where(solved > 0, right, 0.0), np.where(solved < counts, wrong, 0.0)
        weights = posterior_weights(rule, solved, counts, *norms) if shrink else rule(solved / counts, *norms)
        goal = counts.sum() + (budget * len(p) - counts.sum()) // rounds_left
        counts = allocate(weights, goal, min_samples=counts)
    return counts


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("pilot", [1, 2, 4, 8])
@pytest.mark.parametrize("rule", ["gvm", "reward"])
def test_shrinkage_is_safe_where_the_pilot_s_rates_mislead(rule, pilot, rounds):
    """Mean gain in the true sum_i c_i / n_i over uniform, at 16 samples a prompt, over 8 populations of 200."""
    weigh = {"gvm": lambda p, right, wrong: gvm_weights(p, right),
             "reward": lambda p, right, wrong: reward_weights(p, right, wrong)}[rule]
    gains = {True: [], False: []}
    for seed in range(8):
        for shrink in gains:
            rng = np.random.default_rng(seed)
            p, right, wrong = population(rng)
            counts = spend(rng, p, right, wrong, weigh, 16, pilot, rounds, shrink)
            moments = np.zeros(200)  # alpha = 0 and known p: what the estimator really has
            moments[p > 0] = weigh(p, right, wrong)[p > 0] ** 2 if rule == "reward" else right[p > 0] ** 2 / p[p > 0]
            uniform = estimator_variance(np.full(200, 16), moments)
            gains[shrink].append(uniform / estimator_variance(counts, moments))
    print(f"{rule} pilot {pilot} rounds {rounds}: {np.mean(gains[True]):.2f}, plug-in {np.mean(gains[False]):.2f}")
    assert np.mean(gains[True]) > (1.15 if rule == "gvm" else 1.0 if rounds == 1 else 1.25)
    assert np.mean(gains[True]) > np.mean(gains[False]) - 0.01
    if rule == "gvm":
        assert np.mean(gains[False]) < 0.8


def test_rounds_each_take_an_equal_part_and_learn_from_the_last(problems):
    """Problem i is right with probability i / 8, drawn from a table instead of a model."""
    luck, requests, with_norms = np.random.default_rng(0).random((9, 500)), [], []
    args = settled("--samples-per-prompt", 9)

    class Table(SampleSource):
        def sample_and_grade(self, _, counts, step, first_index=0, **options):
            requests.append(counts)
            with_norms.append(options["with_norms"])
            starts = np.broadcast_to(first_index, 9)
            return [make_sample(problems[i].id, float(luck[i, j] < i / 8), [1] * (i + 1), head_grad_norm=1.0 + i)
                    for i in range(9) for j in range(starts[i], starts[i] + counts[i])]

    samples = draw_in_rounds(problems[:9], 1, Table(None, None, None, args), args)
    assert [counts.sum() for counts in requests] == [18, 21, 21, 21] and len(samples) == 81
    assert with_norms == [True, True, True, False]  # nothing is planned after the last
    before = sum(requests[:-1])
    right = np.array([sum(luck[i, : before[i]] < i / 8) for i in range(9)])
    norms = np.where(right > 0, 1.0 + np.arange(9), 0), np.where(right < before, 1.0 + np.arange(9), 0)
    weights = posterior_weights(lambda p, right, wrong: gvm_weights(p, right, args.alpha, args.beta), right, before, *norms)
    assert (sum(requests) == allocate(weights, 81, before)).all()
