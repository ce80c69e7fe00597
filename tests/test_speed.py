"""figures/measure.py, tuning.py, speed.py, speed_table.py: costs, speed and areas by hand, what is run next, steps of each method, README's tables."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "figures"))

import real_gradient  # noqa: E402 (all lie in figures/)
import speed  # noqa: E402
import speed_table  # noqa: E402
import tuning  # noqa: E402
from measure import SAMPLES, STEP, TOKENS, first_reached, mean_and_interval, mixed_pairs  # noqa: E402
from measure import points_above, run_costs, speedup, with_interval  # noqa: E402

CURVE = [[0, 0, 0, 0.4], [5, 100, 1000, 0.5], [10, 200, 2000, 0.6], [15, 300, 4000, 0.5]]
TOY = speed.SETTINGS["toy"]
TUNING_SEEDS = TOY.search_seeds + TOY.final_seeds
ALL = (speed.SETTINGS["toy"], speed.SETTINGS["real"])


def record(stage="tune", method="published", rate=3e-4, seed=100, curve=CURVE) -> dict:
    return dict(zip(tuning.KEY, (stage, "raft", method, rate, seed))) | {"curve": curve}


def test_what_a_run_costs_by_hand():
    assert first_reached(CURVE, TOKENS, 0.55) == pytest.approx(1500)
    assert first_reached(CURVE, SAMPLES, 0.55) == pytest.approx(150)
    assert first_reached(CURVE, STEP, 0.5) == pytest.approx(5)
    assert first_reached(CURVE, TOKENS, 0.61) == np.inf
    assert first_reached(CURVE, TOKENS, 0.4) == first_reached(CURVE[1:], TOKENS, 0.3) - 1000 == 0
    costs = run_costs([CURVE, CURVE], TOKENS, (0.55, 0.6, 0.61), budget=1900)
    assert costs == pytest.approx(np.array([[1500, 1900, 1900]] * 2))  # after the budget is spent, or never: the budget


def test_speed_and_area_by_hand():
    even, ours = np.array([[10.0, 20, 40], [30, 20, 40]]), np.array([[5.0, 10, 40], [15, 10, 40]])
    assert speedup(even, ours) == pytest.approx((2 * 2 * 1) ** (1 / 3))
    assert with_interval(speedup, ours, ours) == "1.00 (1.00 to 1.00)"
    paired = with_interval(speedup, even, even / 2)  # each pair says 2, however its runs differ
    assert paired == "2.00 (2.00 to 2.00)"
    line = [[0, 0, 0, 0.4], [1, 0, 1000, 0.6], [2, 0, 10**6, 0.9]]
    flat = [[0, 0, 0, 0.4], [2, 0, 10**6, 0.4]]
    assert points_above([line, flat], [line, flat], TOKENS, budget=10**6).tolist() == [0, 0]
    assert points_above([flat], [line], STEP, budget=2) == pytest.approx(25)  # a triangle up to 50
    assert points_above([line], [flat], TOKENS, budget=1000) == pytest.approx(-10)
    with pytest.raises(ValueError, match="below 2000000 in column 2"):
        points_above([line], [flat], TOKENS, budget=2 * 10**6)
    assert mean_and_interval(np.array([10.0, 20, 30]), 2) == "+20.00 ± 24.84"  # 4.303 * 10 / sqrt(3)


def test_points_above_do_not_depend_on_how_often_a_method_is_evaluated():
    def evaluated(*tokens) -> list:
        return [[0, 0, t, 1 - np.exp(-t / 10)] for t in tokens]  # one curve for all

    often, seldom = evaluated(0, 10, 20, 30, 40), evaluated(0, 20, 40)
    assert points_above([seldom], [often], TOKENS, budget=40) == pytest.approx(0)
    assert points_above([often], [seldom], TOKENS, budget=40) == pytest.approx(0)


def test_mixed_pairs_by_hand_and_whatever_decides_about_group_sizes():
    def rows_of(groups: dict) -> list[dict]:
        return [{"problem": problem, "index": i, "score": score} for problem, scores in groups.items() for i, score in enumerate(scores)]

    rows = rows_of({"a": [1, 0], "b": [1, 1], "c": [1, 1, 0, 0], "d": [1]})
    assert mixed_pairs(rows) == mixed_pairs(rows[::-1]) == pytest.approx(1 / 3)
    assert mixed_pairs(rows[-1:]) is None
    drawn = (np.random.default_rng(0).random((20_000, 6)) < 0.3).astype(float)
    adaptive = {i: scores if scores[:2].any() else scores[:2] for i, scores in enumerate(drawn)}  # as a pilot of two has it
    assert mixed_pairs(rows_of(adaptive)) == pytest.approx(0.42, abs=0.01)  # 2 p (1 - p)


def test_the_rate_is_tuned_by_the_cost_in_tokens_before_anything_is_reported():
    dear = [[step, samples, 2 * tokens, accuracy] for step, samples, tokens, accuracy in CURVE]
    first_two, grid = TOY.search_seeds, (7.5e-5, 1.5e-4, 3e-4)

    def tuned(*rates, seeds=first_two) -> list[dict]:
        return [record(rate=rate, seed=seed, curve=CURVE if rate == 1.5e-4 else dear) for rate in rates for seed in seeds]

    def tried(records) -> tuple[set, float | None]:
        wanted, best = tuning.tune(TOY, records, "raft", "published")
        assert all((rate, seed) in wanted for rate, _ in wanted for seed in first_two)
        return {rate for rate, _ in wanted}, best

    assert tried([]) == ({1.5e-4, 3e-4}, None)
    assert tried(tuned(1.5e-4, 3e-4)) == (set(grid), None)  # the best is on an edge
    searched = tuned(*grid)
    wanted, best = tuning.tune(TOY, searched, "raft", "published")
    assert best is None and {seed for rate, seed in wanted if rate == 1.5e-4} == set(TUNING_SEEDS)
    assert len({rate for rate, seed in wanted if seed in TOY.final_seeds}) == 2  # the best two
    records = searched + tuned(7.5e-5, 1.5e-4, seeds=TOY.final_seeds)
    assert tried(records) == (set(grid), 1.5e-4)
    missing = tuning.missing_runs(TOY, records[:-1], ["raft"], ["published"])
    assert [tuple(run.values()) for run in missing] == [("tune", "raft", "published", 1.5e-4, TUNING_SEEDS[-1])]
    missing = tuning.missing_runs(TOY, records, ["raft"], ["published"])
    assert [run["seed"] for run in missing] == list(TOY.seeds) and {run["rate"] for run in missing} == {1.5e-4}
    done = [record("report", rate=1.5e-4, seed=seed) for seed in TOY.seeds[:-1]]
    assert len(tuning.missing_runs(TOY, records + done, ["raft"], ["published"])) == 1
    others = [record("report", rate=3e-4, seed=7)]
    assert tuning.records_of(TOY, records + done + others, "report", "raft", "published").keys() == set(TOY.seeds[:-1])
    assert len(tuning.runs_to_time(TOY, records, ["raft"], ["published", "uniform"])) == len(tuning.TIMED_SEEDS)


def test_the_last_seeds_may_overrule_the_first():
    """2e-4 is ahead on the first two seeds, 1e-4 on all four; then half of 1e-4 has to be tried as well."""
    costs = {1e-4: (1500, 1500, 1500, 1500), 2e-4: (1400, 1400, 1800, 1800), 4e-4: (1900,) * 4, 5e-5: (1900,) * 4}

    def tuned(rate, seeds) -> list[dict]:
        return [record(rate=rate, seed=seed, curve=[[0, 0, 0, 0.4], [1, 64, cost, 0.7]])
                for seed, cost in zip(TUNING_SEEDS, costs[rate]) if seed in seeds]

    setting = replace(TOY, first_rates=(1e-4, 2e-4, 4e-4), accuracies=(0.5, 0.6), budget=(100, 6400, 10**6))
    records = [row for rate in (1e-4, 2e-4, 4e-4) for row in tuned(rate, TOY.search_seeds)]
    records += [row for rate in (1e-4, 2e-4) for row in tuned(rate, TOY.final_seeds)]
    wanted, best = tuning.tune(setting, records, "raft", "published")
    assert best is None and (5e-5, 100) in wanted
    assert tuning.tune(setting, records + tuned(5e-5, TOY.search_seeds), "raft", "published")[1] == 1e-4


@pytest.mark.parametrize("setting", ALL)
def test_no_reported_seed_was_tuned_by(setting):
    assert not set(setting.seeds) & {*setting.search_seeds, *setting.final_seeds, *tuning.TIMED_SEEDS}
    assert setting.budget[SAMPLES] == setting.budget[STEP] * speed.PROMPTS * speed.SAMPLES_EACH
    assert setting.parts[-1][0] >= setting.budget[STEP] and list(setting.accuracies) == sorted(setting.accuracies)


def test_a_row_of_the_table_by_hand():
    """Twice the tokens of CURVE's runs in half of the steps, each of which takes three times as long."""
    dear = [[step / 2, samples / 2, 2 * tokens, accuracy] for step, samples, tokens, accuracy in CURVE]
    records = []
    setting = replace(TOY, budget=(120, 7680, 3500))
    for method, curve, seconds in (("uniform", CURVE, 0.1), ("published", dear, 0.3)):
        records += [record(method=method, rate=rate, seed=seed, curve=curve if rate == 3e-4 else CURVE[:1])
                    for rate in (1.5e-4, 3e-4, 6e-4) for seed in TUNING_SEEDS]
        records += [record("report", method, seed=seed, curve=curve) for seed in (400, 401)]
        records.append(record("time", method) | {"seconds_a_step": seconds})
    uniform, published = speed_table.table(setting, records).splitlines()[2:]
    assert uniform == "| raft | uniform, 2 seeds | 0.0003, none | 2, 2, 2 | 0%, 0%, 0% | 0.100 | 0.525 | 1 | 1 | 1 | 0 |"  # 3/4 of the way from 0.6 to 0.5
    cells = published.split(" | ")
    assert cells[2:7] == ["0.0003, 2, 0.001", "3, 4, 4", "0%, 100%, 100%", "0.300", "0.575"]
    assert cells[7].split()[0] == f"{(1500 / 3000 * 1800 / 3500 * 2000 / 3500) ** (1 / 3):.2f}"
    assert [cell.split()[0] for cell in cells[8:10]] == ["0.67", "2.00"]  # in seconds, samples
    assert speed_table.table(setting, records[: len(records) // 2]).count("uniform") == 1
    assert speed_table.table(setting, []).count("\n") == 1


def test_points_above_uniform_by_hand():
    """Two lines from 0.4: uniform's to 0.5 and the method's to 0.6, in as many samples, 1.5 times the tokens, half of the steps, each
    of which takes twice as long. A mean over a line is its middle."""
    even, dear = ([[0, 0, 0, 0.4], [10, 640, 1000, 0.5]], [[0, 0, 0, 0.4], [5, 640, 1500, 0.6]])
    setting = replace(TOY, budget=(10, 640, 1000), first_rates=(1e-4, 2e-4, 4e-4), search_seeds=(100,), final_seeds=(),
                      accuracies=(0.45,))
    records = []
    for method, curve, seconds in (("uniform", even, 0.1), ("published", dear, 0.2)):
        records += [record(method=method, rate=rate, curve=curve if rate == 2e-4 else CURVE[:1]) for rate in setting.first_rates]
        records += [record("report", method, 2e-4, seed, curve) for seed in (400, 401)]
        records.append(record("time", method, 2e-4) | {"seconds_a_step": seconds})
    uniform, published = speed_table.rows_of(setting, records, speed_table.points_row)
    assert uniform == ["raft", "uniform, 2 seeds", "0.0002, none", "0.1", "0.500", "0", "0", "0", "0"]
    assert published[2:] == ["0.0002, 2, 0.001", "0.2", "0.533", "+1.67 ± 0.00", "+1.67, +1.67", "+5.00 ± 0.00", "+5.00 ± 0.00"]
    untimed = speed_table.rows_of(setting, [row for row in records if row["stage"] != "time"], speed_table.points_row)
    assert [row[3] for row in untimed] == ["not timed"] * 2 and untimed[1][-1] == "not timed"
    shorter = replace(setting, budget=(20, 640, 1000))  # runs that end before the budget's seconds are compared as far as they go
    assert speed_table.rows_of(shorter, records, speed_table.points_row)[1][-1] == "+5.00 ± 0.00"


def test_who_never_arrives_pays_the_budget_in_seconds_too():
    """A step takes half of uniform's time; what the run costs is still the seconds of the budget's steps of uniform."""
    never = [[0, 0, 0, 0.4], [120, 7680, 10**6, 0.5]]
    uniform = speed_table.Group(rate=1e-4, seconds=0.2, runs=[record(curve=CURVE)] * 2)
    group = speed_table.Group(rate=1e-4, seconds=0.1, runs=[record(curve=never)] * 2)
    setting = replace(TOY, budget=(120, 7680, 2500))
    expected = np.prod(np.array([7.5, 9, 10]) / 120) ** (1 / 3)
    assert speed_table.speed_row(setting, "raft", "published", group, uniform)[8].split()[0] == f"{expected:.2f}"


@pytest.mark.parametrize(("stage", "curve", "done"), [
    ("report", [], False), ("tune", [], False),
    ("report", [[0, 0, 0, 0.4], [40, 400, 900, 0.9]], False), ("tune", [[0, 0, 0, 0.4], [40, 400, 900, 0.9]], True),
    ("report", [[40, 400, 1000, 0.5]], True), ("report", [[39, 400, 1000, 0.5]], False), ("tune", [[40, 400, 900, 0.5]], False)])
def test_a_run_is_over_when_its_budget_is_spent_or_it_has_tuned(stage, curve, done):
    setting = replace(TOY, accuracies=(0.5, 0.6), budget=(40, 400, 1000))
    assert speed.is_done(setting, stage, curve) == done


def test_the_steps_in_thirds_by_hand():
    steps = [{"step": i, "prompts_sometimes": i / 10, "mixed_pairs": None if i == 1 else 0.5, "accept_rate": 0.2,
              "predicted_accept_rate": None, "prediction_correlation": None if i < 3 else 0.6} for i in range(1, 7)]
    records = [record("tune", "uniform", rate, seed) for rate in (1.5e-4, 3e-4, 6e-4) for seed in TUNING_SEEDS]
    longer = [*steps, steps[0] | {"step": 7}]  # what only some runs have is left out
    records += [record("report", "uniform", 3e-4, seed) | {"steps": its} for seed, its in ((400, steps), (401, longer))]
    records = [record if record["rate"] == 3e-4 else record | {"curve": CURVE[:1]} for record in records]
    cells, = speed_table.rows_of(TOY, records, speed_table.steps_row)
    assert cells == ["raft", "uniform, 2 seeds", "0.15, 0.35, 0.55", "0.50, 0.50, 0.50", "0.20, 0.20, 0.20", "", "0.60, 0.60"]


@pytest.mark.slow
@pytest.mark.parametrize("method", speed.METHODS)
def test_two_steps_of_each_method_spend_the_same(method):
    tiny = replace(TOY, parts=((1, 1), (2, 1)), eval_samples=1, timed_steps=2, keep_steps=True)
    folder = ROOT / "tests" / "toy"
    done = speed.run(tiny, record("report", method, seed=0), folder)
    assert [(step, samples) for step, samples, *_ in done["curve"]] == [(0, 0), (1, 64), (2, 128)]
    assert [step["step"] for step in done["steps"]] == [1, 2] and all(
        step["mixed_pairs"] is None or 0 <= step["mixed_pairs"] <= 1 for step in done["steps"])  # None: single samples alone
    timed = speed.run(tiny, record("time", method, seed=0), folder)
    assert 0 < timed["seconds_a_step"] < 60 and [step for step, *_ in timed["curve"]] == [0, 2]


def test_nothing_is_missing_in_the_toy_s_records():
    """RAFT's wider pool is not run; all else that the tables show is there, tuned, reported and timed."""
    records, both = speed.read_records(TOY.records_path), ("raft", "grpo")
    assert tuning.missing_runs(TOY, records, both, speed.METHODS) == tuning.runs_to_time(TOY, records, both, speed.METHODS) == []
    assert {spec["method"] for spec in tuning.missing_runs(TOY, [], ["raft"], speed.METHODS)} == set(speed.METHODS) - {"wider pool"}
    assert {spec["method"] for spec in tuning.missing_runs(TOY, [], ["grpo"], speed.METHODS)} == set(speed.METHODS)


@pytest.mark.slow
def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import overview

    overview.draw(tmp_path / "overview.png")
    assert (tmp_path / "overview.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_readmes_have_the_tables_of_the_records():
    readme = (ROOT / "figures" / "README.md").read_text()
    toy, real = (speed.read_records(setting.records_path) for setting in ALL)
    for records in (toy, real):
        assert len({tuple(record[name] for name in tuning.KEY) for record in records}) == len(records)
    assert speed_table.table(TOY, toy) in readme
    assert speed_table.as_markdown(speed_table.OF_POINTS, speed_table.rows_of(ALL[1], real, speed_table.points_row)) in readme
    assert speed_table.as_markdown(("objective", "method", *speed_table.OF_STEPS), speed_table.rows_of(ALL[1], real, speed_table.steps_row)) in readme


@pytest.mark.slow
def test_the_first_screen_says_what_the_records_say():
    front = " ".join((ROOT / "README.md").read_text().split())  # sentences run over lines
    rows = {(row[0], row[1].split(",")[0]): row for row in speed_table.rows_of(TOY, speed.read_records(TOY.records_path), speed_table.speed_row)}
    real = {(row["objective"], row["way"]): row["efficiency_per_token"] for row in speed.read_rows(real_gradient.RECORDS) if "way" in row}
    trained = {row[1].split(",")[0]: row for row in speed_table.rows_of(
        ALL[1], speed.read_records(ALL[1].records_path), speed_table.points_row)}
    shown = {"published": "the paper's rule; 2 of the 4 samples are its pilot", "most prompts": "equal counts, but as many prompts as possible",
             "wider pool": "added here: the best of 64 prompts, by predicting how hard they are"}
    for method, name in shown.items():
        cells = [rows[objective, method][7] if (objective, method) in rows else "as above: one sample each"
                 for objective in ("raft", "grpo")]
        cells += [real_gradient.with_range(real[objective, method]) for objective in ("raft", "grpo")]
        cells.append(trained[method][5] if method in trained else "not run")
        assert f"| {name} | {' | '.join(cells)} |" in front
    for key, sentence in {("raft", "published"): "the paper's rule has {} for RAFT", ("grpo", "published"): "and {} for GRPO",
                          ("grpo", "wider pool"): "GRPO's prediction {}. The intervals"}.items():
        assert sentence.format(rows[key][8]) in front
    assert f"In **seconds** the paper's rule has {trained['published'][8]} points, prediction {trained['wider pool'][8]}." in front
