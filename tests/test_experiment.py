"""figures/experiment.py: tuning and costs by hand, two steps of each method, the table of its README."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "figures"))

import experiment  # noqa: E402 (lies in figures/)


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


def test_costs_and_intervals_by_hand():
    curves = np.array([[[0, 0, 0, 0, 0.4], [1, 100, 0, 0, 0.5], [2, 200, 0, 0, 0.6]]] * 3)
    assert experiment.costs(curves, 1, 10) == "20, never"
    assert experiment.mean_and_interval(np.array([0.1, 0.2, 0.3]), 3) == "+0.200 ± 0.248"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic", "published", "rounds", "oracle", "released"])
def test_two_steps_of_each_method_spend_the_same(method):
    spec = record((3e-4, 16, 4), method=method)
    done = experiment.run(spec, steps=2, eval_samples=1)
    assert [(step, samples) for step, samples, *_ in done["curve"]] == [(0, 0), (2, 128)]


@pytest.mark.slow
def test_the_readme_has_the_tables_of_the_records():
    records, readme = experiment.read_records(experiment.RECORDS), (ROOT / "figures" / "README.md").read_text()
    assert len({tuple(record[name] for name in experiment.KEY) for record in records}) == len(records)
    missing, chosen = experiment.defaults(records)
    assert not missing and all(line in readme for line in f"{experiment.table(records)}\n{chosen}".splitlines())
