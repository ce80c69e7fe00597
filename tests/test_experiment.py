"""figures/experiment.py: tuning and ratios by hand, two steps of each method, README's table."""

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


def test_crossings_and_speed_by_hand():
    slow = np.array([[[0, 0, 0, 0, 0.4], [1, 100, 0, 0, 0.5], [2, 200, 0, 0, 0.6]]] * 3)
    fast = np.array([[[0, 0, 0, 0, 0.4], [1, 100, 0, 0, 0.6], [2, 200, 0, 0, 0.7]]] * 3)
    assert experiment.crossing(slow, 1, 0.55) == pytest.approx(150)
    assert experiment.crossing(slow, 1, 0.9) == np.inf
    assert experiment.costs(slow, 1, 10) == "20, never"
    assert experiment.speedup(fast, slow, 1) == "2.00 (2.00 to 2.00)"
    assert experiment.interval(np.array([0.1, 0.2, 0.3])) == "+0.200 ± 0.248"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamic", "published", "rounds", "predicted", "wider pool", "oracle", "released"])
def test_two_steps_of_each_method_spend_the_same(method):
    spec = record((3e-4, 16, 4), method=method)
    done = experiment.run(spec, steps=2, eval_samples=1)
    assert [(step, samples) for step, samples, *_ in done["curve"]] == [(0, 0), (2, 128)]


@pytest.mark.slow
def test_the_readmes_have_the_tables_of_the_records():
    records, front = experiment.read(experiment.RECORDS), (ROOT / "README.md").read_text()
    readme = (ROOT / "figures" / "README.md").read_text()
    assert len({tuple(record[name] for name in experiment.KEY) for record in records}) == len(records)
    lines, short = experiment.table(records).splitlines(), experiment.short_table(records).splitlines()
    assert all(line in readme for line in lines) and all(line in front for line in short)
    assert len(short) == 10  # eight rows
    missing, chosen = experiment.defaults(records)
    assert not missing and all(line in readme for line in chosen.splitlines())
    front, readme = " ".join(front.split()), " ".join(readme.split())  # sentences run over lines
    cells = {tuple(line.strip("| ").split(" | ")[:3:2]): line.strip("| ").split(" | ") for line in lines if "| usual |" in line}
    grpo, raft, wider = (cells[key] for key in (
        ("grpo", "published, 10 seeds"), ("raft", "published, 10 seeds"), ("grpo", "wider pool, 10 seeds")))
    (grpo_tokens, grpo_interval), (raft_tokens, raft_interval) = (row[9][:-1].split(" (") for row in (grpo, raft))
    assert (f"{grpo_tokens} times fewer response **tokens** for GRPO (95 % interval over ten pairs of seeds: "
            f"{grpo_interval}), and {raft_tokens} for RAFT ({raft_interval}, so that") in front
    assert f"In **samples** it is {grpo[8].split()[0]} and {raft[8].split()[0]}." in front
    assert f"GRPO's {wider[8].split()[0]} times fewer samples are {wider[9].split()[0]} times fewer tokens" in readme
    rows = [line.strip("| ").split(" | ") for line in experiment.table(records, most_seeds=5).splitlines()[2:]]
    five = {(row[0], row[2].removesuffix(", 5 seeds")): row for row in rows if row[1] == "usual"}  # the oracle's seeds
    known, found, even = (five["raft", method] for method in ("oracle", "wider pool", "uniform"))
    to_60 = [row[4].split(",")[0] for row in (known, found, even)]
    assert "after {} samples with the *oracle*, {} with predictions and {} with *uniform*".format(*to_60) in readme
    assert f"speed with predictions is {found[8]}, against {known[8].split()[0]}." in readme
    known, found = five["grpo", "oracle"], five["grpo", "wider pool"]
    assert f"falls behind later: {found[6]} at the end, against {known[6]}" in readme
    assert known[8].split()[0] == found[8].split()[0] and f"{found[8].split()[0]} times sooner" in readme
