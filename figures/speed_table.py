"""The tables of speed.py's runs: how much sooner a method reaches an accuracy than uniform counts.

    python figures/speed_table.py                 # the toy, from speed.jsonl
    python figures/speed_table.py --on real       # the real model, from real_speed.jsonl
    python figures/speed_table.py --short         # fewer columns: README.md's table
    python figures/speed_table.py --on real --steps         # what the log says of the steps
    python figures/speed_table.py --on real --tuned         # the runs by which rates were chosen
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import SAMPLES, STEP, TOKENS, accuracy_after, mean_accuracy, points_above
from measure import run_costs, speedup, with_interval
from speed import METHODS, PILOT, PREDICTED_ALPHA, PUBLISHED_ALPHA, SETTINGS, read_records
from tuning import KEY, Setting, records_of, tune

HEADS = ("objective", "method", "rate, pilot, alpha", "thousand tokens to {accuracies}",
         "runs that cost the budget", "s a step", "accuracy after the budget", "speed in tokens",
         "in seconds", "in samples", "mean accuracy over the budget, points")
OF_TUNING = (*KEY[1:], "accuracy (thousand tokens)")  # KEY without the stage
SHORT = (0, 1, 7, 8, 9)  # the columns of README's table
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

    def costs(self, setting: Setting, column: int, budget: float) -> np.ndarray:
        """(runs, accuracies): see measure.run_costs."""
        curves = [record["curve"] for record in self.runs]
        return run_costs(curves, column, setting.accuracies, budget)


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


def rows_of(setting: Setting, records: list[dict]) -> list[list[str]]:
    """Every method at its best rate against uniform, on the seeds that all have: cells by HEADS."""
    rows = []
    for objective in ("raft", "grpo"):
        groups = groups_of(setting, records, objective)
        rows += [row(setting, objective, method, group, groups["uniform"])
                 for method, group in groups.items()]
    return rows


def row(setting: Setting, objective: str, method: str, group: Group, uniform: Group) -> list[str]:
    """Cells of the table."""
    steps, samples, tokens = setting.budget
    in_tokens = group.costs(setting, TOKENS, tokens)
    ends = np.mean([accuracy_after(record["curve"], tokens) for record in group.runs])
    cells = [objective, f"{method}, {len(group.runs)} seeds",
             f"{group.rate:g}, {pilot_and_alpha(objective, method)}",
             ", ".join(f"{cost / 1000:.0f}" for cost in in_tokens.mean(axis=0)),
             ", ".join(f"{share:.0%}" for share in (in_tokens == tokens).mean(axis=0)),
             f"{group.seconds:.3f}", f"{ends:.3f}"]
    if method == "uniform":
        return [*cells, "1", "1", "1", "0"]

    seconds = steps * uniform.seconds  # the budget
    in_seconds = [np.minimum(x.costs(setting, STEP, np.inf) * x.seconds, seconds)
                  for x in (uniform, group)]
    areas = [np.array([mean_accuracy(record["curve"], tokens) for record in x.runs])
             for x in (uniform, group)]
    return [*cells,
            with_interval(speedup, uniform.costs(setting, TOKENS, tokens), in_tokens),
            with_interval(speedup, *in_seconds),
            with_interval(speedup, *(x.costs(setting, SAMPLES, samples) for x in (uniform, group))),
            with_interval(points_above, *areas)]


def pilot_and_alpha(objective: str, method: str) -> str:
    """A method's pilot and alpha, as the table has them. GRPO's fitting rule has no alpha."""
    if method == "published":
        return f"{PILOT}, {PUBLISHED_ALPHA}"
    if method in ("uniform", "most prompts") or objective == "grpo":
        return "none"
    return f"none, {PREDICTED_ALPHA}"


def step_rows(setting: Setting, records: list[dict]) -> list[list[str]]:
    """For each objective and method the means of OF_STEPS over its runs, in each third of the steps
    that all of them have; nothing for a third without a figure."""
    rows = []
    for objective in ("raft", "grpo"):
        for method, group in groups_of(setting, records, objective).items():
            cells = [objective, f"{method}, {len(group.runs)} seeds"]
            shortest = min(len(record["steps"]) for record in group.runs)
            for name in OF_STEPS.values():
                of_runs = np.array([[step[name] for step in record["steps"][:shortest]]
                                    for record in group.runs], dtype=float)  # (runs, steps)
                parts = [part for part in np.array_split(of_runs, 3, axis=1)
                         if np.isfinite(part).any()]
                cells.append(", ".join(f"{np.nanmean(part):.2f}" for part in parts))
            rows.append(cells)
    return rows


def tuned_rows(records: list[dict]) -> list[list[str]]:
    """Each run by which a rate was chosen: cells by OF_TUNING."""
    tuned = [record for record in records if record["stage"] == "tune"]
    return [[*(str(record[name]) for name in KEY[1:]),
             ", ".join(f"{accuracy:.3f} ({tokens / 1000:.0f})"
                       for *_, tokens, accuracy in record["curve"])]
            for record in sorted(tuned, key=lambda record: [record[name] for name in KEY[1:]])]


def as_markdown(heads, rows: list[list[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def table(setting: Setting, records: list[dict], columns=range(len(HEADS))) -> str:
    """rows_of in Markdown, or some columns of it."""
    accuracies = ", ".join(f"{accuracy:.2f}" for accuracy in setting.accuracies)
    heads = [head.format(accuracies=accuracies) for head in HEADS]
    heads, *rows = [[cells[i] for i in columns] for cells in (heads, *rows_of(setting, records))]
    return as_markdown(heads, rows)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=SETTINGS, default="toy")
    parser.add_argument("--records", type=Path, help="of runs, if not where speed.py keeps them")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--short", action="store_true", help="fewer columns")
    add("--steps", action="store_true", help="another table, of the steps")
    add("--tuned", action="store_true", help="another table, of runs to tune rates by")
    args = parser.parse_args()
    setting = SETTINGS[args.on]
    if args.steps and not setting.keep_steps:
        parser.error(f"--steps: of {args.on} nothing is kept of the steps")
    records = read_records(args.records or setting.records_path)
    if args.steps:
        heads = ("objective", "method", *OF_STEPS)
        print(as_markdown(heads, step_rows(setting, records)))
    elif args.tuned:
        print(as_markdown(OF_TUNING, tuned_rows(records)))
    else:
        print(table(setting, records, SHORT if args.short else range(len(HEADS))))


if __name__ == "__main__":
    main()
