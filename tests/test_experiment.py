"""figures/experiment.py and methods.py: tuning, ratios, predictions by hand; methods' two steps; README's table."""

import sys
from itertools import product

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "figures"))

import experiment  # noqa: E402 (lies in figures/)
import methods  # noqa: E402


def record(setting=(3e-4, 16, 4), seed=100, accuracy=0.5, stage="tune", method="rounds") -> dict:
    key = (stage, "raft", method, "usual", *setting, seed)
    return dict(zip(experiment.KEY, key)) | {"curve": [[0, 0, 0, 0.0, 0.4], [120, 100, 1000, 9.0, accuracy]]}


def test_the_rate_is_tuned_first_and_then_the_split():
    records = [record((rate, 16, 4), seed, accuracy) for seed in experiment.TUNING_SEEDS
               for rate, accuracy in zip(experiment.RATES, (0.5, 0.6, 0.4))]
    rates = [(rate, 16, 4) for rate in experiment.RATES]
    assert experiment.tune(records[:-1], "raft", "rounds") == (rates, None)  # one run is missing
    settings, best = experiment.tune(records, "raft", "rounds")
    assert settings == [*rates, (experiment.RATES[1], 8, 8), (experiment.RATES[1], 32, 2)] and best is None
    missing = experiment.wanted(records, ["raft"], ["rounds"], ["usual"])
    assert {spec["stage"] for spec in missing} == {"tune"} and len(missing) == 4
    records += [record(setting, seed, 0.61) for setting in settings[3:4] for seed in experiment.TUNING_SEEDS]
    records += [record(setting, seed, 0.59) for setting in settings[4:] for seed in experiment.TUNING_SEEDS]
    assert experiment.tune(records, "raft", "rounds")[1] == settings[3]
    reported = experiment.wanted(records, ["raft"], ["rounds"], ["usual"])
    assert [spec["seed"] for spec in reported] == list(range(10)) and reported[0]["prompts"] == 8
    done = [record(settings[3], seed, stage="report") for seed in range(9)]
    assert len(experiment.wanted(records + done, ["raft"], ["rounds"], ["usual"])) == 1


def test_crossings_and_speed_by_hand():
    slow = np.array([[[0, 0, 0, 0, 0.4], [1, 100, 0, 0, 0.5], [2, 200, 0, 0, 0.6]]] * 3)
    fast = np.array([[[0, 0, 0, 0, 0.4], [1, 100, 0, 0, 0.6], [2, 200, 0, 0, 0.7]]] * 3)
    assert experiment.crossing(slow, 1, 0.55) == pytest.approx(150)
    assert experiment.crossing(slow, 1, 0.9) == np.inf
    assert experiment.speedup(fast, slow, 1) == "2.00 (2.00 to 2.00)"
    assert experiment.interval(np.array([0.1, 0.2, 0.3])) == "+0.200 ± 0.248"


def cost(weights: np.ndarray, counts, smallest: int) -> float:
    """What allocate_or_leave minimises: a variance for each prompt that is served, a price for each other."""
    informative = np.array(counts) - smallest + 1
    return sum(w**2 / k if k > 0 else methods.LEFT_OUT * w**2 for w, k in zip(weights, informative))


def test_samples_or_none_by_hand():
    # Gains a sample: 1.5 w^2 for a pair, then w^2/2, w^2/6, ...: 13.5 and 6 for pairs, 4.5, 2, 1.5, and 1.5 for a pair.
    weights = np.array([3.0, 1.0, 2.0, 0.5])
    assert methods.allocate_or_leave(weights, 4, smallest=2).tolist() == [2, 0, 2, 0]
    assert methods.allocate_or_leave(weights, 9, smallest=2).tolist() == [4, 2, 3, 0]
    assert methods.allocate_or_leave(weights, 5, smallest=1).tolist() == [2, 1, 2, 0]  # 27, 12, 4.5, 3, 2, 1.5
    assert methods.allocate_or_leave(weights, 1, smallest=2).tolist() == [0, 0, 0, 0]  # it would tell nothing


@pytest.mark.parametrize(("smallest", "is_best", "worst"), [(1, 1.0, 1.0), (2, 0.8, 1.15)])
def test_samples_or_none_against_brute_force(smallest, is_best, worst):
    generator, ratios = np.random.default_rng(0), []
    for _ in range(200):
        weights, budget = np.exp(generator.normal(size=4)), int(generator.integers(smallest, 11))
        found = methods.allocate_or_leave(weights, budget, smallest)
        assert found.sum() in (budget, budget - 1) and not ((found > 0) & (found < smallest)).any()
        every = [counts for counts in product(range(budget + 1), repeat=4) if sum(counts) <= budget]
        ratios.append(cost(weights, found, smallest) / min(cost(weights, counts, smallest) for counts in every))
    print(f"smallest {smallest}: best in {np.mean(np.array(ratios) < 1 + 1e-9):.0%} of cases, at worst {max(ratios):.3f}")
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= is_best and max(ratios) < worst + 1e-9


def test_regressions_find_the_most_likely_coefficients():
    generator = np.random.default_rng(0)
    features, drawn = generator.normal(size=(40, 3)), generator.integers(1, 5, 40)
    targets = generator.normal(size=40)
    linear = methods.Regression(methods.linear, 3)
    linear.learn(features, targets, np.ones(40))
    inverse = np.linalg.inv(features.T @ features + methods.RIDGE * np.eye(3))
    assert linear.mean == pytest.approx(inverse @ features.T @ targets)
    assert linear.predict(features)[1] == pytest.approx(np.diag(features @ inverse @ features.T))
    shares, logistic = generator.binomial(drawn, 0.3) / drawn, methods.Regression(methods.logistic, 3)
    logistic.learn(features, shares, drawn)
    p = methods.logistic(features @ logistic.mean)[0]
    slope = features.T @ (drawn * (shares - p)) - methods.RIDGE * logistic.mean
    assert slope == pytest.approx(np.zeros(3), abs=1e-9)


def test_the_predictor_learns_what_separates_prompts():
    generator, predictor = np.random.default_rng(0), methods.Predictor()
    for step in range(30):
        states = generator.normal(size=(16, 5))
        p, drawn = methods.logistic(3 * states[:, 0])[0], np.where(np.arange(16) < 12, 4, 0)  # four are left out
        features = predictor.features(states)
        mu, _, norm_right, _ = predictor.predict(features)
        right = generator.binomial(drawn, p)
        norms = np.where(right > 0, np.exp(states[:, 1]), 0.0)
        predictor.learn(features, mu, {"num_right": right, "num_drawn": drawn, "norm_right": norms, "norm_wrong": 0 * p})
    assert np.corrcoef(mu, p)[0, 1] > 0.9 and np.corrcoef(norm_right, np.exp(states[:, 1]))[0, 1] > 0.9
    assert methods.STRENGTHS[predictor.log_evidence.argmax()] > 1  # a prediction that holds is believed


def test_a_prior_is_the_beta_that_it_should_be():
    beta = methods.betas(np.array([0.25]))[4, 0]  # kappa = 4
    p = np.exp(methods.LOG_P)
    assert methods.STRENGTHS[4] == pytest.approx(4) and beta @ p == pytest.approx(0.25, abs=1e-3)
    assert beta @ p**2 == pytest.approx(1 * 2 / (4 * 5), abs=1e-3)  # E[p^2] of Beta(1, 3)


@pytest.mark.parametrize("method", ["dynamic", "predicted", "wider pool", "oracle", "released"])
def test_two_steps_of_each_method_spend_the_same(method):
    spec = record((3e-4, 16, 4), method=method)
    done = experiment.run(spec, steps=2, eval_samples=1)
    assert [(step, samples) for step, samples, *_ in done["curve"]] == [(0, 0), (2, 128)]


def test_the_readme_has_the_table_of_the_records():
    records, readme = experiment.read(experiment.RECORDS), (ROOT / "README.md").read_text()
    assert len({tuple(record[name] for name in experiment.KEY) for record in records}) == len(records)
    lines = experiment.table(records).splitlines()
    assert all(line in readme for line in lines)
    (samples, tokens), = [line.strip("| ").split(" | ")[-2:] for line in lines if line.startswith("| grpo | usual | wider")]
    interval = "95 % interval " + samples.split(" (")[1].rstrip(")")
    assert f"with {samples.split()[0]} times fewer samples" in readme and interval in readme
    assert f"and {tokens.split()[0]} times fewer *tokens*" in readme
