"""Accuracy of runs against what they cost: mean over seeds, with a band of two standard errors. Needs matplotlib.

    python figures/plot.py runs/raft-gvm-* runs/raft-uniform-* --out accuracy.png
    python figures/plot.py runs/* --x tokens --save points.jsonl --out accuracy.png     # keep what is drawn ...
    python figures/plot.py points.jsonl --x seconds --out accuracy.png                  # ... and draw it again

Runs whose folders differ in the number at their end alone (`raft-gvm-0`, `raft-gvm-1`) are seeds of one curve. Its
points are the steps at which every seed has been evaluated: mean cost against mean accuracy.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

COSTS = ("samples", "tokens", "updates", "seconds")  # the keys of raft.py's log; all of them count from the start


def read_points(source: Path) -> list[dict]:
    """Evaluations of a run folder, or of a file that --save wrote: {"run", "step", "accuracy", and COSTS} each.

    Raises ValueError naming the file that is missing or holds none.
    """
    log = source / "log.jsonl" if source.is_dir() else source
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        points = lines if source.is_file() else [
            {"run": str(source), "step": line["step"], "accuracy": line["eval_accuracy"], **{x: line[x] for x in COSTS}}
            for line in lines if "eval_accuracy" in line]
    except OSError as error:
        raise ValueError(f"{log}: {error.strerror}; give folders of runs, or what --save wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{log}: is not a log ({error}); give folders of runs, or what --save wrote") from error
    if not points or not all(isinstance(p, dict) and {"run", "step", "accuracy", *COSTS} <= p.keys() for p in points):
        raise ValueError(f"{log}: holds no evaluations; give folders of runs, or what --save wrote")
    return points


def curves(points: list[dict], x: str) -> dict[str, np.ndarray]:
    """For each group, by name, (steps, 3): mean cost, mean accuracy, twice its standard error (0 for one run)."""
    groups: dict[str, dict[str, dict[int, dict]]] = {}
    for point in points:
        runs = groups.setdefault(re.sub(r"-\d+$", "", point["run"]), {})
        runs.setdefault(point["run"], {})[point["step"]] = point
    found = {}
    for name, runs in groups.items():
        steps = sorted(set.intersection(*(set(run) for run in runs.values())))
        costs, accuracies = (np.array([[run[step][key] for step in steps] for run in runs.values()], dtype=float)
                             for key in (x, "accuracy"))  # (runs, steps)
        errors = accuracies.std(axis=0, ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else np.zeros(len(steps))
        curve = np.stack([costs.mean(axis=0), accuracies.mean(axis=0), 2 * errors], axis=1)
        found[f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}"] = curve
    return found


def draw(found: dict[str, np.ndarray], x: str, out: str) -> None:
    """Write the picture; raises ImportError without matplotlib, ValueError for a format that it does not know."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, curve in found.items():
        costs, means, bands = curve.T
        line, = axes.plot(costs, means, marker="o", markersize=3, label=name)
        axes.fill_between(costs, means - bands, means + bands, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=x, ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Read, save, draw; bad input is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="run folders, or files that --save wrote")
    parser.add_argument("--x", choices=COSTS, default="samples", help="the cost that is drawn (default: samples)")
    parser.add_argument("--out", required=True, help="the picture to write: .png, .svg, .pdf")
    parser.add_argument("--save", default=None, help="also write the points as JSON lines")
    args = parser.parse_args()
    try:
        points = [point for source in args.sources for point in read_points(source)]
        draw(curves(points, args.x), args.x, args.out)
        if args.save:
            Path(args.save).write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")
    except ImportError:
        parser.exit(2, "plot.py: error: needs matplotlib: pip install matplotlib\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"plot.py: error: {error}\n")


if __name__ == "__main__":
    main()
