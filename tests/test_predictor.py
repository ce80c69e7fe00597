"""predictor.py: regressions by hand and where the slope is zero, what is learnt, and who is served."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from allocator import gvm_weights
from predictor import Predictor, allocate_or_leave, first_precision, logistic, regress


def test_a_regression_finds_the_most_likely_coefficients():
    generator = np.random.default_rng(0)
    features, drawn = generator.normal(size=(40, 3)), generator.integers(1, 5, 40)
    right, first = generator.binomial(drawn, 0.3), np.diag([2 / 1.6**2, 2 / 1.6**2, 0.25])
    mean, precision = regress((np.zeros(3), first), features, right, drawn)
    p = logistic(features @ mean)
    assert features.T @ (right - drawn * p) - first @ mean == pytest.approx(np.zeros(3), abs=1e-9)  # the slope
    assert precision == pytest.approx((features.T * (drawn * p * (1 - p))) @ features + first, rel=1e-4)


def test_a_regression_survives_a_policy_that_turns_round():
    """Newton's step from where it was sure and is wrong is far too long: undamped, it never comes back."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(1000, 20))
    rates, drawn = logistic(4 * features @ generator.normal(size=20)), np.full(1000, 8)
    known = np.zeros(20), first_precision(20)
    for p in [rates] * 10 + [1 - rates] * 5:
        known = regress(known, features, generator.binomial(drawn, p), drawn)
    assert np.mean(np.abs(logistic(features @ known[0]) - (1 - rates))) < 0.3


def test_a_regression_forgets_and_goes_on_from_what_it_knew():
    features, known = np.eye(2), (np.array([1.0, 2.0]), np.diag([100.0, 100.0]))
    mean, precision = regress(known, features, np.array([1, 0]), np.array([1, 0]))
    first, intercept = 0.98 * 100 + 0.02 * 1 / 1.6**2, 0.98 * 100 + 0.02 / 4
    p = logistic(mean[0])
    assert precision == pytest.approx(np.diag([first + p * (1 - p), intercept]))
    assert first * (mean[0] - 1) == pytest.approx(1 - p) and mean[1] == 2.0  # without a sample it stays as it was


def outcomes(generator, p, drawn) -> tuple:
    """(num_right, num_drawn)."""
    return generator.binomial(drawn, p), drawn


def teach(predictor: Predictor, generator, steps: int = 30) -> tuple:
    """The last step's (p, what was predicted): p depends on one state."""
    for _ in range(steps):
        states = generator.normal(size=(16, 5))
        p, drawn = logistic(3 * states[:, 0]), np.where(np.arange(16) < 12, 4, 0)  # four are left out
        features = predictor.features(states)
        predicted = predictor.predict(features)
        predictor.learn(features, *outcomes(generator, p, drawn))
    return p, predicted


def test_the_predictor_learns_what_separates_prompts():
    predictor = Predictor({})
    p, predicted = teach(predictor, np.random.default_rng(0))
    assert np.corrcoef(predicted, p)[0, 1] > 0.9


@pytest.mark.parametrize("p, error", [(0.02, 0.015), (0.5, 0.07), (0.98, 0.015)])
def test_a_base_rate_is_known_after_two_steps_of_64_samples(p, error):
    """The intercept is not held at p = 1/2: without a difference between prompts, predicted is the share of right samples."""
    found = []
    for seed in range(8):
        generator, predictor = np.random.default_rng(seed), Predictor({})
        for _ in range(2):
            features = predictor.features(generator.normal(size=(16, 256)))
            predictor.learn(features, *outcomes(generator, np.full(16, p), np.full(16, 4)))
        features = predictor.features(generator.normal(size=(64, 256)))
        found.append(predictor.predict(features).mean())
    assert np.mean(found) == pytest.approx(p, abs=error)


def test_prompts_that_one_number_tells_apart_for_good():
    """p is 0 or 1 by the sign of a state: the likeliest coefficients are infinite, and the prior keeps them from it."""
    generator, predictor = np.random.default_rng(0), Predictor({})
    for _ in range(50):
        states = generator.normal(size=(16, 5))
        features = predictor.features(states)
        predicted = predictor.predict(features)
        predictor.learn(features, *outcomes(generator, (states[:, 0] > 0).astype(float), np.full(16, 4)))
    assert np.mean(np.abs(predicted - (states[:, 0] > 0))) < 0.1


def test_one_prompt_a_step_teaches_as_well():
    generator, predictor = np.random.default_rng(0), Predictor({})
    predictor.features(generator.normal(size=(64, 5)))  # the first states set the scale
    for _ in range(300):
        states = generator.normal(size=(1, 5))
        features = predictor.features(states)
        predicted = predictor.predict(features)
        predictor.learn(features, *outcomes(generator, logistic(3 * states[:, 0]), np.array([4])))
    states = generator.normal(size=(200, 5))
    predicted = predictor.predict(predictor.features(states))
    assert np.corrcoef(predicted, logistic(3 * states[:, 0]))[0, 1] > 0.9


def test_what_the_predictor_has_learnt_goes_through_json():
    one, generator = Predictor({}), np.random.default_rng(0)
    teach(one, generator)
    two = Predictor(json.loads(json.dumps({name: array.tolist() for name, array in one.learnt.items()})))
    states = generator.normal(size=(16, 5))
    for predictor in (one, two):
        teach(predictor, np.random.default_rng(1), steps=2)
    for name, array in one.learnt.items():
        assert (two.learnt[name] == array).all(), name
    assert (one.features(states) == two.features(states)).all()


def test_features_by_hand():
    predictor = Predictor({})
    states = np.array([[1.0, 5.0], [3.0, 5.0]])
    assert predictor.features(states) == pytest.approx(np.array([[-1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]), abs=1e-5)
    assert predictor.features(states[:1] + [2, 1]) == pytest.approx(np.array([[1.0, 10.0, 1.0]]), abs=1e-5)  # an outlier is cut
    predictor.learnt["mean"] = np.array([2.0, 1.0, -1.0])
    p = predictor.predict(np.array([[1.0, 0.0, 1.0], [-500.0, 0.0, 1.0], [500.0, 0.0, 1.0]]))
    assert p == pytest.approx([1 / (1 + np.exp(-1.0)), 0.0, 1.0])
    assert np.isfinite(gvm_weights(p, np.ones(3), alpha=1e-3)).all()  # p may be smaller than any sample can show


def test_a_huge_state_does_not_drown_the_others_where_there_are_many():
    """One of 600 states is a million times as large, and says nothing; the others lie in two groups."""
    generator, group = np.random.default_rng(0), np.arange(32) % 2
    states = generator.normal(size=(32, 600)) + 3 * np.outer(group, generator.normal(size=600))
    states[:, 0] = 1e6 * generator.normal(size=32)
    predictor = Predictor({})
    features = predictor.features(states)[:, :-1]
    assert (features == predictor.features(states)[:, :-1]).all()  # the same random sums in every step
    assert features.shape == (32, 256) and features.std() == pytest.approx(1, abs=0.1)
    alike = np.corrcoef(features)
    assert alike[0, 2::2].min() > 0.3 and alike[0, 1::2].max() < -0.3  # else the huge one decides: 1 and -1 at random


def test_a_prompt_with_states_that_are_not_finite_is_a_mean_one():
    predictor, nan = Predictor({}), np.full((1, 2), np.nan)
    states = np.array([[1.0, 5.0], [np.inf, 5.0], [3.0, 5.0]])
    assert predictor.features(states) == pytest.approx(np.array([[-1.0, 0, 1], [0, 0, 1], [1, 0, 1]]), abs=1e-5)
    assert predictor.features(nan).tolist() == [[0.0, 0.0, 1.0]]
    many = Predictor({}).features(np.vstack([np.random.default_rng(0).normal(size=(9, 300)), np.full(300, np.nan)]))
    assert np.isfinite(many).all() and not many[-1, :-1].any() and many[:-1].std() > 0.5
    with pytest.raises(ValueError, match="the states of all prompts are NaN or infinite"):
        Predictor({}).features(nan)


@pytest.mark.parametrize("change", [
    {"centre": [0.0]}, {"mean": [0.0] * 4}, {"precision": [[1.0]]}, {"scale": "wide"},
    {"scale": [[1.0], [1.0, 2.0]]}, {"unknown": 0.0}])
def test_what_another_predictor_has_learnt_is_refused(change):
    predictor, states = Predictor({}), np.random.default_rng(0).normal(size=(3, 2))
    predictor.features(states)
    Predictor(predictor.learnt).features(states)
    with pytest.raises(ValueError):
        Predictor(predictor.learnt | change).features(states)
    with pytest.raises(ValueError, match="not for states like these"):
        Predictor({name: array for name, array in predictor.learnt.items() if name != "mean"}).features(states)


def test_it_imports_numpy_alone():
    program = "import sys, predictor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_the_docstring_s_steps_in_your_project():
    """Features, weights, counts, samples, learning: the budget goes to the prompts that are known to be hard."""
    generator, predictor = np.random.default_rng(0), Predictor({})
    for _ in range(20):
        states = generator.normal(size=(32, 6))
        is_hard = states[:, 0] > 0
        features = predictor.features(states)
        p = predictor.predict(features)
        weights = gvm_weights(p, np.ones(len(p)))
        counts = allocate_or_leave(weights, budget=64, smallest=2)
        num_right = generator.binomial(counts, np.where(is_hard, 0.2, 0.95))
        predictor.learn(features, num_right, counts)
    assert counts.sum() == 64 and counts[is_hard].mean() > 1.5 * counts[~is_hard].mean()


def cost(weights: np.ndarray, counts, smallest: int) -> float:
    """What allocate_or_leave minimises: a variance for each prompt that is served, a price for each other."""
    informative = np.array(counts) - smallest + 1
    return sum(w**2 / k if k > 0 else 4 * w**2 for w, k in zip(weights, informative))


def test_samples_or_none_by_hand():
    # Gains a sample: 1.5 w^2 for a pair, then w^2/2, w^2/6, ...: 13.5 and 6 for pairs, 4.5, 2, 1.5, and 1.5 for a pair.
    weights = np.array([3.0, 1.0, 2.0, 0.5])
    assert allocate_or_leave(weights, 4, smallest=2).tolist() == [2, 0, 2, 0]
    assert allocate_or_leave(weights, 9, smallest=2).tolist() == [4, 2, 3, 0]
    assert allocate_or_leave(weights, 5, smallest=1).tolist() == [2, 1, 2, 0]  # 27, 12, 4.5, 3, 2, 1.5
    assert allocate_or_leave(weights, 1, smallest=2).tolist() == [0, 0, 0, 0]  # it would tell nothing
    assert allocate_or_leave(np.zeros(3), 7, smallest=1).tolist() == [3, 2, 2]  # evenly
    assert allocate_or_leave(weights * 1e200, 9, smallest=2).tolist() == [4, 2, 3, 0]
    for bad in ([-1.0], [np.nan], [np.inf], [[1.0]]):
        with pytest.raises(ValueError, match="weights"):
            allocate_or_leave(bad, 2, smallest=1)
    with pytest.raises(ValueError, match="budget"):
        allocate_or_leave(weights, -1, smallest=1)


@pytest.mark.parametrize(("smallest", "is_best", "worst"), [(1, 1.0, 1.0), (2, 0.8, 1.15)])
def test_samples_or_none_against_brute_force(smallest, is_best, worst):
    generator, ratios = np.random.default_rng(0), []
    for _ in range(200):
        weights, budget = np.exp(generator.normal(size=4)), int(generator.integers(smallest, 11))
        found = allocate_or_leave(weights, budget, smallest)
        assert found.sum() == budget and not ((found > 0) & (found < smallest)).any()
        every = [counts for counts in itertools.product(range(budget + 1), repeat=4) if sum(counts) <= budget]
        ratios.append(cost(weights, found, smallest) / min(cost(weights, counts, smallest) for counts in every))
    print(f"smallest {smallest}: best in {np.mean(np.array(ratios) < 1 + 1e-9):.0%} of cases, at worst {max(ratios):.3f}")
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= is_best and max(ratios) < worst + 1e-9
