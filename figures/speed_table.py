"""The tables of speed.py's runs: how much sooner a method reaches an accuracy than uniform counts.

    python figures/speed_table.py                 # the toy, from speed.jsonl
    python figures/speed_table.py --on real --points        # the real model, from real_speed.jsonl:
                                                            # how far accuracies are above uniform's
    python figures/speed_table.py --on real --steps         # what the log says of its steps
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import ACCURACY, SAMPLES, STEP, TOKENS, accuracy_after, mean_and_interval
from measure import points_above, run_costs, speedup, with_interval
from speed import METHODS, PILOT, PREDICTED_ALPHA, PUBLISHED_ALPHA, SETTINGS, read_records
from tuning import Setting, records_of, tune

HEADS = ("objective", "method", "rate, pilot, alpha", "thousand tokens to {accuracies}",
         "runs that cost the budget", "s a step", "accuracy after the budget", "speed in tokens",
         "in seconds", "in samples", "mean accuracy over the budget, points")
OF_POINTS = ("objective", "method", "rate, pilot, alpha", "s a step", "accuracy after the budget",
             "points above uniform, at equal tokens", "each seed's", "at equal samples",
             "at equal seconds")
OF_STEPS = {  # heads, and names in the records
    "mixed groups": "prompts_sometimes", "mixed among first two": "mixed_pairs",
    "right": "accept_rate", "predicted to be right": "predicted_accept_rate",
    "correlation": "prediction_correlation"}


@dataclass
class Group:
    """The runs of a method at its best rate, on the seeds that all methods have."""

    rate: float
    seconds: float  # of a step; NaN if it was not timed
    runs: list[dict]  # records

    @property
    def curves(self) -> list:
        """Of the runs: see measure.py."""
        return [record["curve"] for record in self.runs]

    def in_seconds(self) -> list:
        """Of each run what it has spent in seconds, and its accuracy, at each evaluation."""
        return [[[row[STEP] * self.seconds, row[ACCURACY]] for row in curve]
                for curve in self.curves]

    def costs(self, setting: Setting, column: int, budget: float) -> np.ndarray:
        """(runs, accuracies): see measure.run_costs."""
        return run_costs(self.curves, column, setting.accuracies, budget)

    def end(self, budget: float) -> float:
        """The mean accuracy of the runs when a budget of tokens is spent."""
        return np.mean([accuracy_after(curve, TOKENS, budget) for curve in self.curves])


def groups_of(setting: Setting, records: list[dict], objective: str) -> dict[str, Group]:
    """By method, those with at least two runs; empty if uniform has not as many."""
    runs = {method: records_of(setting, records, "report", objective, method)
            for method in METHODS}
    runs = {method: by_seed for method, by_seed in runs.items() if len(by_seed) > 1}
    if "uniform" not in runs:
        return {}
    seeds, groups = sorted(set.intersection(*map(set, runs.values()))), {}
    for method, by_seed in runs.items():
        timed = records_of(setting, records, "time", objective, method).values()
        groups[method] = Group(
            rate=tune(setting, records, objective, method)[1],
            seconds=np.mean([record["seconds_a_step"] for record in timed]) if timed else np.nan,
            runs=[by_seed[seed] for seed in seeds])
    return groups


def rows_of(setting: Setting, records: list[dict], row) -> list[list[str]]:
    """row(setting, objective, method, group, uniform's group), cells, for each method at its best
    rate, on the seeds that all have."""
    rows = []
    for objective in ("raft", "grpo"):
        groups = groups_of(setting, records, objective)
        rows += [row(setting, objective, method, group, groups["uniform"])
                 for method, group in groups.items()]
    return rows


def first_cells(objective: str, method: str, group: Group) -> list[str]:
    """What a row is of."""
    return [objective, f"{method}, {len(group.runs)} seeds",
            f"{group.rate:g}, {pilot_and_alpha(objective, method)}"]


def speed_row(setting: Setting, objective: str, method: str, group: Group, uniform: Group
              ) -> list[str]:
    """How much sooner a method reaches the accuracies: cells by HEADS."""
    steps, samples, tokens = setting.budget
    in_tokens = group.costs(setting, TOKENS, tokens)
    cells = [*first_cells(objective, method, group),
             ", ".join(f"{cost / 1000:.0f}" for cost in in_tokens.mean(axis=0)),
             ", ".join(f"{share:.0%}" for share in (in_tokens == tokens).mean(axis=0)),
             f"{group.seconds:.3f}", f"{group.end(tokens):.3f}"]
    if method == "uniform":
        return [*cells, "1", "1", "1", "0"]

    seconds = steps * uniform.seconds  # the budget
    in_seconds = [run_costs(x.in_seconds(), 0, setting.accuracies, seconds)
                  for x in (uniform, group)]
    return [*cells,
            with_interval(speedup, uniform.costs(setting, TOKENS, tokens), in_tokens),
            with_interval(speedup, *in_seconds),
            with_interval(speedup, *(x.costs(setting, SAMPLES, samples) for x in (uniform, group))),
            mean_and_interval(points_above(uniform.curves, group.curves, TOKENS, tokens), 2)]


def points_row(setting: Setting, objective: str, method: str, group: Group, uniform: Group
               ) -> list[str]:
    """How far the mean accuracy over the budget is above uniform's: cells by OF_POINTS."""
    _, samples, tokens = setting.budget
    cells = [*first_cells(objective, method, group),
             "not timed" if np.isnan(group.seconds) else f"{group.seconds:.3g}",
             f"{group.end(tokens):.3f}"]
    if method == "uniform":
        return [*cells, "0", "0", "0", "0"]

    in_tokens, in_samples = (points_above(uniform.curves, group.curves, column, budget)
                             for column, budget in ((TOKENS, tokens), (SAMPLES, samples)))
    return [*cells, mean_and_interval(in_tokens, 2),
            ", ".join(f"{points:+.2f}" for points in in_tokens),
            mean_and_interval(in_samples, 2), points_in_time(setting, uniform, group)]


def points_in_time(setting: Setting, uniform: Group, group: Group) -> str:
    """Likewise over the seconds of uniform's budget of steps, or as many as all runs last."""
    if np.isnan(uniform.seconds + group.seconds):
        return "not timed"
    curves = [x.in_seconds() for x in (uniform, group)]
    seconds = min(curve[-1][0] for each in curves for curve in each)
    seconds = min(seconds, setting.budget[STEP] * uniform.seconds)
    return mean_and_interval(points_above(*curves, 0, seconds), 2)


def pilot_and_alpha(objective: str, method: str) -> str:
    """A method's pilot and alpha, as the table has them. GRPO's fitting rule has no alpha."""
    if method == "published":
        return f"{PILOT}, {PUBLISHED_ALPHA}"
    if method in ("uniform", "most prompts") or objective == "grpo":
        return "none"
    return f"none, {PREDICTED_ALPHA}"


def steps_row(setting: Setting, objective: str, method: str, group: Group, uniform: Group
              ) -> list[str]:
    """The means of OF_STEPS over a method's runs, in each third of the steps that all of them have;
    nothing for a third without a figure."""
    cells = first_cells(objective, method, group)[:2]
    shortest = min(len(record["steps"]) for record in group.runs)
    for name in OF_STEPS.values():
        of_runs = np.array([[step[name] for step in record["steps"][:shortest]]
                            for record in group.runs], dtype=float)  # (runs, steps)
        parts = [part for part in np.array_split(of_runs, 3, axis=1) if np.isfinite(part).any()]
        cells.append(", ".join(f"{np.nanmean(part):.2f}" for part in parts))
    return cells


def as_markdown(heads, rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def table(setting: Setting, records: list[dict]) -> str:
    """Of speeds, in Markdown."""
    accuracies = ", ".join(f"{accuracy:.2f}" for accuracy in setting.accuracies)
    heads = [head.format(accuracies=accuracies) for head in HEADS]
    return as_markdown(heads, rows_of(setting, records, speed_row))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=SETTINGS, default="toy")
    parser.add_argument("--records", type=Path, help="of runs, if not where speed.py keeps them")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--points", action="store_true", help="another table: accuracies at equal cost")
    add("--steps", action="store_true", help="another table, of the steps")
    args = parser.parse_args()
    setting = SETTINGS[args.on]
    if args.steps and not setting.keep_steps:
        parser.error(f"--steps: of {args.on} nothing is kept of the steps")
    records = read_records(args.records or setting.records_path)
    if args.steps:
        print(as_markdown(("objective", "method", *OF_STEPS),
                          rows_of(setting, records, steps_row)))
    elif args.points:
        print(as_markdown(OF_POINTS, rows_of(setting, records, points_row)))
    else:
        print(table(setting, records))


if __name__ == "__main__":
    main()
