"""How much sooner does a method reach an accuracy? On the toy, in tokens, seconds and samples.

    python figures/speed.py run --minutes 60   # what is missing in speed.jsonl, tuning first, then
                                               # what is reported; again any time
    python figures/speed.py time               # seconds of a step, with nothing else running
    python figures/speed.py table              # that of figures/README.md, from the records;
                                               # README.md has a part, `short`

What is measured was settled before anything was computed from a reported run. The cost of a run for
an accuracy is what it has spent when it first comes there, linear between evaluations. If it does
not within the budget, which is about what 120 steps with uniform counts take, its cost is the
budget. Accuracies are 0.55, 0.58 and 0.60. For each, the mean cost of uniform's runs is divided by
the method's; the speed is the geometric mean of these ratios. Its interval comes from a bootstrap
over pairs of runs with the same seed; it says nothing of other models and problems, nor of another
choice of rates. Beside it stands the difference of the mean accuracy over the budget in tokens: the
area between the curves. Seconds are steps times the seconds of a step, which `time` measures.

A step draws 64 samples, 16 prompts x 4 where counts are uniform, and makes one update. The learning
rate is tuned for each method by itself, on two seeds that are not reported: by the cost in tokens,
the geometric mean over the three accuracies. Half and double the best rate were tried as well, so
that it is on no edge. Splits are not tuned.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import read_rows  # noqa: E402 (the project's modules lie one folder up)

RECORDS = Path(__file__).with_suffix(".jsonl")

METHODS = ("uniform", "published", "predicted", "wider pool")  # see flags
ACCURACIES = (0.55, 0.58, 0.60)
FIRST_RATES = (1.5e-4, 3e-4)  # that are tried; then half and double the best, until it stays
PROMPTS, SAMPLES_EACH, PILOT = 16, 4, 2  # of a step, and of each prompt
PUBLISHED_ALPHA, PREDICTED_ALPHA = 0.001, 0.01
TUNING_SEEDS, SEEDS = (100, 101), range(400, 420)
PARTS = ((40, 5), (120, 20))  # (last step, steps between evaluations): often where curves are steep
EVAL_SAMPLES = 5  # of each of 200 problems
TIMED_STEPS = 60
KEY = ("stage", "objective", "method", "rate", "seed")
STEP, SAMPLES, TOKENS, ACCURACY = range(4)  # columns of a curve
BUDGET = {STEP: 120, SAMPLES: 7680, TOKENS: 160_000}


# --- runs --------------------------------------------------------------------------------------
def flags(spec: dict) -> list[str]:
    """The command line of a run, but for its length and folder. All that matters is spelled out."""
    rule = {"raft": "gvm", "grpo": "reward"}[spec["objective"]]  # that fits
    fitting = ["--allocator", rule, "--alpha", PREDICTED_ALPHA]
    of_method = {
        "uniform": ["--allocator", "uniform"],
        "published": ["--allocator", "gvm", "--alpha", PUBLISHED_ALPHA, "--pilot-samples", PILOT],
        "predicted": ["--candidates-per-step", PROMPTS, *fitting],
        "wider pool": ["--candidates-per-step", 4 * PROMPTS, *fitting],
    }
    words = ["--data", ROOT / "tests" / "toy" / "train.jsonl", "--prompts-per-step", PROMPTS,
             "--samples-per-prompt", SAMPLES_EACH, "--updates-per-step", 1, "--lr", spec["rate"],
             "--seed", spec["seed"], *of_method[spec["method"]]]
    return [str(word) for word in words]


def run(spec: dict, parts=PARTS, eval_samples: int = EVAL_SAMPLES) -> dict:
    """The record of a run: spec, its curve, and for the stage `time` the seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        for steps, eval_every in parts:  # the second part resumes the first
            if spec["stage"] == "tune" and highest(curve_of(out)) >= ACCURACIES[-1]:
                break  # its costs are known
            words = [sys.executable, ROOT / f"{spec['objective']}.py", *flags(spec), "--out", out,
                     "--resume", "--steps", steps, "--eval-every", eval_every,
                     "--eval-samples", eval_samples, "--save-every", steps, "--keep-samples", 0]
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                                  check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(f"{spec}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        record, last = spec | {"curve": curve_of(out)}, read_rows(out / "log.jsonl")[-1]
    if spec["stage"] != "time":
        return record
    seconds = last["seconds"] - last["seconds_eval"] - last["seconds_save"]
    return record | {"seconds_a_step": round(seconds / last["step"], 4)}


def curve_of(out: Path) -> list[list]:
    """[step, samples, tokens, accuracy] at each evaluation of a run so far."""
    log = out / "log.jsonl"
    return [[line["step"], line["samples"], line["tokens"], line["eval_accuracy"]]
            for line in (read_rows(log) if log.exists() else []) if "eval_accuracy" in line]


def highest(curve: list[list]) -> float:
    """The highest accuracy of a curve, 0 of one without evaluations."""
    return max((accuracy for *_, accuracy in curve), default=0.0)


def missing_runs(records: list[dict], objectives, methods) -> list[dict]:
    """The runs that are not in the records yet: those that tune, or if there are none, those that
    are reported, seed after seed."""
    tuning, reported = [], []
    for objective in objectives:
        for method in methods:
            rates, best = tune(records, objective, method)
            tuning += [("tune", objective, method, rate, seed)
                       for rate in sorted(rates) for seed in TUNING_SEEDS]
            if best:
                reported += [("report", objective, method, best, seed) for seed in SEEDS]
    there = {tuple(record[name] for name in KEY) for record in records}
    missing = [key for key in tuning if key not in there]
    if not missing:
        missing = sorted((key for key in reported if key not in there), key=lambda key: key[-1])
    return [dict(zip(KEY, key)) for key in missing]


# --- what the records say ------------------------------------------------------------------------
def first_reached(curve, column: int, accuracy: float) -> float:
    """What has been spent where a curve first reaches an accuracy, infinite if it never does. The
    last column of a curve is its accuracy."""
    for before, after in zip(curve, curve[1:]):
        if before[-1] < accuracy <= after[-1]:
            share = (accuracy - before[-1]) / (after[-1] - before[-1])
            return before[column] + share * (after[column] - before[column])
    return np.inf


def run_cost(curve, column: int, accuracy: float) -> float:
    """What a run has spent when it first reaches an accuracy, or the budget, if that is less."""
    return min(first_reached(curve, column, accuracy), BUDGET[column])


def run_costs(curves: list, column: int) -> np.ndarray:
    """run_cost of each run for each of ACCURACIES: (runs, accuracies)."""
    return np.array([[run_cost(curve, column, accuracy) for accuracy in ACCURACIES]
                     for curve in curves])


def geometric_mean(values: np.ndarray) -> float:
    """Of values above 0."""
    return float(np.exp(np.log(values).mean()))


def tune(records: list[dict], objective: str, method: str) -> tuple[set[float], float | None]:
    """(learning rates to try, the one with the lowest cost in tokens or None before all were run).
    """
    curves = {}  # by rate
    for record in records:
        if (record["stage"], record["objective"], record["method"]) == ("tune", objective, method):
            curves.setdefault(record["rate"], []).append(record["curve"])

    def cost(rate: float) -> float:
        return geometric_mean(run_costs(curves[rate], TOKENS).mean(axis=0))

    rates = set(FIRST_RATES)
    while all(len(curves.get(rate, [])) == len(TUNING_SEEDS) for rate in rates):
        best = min(rates, key=cost)
        if {best / 2, best * 2} <= rates:
            return rates, best
        rates |= {best / 2, best * 2}
    return rates, None


def records_of(records: list[dict], stage: str, objective: str, method: str) -> dict[int, dict]:
    """{seed: record} of a method, at its best rate."""
    _, best = tune(records, objective, method)
    return {record["seed"]: record for record in records
            if (record["stage"], record["objective"]) == (stage, objective)
            and (record["method"], record["rate"]) == (method, best)}


def with_interval(statistic, *per_run: np.ndarray, draws: int = 10_000) -> str:
    """statistic(*per_run) and its 95 % interval; per_run: (runs, ...) each, paired by seed."""
    generator, runs = np.random.default_rng(0), len(per_run[0])
    rows = generator.integers(runs, size=(draws, runs))
    low, high = np.percentile([statistic(*(x[row] for x in per_run)) for row in rows], [2.5, 97.5])
    return f"{statistic(*per_run):.2f} ({low:.2f} to {high:.2f})"


def speed(of_uniform: np.ndarray, costs: np.ndarray) -> float:
    """How many times lower a method's costs are than uniform's, (runs, accuracies) each."""
    return geometric_mean(of_uniform.mean(axis=0) / costs.mean(axis=0))


def mean_accuracy(curve) -> float:
    """Over the budget in tokens, linear between evaluations."""
    tokens, accuracy = np.array(curve)[:, [TOKENS, ACCURACY]].T
    grid = np.linspace(0, BUDGET[TOKENS], 1001)
    return float(np.interp(grid, tokens, accuracy).mean())


def points_above(of_uniform: np.ndarray, accuracies: np.ndarray) -> float:
    """How far a method's mean accuracies are above uniform's, (runs,) each, in points."""
    return 100 * float((accuracies - of_uniform).mean())


HEADS = ("objective", "method", "rate, pilot, alpha", "thousand tokens to 0.55, 0.58, 0.60",
         "over the budget", "s a step", "accuracy at the end", "speed in tokens", "in seconds",
         "in samples", "accuracy at equal tokens, points")
SHORT = (0, 1, 3, 7, 8, 9, 10)  # the columns of README's table


def rows_of(records: list[dict]) -> list[list[str]]:
    """Every method at its best rate against uniform, on the seeds that all have: cells by HEADS."""
    rows = []
    for objective in ("raft", "grpo"):
        groups = {method: records_of(records, "report", objective, method) for method in METHODS}
        groups = {method: group for method, group in groups.items() if group}
        seeds = sorted(set.intersection(*map(set, groups.values()))) if groups else []
        if "uniform" not in groups or len(seeds) < 2:
            continue
        curves = {method: [group[seed]["curve"] for seed in seeds]
                  for method, group in groups.items()}
        rows += [row(records, objective, method, curves) for method in groups]
    return rows


def table(records: list[dict], columns=range(len(HEADS))) -> str:
    """rows_of in Markdown, or some columns of it."""
    lines = ["| " + " | ".join(cells[i] for i in columns) + " |"
             for cells in (HEADS, *rows_of(records))]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def pilot_and_alpha(objective: str, method: str) -> str:
    """The setting of a method, as the table has it. GRPO's fitting rule has no alpha."""
    if method == "published":
        return f"{PILOT}, {PUBLISHED_ALPHA}"
    if method == "uniform" or objective == "grpo":
        return "none"
    return f"none, {PREDICTED_ALPHA}"


def row(records: list[dict], objective: str, method: str, curves: dict) -> list[str]:
    """Cells of the table. curves: by method, those of the same seeds."""
    runs, of_uniform = curves[method], curves["uniform"]
    ends = np.array([curve[-1][ACCURACY] for curve in runs])
    costs = run_costs(runs, TOKENS)
    cells = [objective, f"{method}, {len(runs)} seeds",
             f"{tune(records, objective, method)[1]:g}, {pilot_and_alpha(objective, method)}",
             ", ".join(f"{cost / 1000:.0f}" for cost in costs.mean(axis=0)),
             ", ".join(f"{share:.0%}" for share in (costs == BUDGET[TOKENS]).mean(axis=0))]
    seconds = {name: np.mean([record["seconds_a_step"] for record in
                              records_of(records, "time", objective, name).values()] or [np.nan])
               for name in (method, "uniform")}
    cells += [f"{seconds[method]:.3f}", f"{ends.mean():.3f}"]
    if method == "uniform":
        return [*cells, "1", "1", "1", "0"]

    cells.append(with_interval(speed, run_costs(of_uniform, TOKENS), costs))
    in_seconds = [run_costs(of_uniform, STEP) * seconds["uniform"],
                  np.minimum(run_costs(runs, STEP) * seconds[method],
                             BUDGET[STEP] * seconds["uniform"])]
    cells.append(with_interval(speed, *in_seconds))
    cells.append(with_interval(speed, run_costs(of_uniform, SAMPLES), run_costs(runs, SAMPLES)))
    areas = [np.array([mean_accuracy(curve) for curve in x]) for x in (of_uniform, runs)]
    cells.append(with_interval(points_above, *areas))
    return cells


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("run", "time", "table", "short"))
    add("--minutes", type=float, default=60.0, help="no run is begun after them")
    add("--jobs", type=int, default=2, help="runs at a time, one core each")
    add("--records", type=Path, default=RECORDS, help="where runs are kept")
    add("--objectives", nargs="+", choices=("raft", "grpo"), default=("raft", "grpo"))
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def records() -> list[dict]:
        return read_rows(args.records) if args.records.exists() else []

    def run_and_keep(spec: dict, **more) -> None:
        if time.monotonic() < deadline:
            record = run(spec, **more)
            with args.records.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(*spec.values(), record["curve"][-1], flush=True)

    while args.what == "run" and time.monotonic() < deadline:
        specs = missing_runs(records(), args.objectives, args.methods)
        if not specs:
            break
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_and_keep, specs))
    if args.what == "time":
        for seed in TUNING_SEEDS:  # each method once, and then again
            for objective in args.objectives:
                for method in args.methods:
                    _, rate = tune(records(), objective, method)
                    if rate is None or seed in records_of(records(), "time", objective, method):
                        continue
                    key = ("time", objective, method, rate, seed)
                    parts = ((TIMED_STEPS, TIMED_STEPS),)
                    run_and_keep(dict(zip(KEY, key)), parts=parts, eval_samples=1)
    print(table(records(), SHORT) if args.what == "short" else table(records()))


if __name__ == "__main__":
    main()
