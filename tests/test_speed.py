"""figures/speed.py: costs, speed and areas by hand, what is run next, two steps of each method, README's table."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "figures"))

import speed  # noqa: E402 (lies in figures/)

CURVE = [[0, 0, 0, 0.4], [5, 100, 1000, 0.5], [10, 200, 2000, 0.6], [15, 300, 3000, 0.5]]


def record(stage="tune", method="published", rate=3e-4, seed=100, curve=CURVE) -> dict:
    return dict(zip(speed.KEY, (stage, "raft", method, rate, seed))) | {"curve": curve}


def test_what_a_run_costs_by_hand():
    assert speed.run_cost(CURVE, speed.TOKENS, 0.55) == pytest.approx(1500)
    assert speed.run_cost(CURVE, speed.SAMPLES, 0.55) == pytest.approx(150)
    assert speed.run_cost(CURVE, speed.TOKENS, 0.61) == speed.BUDGET[speed.TOKENS]  # never
    late = [[step, samples, 100 * tokens, accuracy] for step, samples, tokens, accuracy in CURVE]
    assert speed.run_cost(late, speed.TOKENS, 0.6) == speed.BUDGET[speed.TOKENS]  # after it has spent 200 thousand
    assert speed.run_cost(CURVE, speed.STEP, 0.5) == pytest.approx(5)
    costs = speed.run_costs([CURVE, CURVE], speed.TOKENS)
    assert costs == pytest.approx(np.array([[1500, 1800, 2000]] * 2))


def test_speed_and_area_by_hand():
    even, ours = np.array([[10.0, 20, 40], [30, 20, 40]]), np.array([[5.0, 10, 40], [15, 10, 40]])
    assert speed.speed(even, ours) == pytest.approx((2 * 2 * 1) ** (1 / 3))
    assert speed.with_interval(speed.speed, ours, ours) == "1.00 (1.00 to 1.00)"
    paired = speed.with_interval(speed.speed, even, even / 2)  # each pair says 2, however its runs differ
    assert paired == "2.00 (2.00 to 2.00)"
    line = [[0, 0, 0, 0.4], [1, 0, speed.BUDGET[speed.TOKENS], 0.6], [2, 0, 10**6, 0.9]]
    assert speed.mean_accuracy(line) == pytest.approx(0.5) and speed.points_above(np.array([0.5, 0.5]), np.array([0.6, 0.5])) == pytest.approx(5)


def test_the_rate_is_tuned_by_the_cost_in_tokens_before_anything_is_reported():
    dear = [[step, samples, 2 * tokens, accuracy] for step, samples, tokens, accuracy in CURVE]

    def tuning(*rates) -> list[dict]:
        return [record(rate=rate, seed=seed, curve=CURVE if rate == 1.5e-4 else dear) for rate in rates for seed in speed.TUNING_SEEDS]

    assert speed.tune([], "raft", "published") == ({1.5e-4, 3e-4}, None)
    assert speed.tune(tuning(1.5e-4, 3e-4), "raft", "published") == ({7.5e-5, 1.5e-4, 3e-4}, None)  # the best is on an edge
    records = tuning(7.5e-5, 1.5e-4, 3e-4)
    assert speed.tune(records, "raft", "published") == ({7.5e-5, 1.5e-4, 3e-4}, 1.5e-4)
    assert speed.tune(records[:-1], "raft", "published")[1] is None
    missing = speed.missing_runs(records[:-1], ["raft"], ["published"])
    assert [tuple(run.values()) for run in missing] == [("tune", "raft", "published", 3e-4, speed.TUNING_SEEDS[-1])]
    missing = speed.missing_runs(records, ["raft"], ["published"])
    assert [run["seed"] for run in missing] == list(speed.SEEDS) and {run["rate"] for run in missing} == {1.5e-4}
    assert not set(speed.SEEDS) & set(speed.TUNING_SEEDS)
    done = [record("report", rate=1.5e-4, seed=seed) for seed in speed.SEEDS[:-1]]
    assert len(speed.missing_runs(records + done, ["raft"], ["published"])) == 1
    others = [record("report", rate=3e-4, seed=7)]
    assert speed.records_of(records + done + others, "report", "raft", "published").keys() == set(speed.SEEDS[:-1])


def test_a_row_of_the_table_by_hand():
    """Twice the tokens of CURVE's runs in half of the steps, each of which takes three times as long."""
    dear = [[step / 2, samples / 2, 2 * tokens, accuracy] for step, samples, tokens, accuracy in CURVE]
    records = []
    for method, curve, seconds in (("uniform", CURVE, 0.1), ("published", dear, 0.3)):
        records += [record(method=method, rate=rate, seed=seed, curve=curve if rate == 3e-4 else CURVE[:1])
                    for rate in (1.5e-4, 3e-4, 6e-4) for seed in speed.TUNING_SEEDS]
        records += [record("report", method, seed=seed, curve=curve) for seed in (400, 401)]
        records.append(record("time", method) | {"seconds_a_step": seconds})
    uniform, published = speed.table(records).splitlines()[2:]
    assert uniform == "| raft | uniform, 2 seeds | 0.0003, none | 2, 2, 2 | 0%, 0%, 0% | 0.100 | 0.500 | 1 | 1 | 1 | 0 |"
    cells = published.split(" | ")
    assert cells[2:7] == ["0.0003, 2, 0.001", "3, 4, 4", "0%, 0%, 0%", "0.300", "0.500"]
    assert [cell.split()[0] for cell in cells[7:10]] == ["0.50", "0.67", "2.00"]  # in tokens, seconds, samples
    short = [line.strip("| ").split(" | ") for line in speed.table(records, speed.SHORT).splitlines()]
    assert short[2] == ["raft", "uniform, 2 seeds", "2, 2, 2", "1", "1", "1", "0"] and short[3][3] == cells[7] and len(short) == 4
    assert speed.table(records[: len(records) // 2]).count("uniform") == 1 and speed.table([]).count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", speed.METHODS)
def test_two_steps_of_each_method_spend_the_same(method):
    done = speed.run(record("time", method, seed=0), parts=((1, 1), (2, 1)), eval_samples=1)
    assert [(step, samples) for step, samples, *_ in done["curve"]] == [(0, 0), (1, 64), (2, 128)]
    assert 0 < done["seconds_a_step"] < 60


@pytest.mark.slow
def test_the_readmes_have_the_tables_of_the_records():
    records, front = speed.read_rows(speed.RECORDS), (ROOT / "README.md").read_text()
    assert len({tuple(record[name] for name in speed.KEY) for record in records}) == len(records)
    readme = (ROOT / "figures" / "README.md").read_text()
    assert all(line in readme for line in speed.table(records).splitlines())
    assert all(line in front for line in speed.table(records, speed.SHORT).splitlines())


@pytest.mark.slow
def test_the_first_screen_says_what_the_records_say():
    front = " ".join((ROOT / "README.md").read_text().split())  # sentences run over lines
    rows = {(row[0], row[1].split(",")[0]): row for row in speed.rows_of(speed.read_rows(speed.RECORDS))}
    in_tokens = {key: row[7].replace("(", "").replace(")", "").split(" ", 1) for key, row in rows.items() if key[1] != "uniform"}
    (raft, raft_range), (grpo, grpo_range) = in_tokens["raft", "published"], in_tokens["grpo", "published"]
    seeds = [rows[objective, "uniform"][1].split()[1] for objective in ("raft", "grpo")]
    assert (f"{raft} times fewer response **tokens** than equal counts for RAFT (95 % interval over {seeds[0]} pairs of seeds for RAFT, "
            f"{seeds[1]} for GRPO: {raft_range}) and {grpo} for GRPO ({grpo_range})") in front
    assert f"it is {rows['raft', 'wider pool'][7]} and {rows['grpo', 'wider pool'][7]}:" in front
    quick = [rows[key][8].split()[0] for key in (("raft", "published"), ("grpo", "published"), ("raft", "wider pool"), ("grpo", "wider pool"))]
    assert "the published method is {} and {} times as fast as equal counts, the other {} and {}.".format(*quick) in front
