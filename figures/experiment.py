"""More ways to spend samples, and more mixes of problems, at equal samples and updates: the toy, five or ten seeds.

    python figures/experiment.py run --minutes 60 --jobs 2      # what is missing in experiment.jsonl; again any time
    python figures/experiment.py table                          # the table of figures/README.md, from experiment.jsonl
    python figures/experiment.py defaults --minutes 60          # what the defaults were chosen by: runs what is
                                                                # missing, and prints the table

The comparison that counts is speed.py's, by a measure that was settled before. This one is older. A
step draws 64 samples and makes one update. For every method by itself, in the mix `usual` and on seeds that are not
reported, first the learning rate is tuned, with 16 prompts x 4 samples, then the split, at the best rate; the best is
the one with the highest mean accuracy over the run. One line of the file is one run: what it was, and [step, samples,
tokens, seconds, accuracy] at each evaluation.
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
from measure import first_reached, mean_and_interval  # noqa: E402 (lies here as well)
from speed import read_records  # noqa: E402

from files import read_rows  # noqa: E402

RECORDS = Path(__file__).with_suffix(".jsonl")

MIXES = {"usual": "train.jsonl", "spared": "spared.jsonl", "hard": "hard.jsonl"}  # in tests/toy
DAMPED = ["--alpha", 0.01]  # and the rule that fits the objective: see flags
METHODS = {  # (flags, what takes the place of gvm.e_step); all flags that a method depends on are spelled out
    "uniform": (["--allocator", "uniform"], None),
    "dynamic": (["--allocator", "uniform"], methods.mixed_only),
    "published": (["--allocator", "gvm", "--alpha", 0.001], None),  # the pilot is half of the budget: see flags
    "fitting rule": (["--alpha", 0.001], None),  # likewise, but GRPO's: the rule that fits the objective
    "rounds": (DAMPED, methods.rounds),
    "oracle": (DAMPED, methods.oracle),  # of four times as many prompts: see flags
    # Its pilot is not counted here either, and it makes more updates; the other has as many, and nothing else of it.
    "released": (["--allocator", "gvm", "--alpha", 0.001, "--weighting", "token",
                  "--pilot-samples", 8, "--e-step-every", 9, "--updates-per-step", 8], None),
    "uniform, 8 updates": (["--allocator", "uniform", "--updates-per-step", 8], None),
}
NOT_TUNED = {"released": "uniform", "uniform, 8 updates": "uniform"}  # whose setting they have
ORACLE = {"raft": (3e-4, 8, 8), "grpo": (3e-4, 32, 2)}  # its setting
RATES = (1.5e-4, 3e-4, 6e-4)
MIDDLE_SPLIT, SPLITS = (16, 4), ((8, 8), (32, 2))  # prompts, samples of each
TUNING_SEEDS, STEPS, EVAL_EVERY = (100, 101), 120, 20
EVAL_SAMPLES = {"tune": 5, "report": 10, "defaults": 10}  # of each problem
CANDIDATES = [("raft", "published", 16, 4), ("raft", "uniform", 16, 4), ("grpo", "published", 16, 4),  # for defaults
              ("grpo", "published", 8, 8), ("grpo", "fitting rule", 16, 4), ("grpo", "fitting rule", 8, 8),
              ("grpo", "uniform", 16, 4)]
DEFAULT_SEEDS, DEFAULT_STEPS, DEFAULT_EVERY = (300, 301, 302, 303), 60, 10
SEEDS = {"usual": range(10), "spared": range(5), "hard": range(5)}
SEEDS_NOT_TUNED = {"usual": range(5), "spared": (), "hard": ()}
KEY = ("stage", "objective", "method", "mix", "rate", "prompts", "samples", "seed")


def flags(spec: dict, out: Path, steps: int, eval_samples: int) -> list[str]:
    """The command line of a run, for raft.py or grpo.py."""
    pilot = ["--pilot-samples", spec["samples"] // 2]
    fitting = ["--allocator", {"raft": "gvm", "grpo": "reward"}[spec["objective"]]]
    more = {"published": pilot, "fitting rule": pilot + fitting, "rounds": fitting,
            "oracle": ["--candidates-per-step", 4 * spec["prompts"], *fitting]}
    eval_every = DEFAULT_EVERY if spec["stage"] == "defaults" else EVAL_EVERY
    words = ["--data", ROOT / "tests" / "toy" / MIXES[spec["mix"]], "--prompts-per-step", spec["prompts"],
             "--samples-per-prompt", spec["samples"], "--updates-per-step", 1, "--lr", spec["rate"], "--steps", steps,
             "--eval-every", eval_every, "--eval-samples", eval_samples, "--save-every", steps, "--seed", spec["seed"],
             "--out", out, *METHODS[spec["method"]][0], *more.get(spec["method"], [])]
    return [str(word) for word in words]


def worker(objective: str, method: str, words: list[str]) -> None:
    """One run, in a process of its own."""
    import grpo
    import raft

    if METHODS[method][1]:
        raft.e_step = METHODS[method][1]
    {"raft": raft, "grpo": grpo}[objective].main(words)


def run(spec: dict, steps: int = STEPS, eval_samples: int | None = None) -> dict:
    """The record of a run; eval_samples: by default as many as its stage needs."""
    eval_samples = eval_samples or EVAL_SAMPLES[spec["stage"]]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [spec["objective"], spec["method"], *flags(spec, out, steps, eval_samples)]
        done = subprocess.run([sys.executable, __file__, "worker", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{spec}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        lines = read_rows(out / "log.jsonl")
    curve = [[line["step"], line["samples"], line["tokens"], round(line["seconds"], 2), line["eval_accuracy"]]
             for line in lines if "eval_accuracy" in line]
    if spec["method"] == "released":  # where the pilot is not counted
        curve = [[step, step * spec["prompts"] * spec["samples"], *rest] for step, _, *rest in curve]
    return spec | {"curve": curve}


def append(path: Path, record: dict) -> None:
    """Keep a record."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(*(record[name] for name in KEY), record["curve"][-1:], flush=True)


def tune(records: list[dict], objective: str, method: str) -> tuple[list[tuple], tuple | None]:
    """(settings to try, the best of them or None before all were run); a setting: (rate, prompts, samples)."""
    if method == "oracle":
        return [], ORACLE[objective]
    scores = {}  # by setting: mean accuracies
    for record in records:
        if (record["stage"], record["objective"], record["method"]) == ("tune", objective, method):
            setting = record["rate"], record["prompts"], record["samples"]
            scores.setdefault(setting, []).append(np.mean([accuracy for *_, accuracy in record["curve"][1:]]))

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
        settings, best = tune(records, objective, NOT_TUNED.get(method, method))
        for seed, setting in product(TUNING_SEEDS, settings):
            if method not in NOT_TUNED:
                tuning["tune", objective, method, "usual", *setting, seed] = True
        for mix in mixes if best else ():
            for seed in (SEEDS_NOT_TUNED if method in NOT_TUNED else SEEDS)[mix]:
                reported["report", objective, method, mix, *best, seed] = True
    there = {tuple(record[name] for name in KEY) for record in records}
    missing = [key for key in tuning if key not in there] or sorted(reported.keys() - there, key=lambda key: key[-1])
    return [dict(zip(KEY, key)) for key in missing]


def costs(curves: np.ndarray, column: int, unit: int) -> str:
    """What it costs until the mean curve first reaches 0.60, and 0.62; curves: (seeds, points, 5)."""
    found = [first_reached(curves.mean(axis=0), column, accuracy) for accuracy in (0.60, 0.62)]
    return ", ".join("never" if cost == np.inf else f"{cost / unit:.0f}" for cost in found)


def reported(records: list[dict]) -> dict[tuple, dict[int, dict]]:
    """(objective, mix, method): {seed: record}, at each method's best setting; in the order of METHODS."""
    groups = {}
    for record in sorted(records, key=lambda record: list(METHODS).index(record["method"])):
        objective, method = record["objective"], record["method"]
        if record["stage"] == "report":
            _, best = tune(records, objective, NOT_TUNED.get(method, method))
            if best == (record["rate"], record["prompts"], record["samples"]):
                groups.setdefault((objective, record["mix"], method), {})[record["seed"]] = record
    return groups


def table(records: list[dict]) -> str:
    """Markdown: every method, at its best setting, against uniform with the same seeds."""
    names = ("objective", "mix", "method", "rate, split", "samples to 0.60, 0.62", "thousand tokens", "final accuracy",
             "against uniform's")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    groups = reported(records)
    for (objective, mix, method), runs in sorted(groups.items(), key=lambda item: item[0][:2]):
        others = groups.get((objective, mix, "uniform"), {})
        seeds = sorted(runs.keys() & others.keys())
        if len(seeds) < 2:
            continue
        curves, uniform = (np.array([group[seed]["curve"] for seed in seeds]) for group in (runs, others))
        first = runs[seeds[0]]
        setting = f"{first['rate']:g}, {first['prompts']} x {first['samples']}"
        ends, uniform_ends = curves[:, -1, -1], uniform[:, -1, -1]
        cells = [objective, mix, f"{method}, {len(seeds)} seeds", setting, costs(curves, 1, 1), costs(curves, 2, 1000),
                 f"{ends.mean():.3f}", "" if method == "uniform" else mean_and_interval(ends - uniform_ends, 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def defaults(records: list[dict]) -> tuple[list[dict], str]:
    """(short runs that are missing, a table in Markdown of those that are there): what defaults were chosen by."""
    lines = ["| objective | method | split | rate | mean accuracy over the run | at its end | thousand tokens |"]
    lines.append("|---" * 7 + "|")
    there, missing = {tuple(record[name] for name in KEY): record["curve"] for record in records}, []
    for (objective, method, prompts, samples), rate in product(CANDIDATES, RATES):
        keys = [("defaults", objective, method, "usual", rate, prompts, samples, seed) for seed in DEFAULT_SEEDS]
        missing += [dict(zip(KEY, key)) for key in keys if key not in there]
        curves = [there[key] for key in keys if key in there]
        if curves:
            means = [np.mean([accuracy for *_, accuracy in curve[1:]]) for curve in curves]
            ends, tokens = [curve[-1][-1] for curve in curves], [curve[-1][2] / 1000 for curve in curves]
            cells = [objective, f"{method}, {len(curves)} seeds", f"{prompts} x {samples}", f"{rate:g}"]
            cells += [f"{np.mean(means):.3f}", f"{np.mean(ends):.3f}", f"{np.mean(tokens):.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return missing, "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("run", "table", "defaults"))
    add("--minutes", type=float, default=60.0, help="no run is begun after them")
    add("--jobs", type=int, default=2, help="runs at a time, one core each")
    add("--records", type=Path, default=RECORDS, help="where runs are kept")
    add("--objectives", nargs="+", choices=("raft", "grpo"), default=("raft", "grpo"))
    add("--methods", nargs="+", choices=METHODS, default=tuple(name for name in METHODS if name != "fitting rule"))
    add("--mixes", nargs="+", choices=MIXES, default=tuple(MIXES))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes

    def run_and_keep(spec: dict) -> None:
        if time.monotonic() < deadline:
            append(args.records, run(spec, DEFAULT_STEPS if spec["stage"] == "defaults" else STEPS))

    if args.what == "defaults":
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_and_keep, defaults(read_records(args.records))[0]))
        print(defaults(read_records(args.records))[1])
        return
    while args.what == "run" and time.monotonic() < deadline:
        specs = wanted(read_records(args.records), args.objectives, args.methods, args.mixes)
        if not specs:
            break
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_and_keep, specs))
    print(table(read_records(args.records)))


if __name__ == "__main__":
    main()
