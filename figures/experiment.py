"""Where does allocation pay? Methods compared at equal samples, updates and evaluations, each with its own best flags.

    python figures/experiment.py run --minutes 60 --jobs 2      # what is missing in experiment.jsonl; again any time
    python figures/experiment.py table                          # README's table, from experiment.jsonl

A step draws 64 samples and makes one update. For every method by itself, in the mix `usual` and on seeds that are
not reported, first the learning rate is tuned, with 16 prompts x 4 samples, then the split, at the best rate. One line
of the file is one run: what it was, and [step, samples, tokens, seconds, accuracy] at each evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import methods  # noqa: E402 (lies in this folder, and needs the project's modules, one folder up)

from data import read_rows  # noqa: E402

RECORDS = Path(__file__).with_suffix(".jsonl")

MIXES = {"usual": "train.jsonl", "spared": "spared.jsonl", "hard": "hard.jsonl"}  # in tests/toy
METHODS = {  # (flags, what takes the place of gvm.draw_step)
    "uniform": (["--allocator", "uniform"], None),
    "dynamic": (["--allocator", "uniform"], lambda: methods.mixed_only),
    # right/drawn of a pilot, which is half of the budget
    "published": (["--allocator", "gvm", "--no-shrink", "--rounds", 1, "--alpha", 0.001], None),
    "rounds": ([], None),
    "predicted": ([], lambda: methods.Predicted(candidates=1)),
    "wider pool": ([], lambda: methods.Predicted(candidates=4)),
}
RATES = (1.5e-4, 3e-4, 6e-4)
MIDDLE_SPLIT, SPLITS = (16, 4), ((8, 8), (32, 2))  # prompts, samples of each
TUNING_SEEDS, STEPS, EVAL_EVERY, EVAL_SAMPLES = (100, 101), 120, 20, 10
SEEDS = {"usual": range(10), "spared": range(5), "hard": range(5)}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile with 1 to 9 degrees
KEY = ("stage", "objective", "method", "mix", "rate", "prompts", "samples", "seed")


def flags(spec: dict, out: Path, steps: int, eval_samples: int) -> list[str]:
    """The command line of a run, for raft.py or grpo.py."""
    pilot = spec["samples"] // 2 if spec["method"] == "published" else min(spec["samples"] // 2, 2)
    every = steps if spec["stage"] == "tune" else EVAL_EVERY
    words = ["--data", ROOT / "tests" / "toy" / MIXES[spec["mix"]], "--prompts-per-step", spec["prompts"],
             "--samples-per-prompt", spec["samples"], "--pilot-samples", pilot, "--updates-per-step", 1,
             "--lr", spec["rate"], "--steps", steps, "--eval-every", every, "--eval-samples", eval_samples,
             "--save-every", steps, "--seed", spec["seed"], "--out", out, *METHODS[spec["method"]][0]]
    return [str(word) for word in words]


def worker(objective: str, method: str, words: list[str]) -> None:
    """One run, in a process of its own."""
    import grpo
    import raft

    if make_draw_step := METHODS[method][1]:
        raft.draw_step = make_draw_step()
    {"raft": raft, "grpo": grpo}[objective].main(words)


def run(spec: dict, steps: int = STEPS, eval_samples: int = EVAL_SAMPLES) -> dict:
    """The record of a run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [spec["objective"], spec["method"], *flags(spec, out, steps, eval_samples)]
        done = subprocess.run([sys.executable, __file__, "worker", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{spec}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = read_rows(out / "log.jsonl")
    curve = [[line["step"], line["samples"], line["tokens"], round(line["seconds"], 2), line["eval_accuracy"]]
             for line in lines if "eval_accuracy" in line]
    return spec | {"curve": curve}


def read(path: Path) -> list[dict]:
    """The records."""
    return read_rows(path) if path.exists() else []


def tune(records: list[dict], objective: str, method: str) -> tuple[list[tuple], tuple | None]:
    """(settings to try, the best of them or None before all were run); a setting: (rate, prompts, samples)."""
    scores = {}  # by setting: accuracies at the end
    for record in records:
        if (record["stage"], record["objective"], record["method"]) == ("tune", objective, method):
            setting = record["rate"], record["prompts"], record["samples"]
            scores.setdefault(setting, []).append(record["curve"][-1][-1])

    def best_of(settings: list[tuple]) -> tuple | None:
        if all(len(scores.get(setting, [])) == len(TUNING_SEEDS) for setting in settings):
            return max(settings, key=lambda setting: np.mean(scores[setting]))
        return None

    rates = [(rate, *MIDDLE_SPLIT) for rate in RATES]
    if best_of(rates) is None:
        return rates, None
    splits = [(best_of(rates)[0], *split) for split in SPLITS]
    return rates + splits, best_of(rates + splits)


def wanted(records: list[dict], objectives, chosen_methods, mixes) -> list[dict]:
    """The runs that are not in the records yet: those that tune, or if there are none, those that are reported."""
    tuning, reported = {}, {}  # keys alone: in order, each once
    for objective, method in product(objectives, chosen_methods):
        settings, best = tune(records, objective, method)
        for seed, setting in product(TUNING_SEEDS, settings):
            tuning["tune", objective, method, "usual", *setting, seed] = True
        for mix in mixes if best else ():
            for seed in SEEDS[mix]:
                reported["report", objective, method, mix, *best, seed] = True
    there = {tuple(record[name] for name in KEY) for record in records}
    missing = [key for key in tuning if key not in there] or sorted(reported.keys() - there, key=lambda key: key[-1])
    return [dict(zip(KEY, key)) for key in missing]


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval, Student's; of two to ten values."""
    half = STUDENT[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.3f} ± {half:.3f}"


def crossing(curves: np.ndarray, column: int, accuracy: float) -> float:
    """Where the mean curve first reaches an accuracy, linear between evaluations; curves: (seeds, points, 5)."""
    mean = curves.mean(axis=0)
    for before, after in zip(mean, mean[1:]):
        if before[-1] < accuracy <= after[-1]:
            share = (accuracy - before[-1]) / (after[-1] - before[-1])
            return before[column] + share * (after[column] - before[column])
    return np.inf


def speedup(curves: np.ndarray, uniform: np.ndarray, column: int, draws: int = 2000) -> str:
    """Uniform's cost to its final accuracy over this method's cost to the same; bootstrap interval over seeds."""
    def ratio(rows) -> float:
        accuracy = uniform[rows].mean(axis=0)[-1, -1]
        return crossing(uniform[rows], column, accuracy) / crossing(curves[rows], column, accuracy)

    generator = np.random.default_rng(0)
    ratios = [ratio(generator.integers(len(curves), size=len(curves))) for _ in range(draws)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return f"{ratio(np.arange(len(curves))):.2f} ({low:.2f} to {high:.2f})"


def table(records: list[dict]) -> str:
    """Markdown: what was tuned; then every method against uniform, with the same seeds."""
    lines = ["| | mix | method | rate, split | final accuracy | against uniform's | speed in samples | in tokens |",
             "|---|---|---|---|---|---|---|---|"]
    groups = {}
    for record in records:
        if record["stage"] == "report":
            groups.setdefault((record["objective"], record["mix"], record["method"]), {})[record["seed"]] = record
    for (objective, mix, method), runs in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1])):
        others = groups.get((objective, mix, "uniform"), {})
        seeds = sorted(runs.keys() & others.keys())
        if len(seeds) < 2:
            continue
        curves, uniform = (np.array([group[seed]["curve"] for seed in seeds]) for group in (runs, others))
        first = runs[seeds[0]]
        setting = f"{first['rate']:g}, {first['prompts']} x {first['samples']}"
        ends, uniform_ends = curves[:, -1, -1], uniform[:, -1, -1]
        cells = [objective, mix, f"{method}, {len(seeds)} seeds", setting, f"{ends.mean():.3f}"]
        if method != "uniform":
            cells += [interval(ends - uniform_ends), speedup(curves, uniform, 1), speedup(curves, uniform, 2)]
        lines.append("| " + " | ".join(cells + [""] * (8 - len(cells))) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("run", "table"))
    add("--minutes", type=float, default=60.0, help="no run is begun after them")
    add("--jobs", type=int, default=2, help="runs at a time, one core each")
    add("--records", type=Path, default=RECORDS, help="where runs are kept")
    add("--objectives", nargs="+", choices=("raft", "grpo"), default=("raft", "grpo"))
    add("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    add("--mixes", nargs="+", choices=MIXES, default=tuple(MIXES))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def run_and_keep(spec: dict) -> None:
        if time.monotonic() < deadline:
            record = run(spec)
            with args.records.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(*record.values(), flush=True)

    while args.what == "run" and time.monotonic() < deadline:
        specs = wanted(read(args.records), args.objectives, args.methods, args.mixes)
        if not specs:
            break
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_and_keep, specs))
    print(table(read(args.records)))


if __name__ == "__main__":
    main()
