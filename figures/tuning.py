"""Which learning rate is best for a method, and which runs are missing: pure functions of records.

A record is one run: KEY, its curve (see measure.py), and for the stage `time` the seconds of a
step. The other stages are `tune` and `report`. The best rate has the lowest cost in tokens, the
geometric mean over the accuracies. Every rate is tried on the setting's search_seeds, the best two
on its final_seeds as well. Half and double of the best are tried, so that it is on no edge.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from measure import TOKENS, geometric_mean, run_costs

KEY = ("stage", "objective", "method", "rate", "seed")
TIMED_SEEDS = (100, 101)
NOT_RUN = {("raft", "wider pool")}  # each candidate gets one sample, or nearly: most prompts


@dataclass(frozen=True)
class Setting:
    """A model and its problems, and how methods are compared there."""

    records_path: Path  # of a file with one line for each run
    model_flags: tuple[str, ...]  # {} is the folder of the model and its problems
    first_rates: tuple[float, ...]  # that are tried; then half and double the best, until it stays
    search_seeds: tuple[int, ...]  # of every rate
    final_seeds: tuple[int, ...]  # of the best two
    seeds: range  # that are reported
    # (last step, steps between evaluations); a run is over after the part that spends the budget
    parts: tuple[tuple[int, int], ...]
    eval_samples: int  # of each problem
    timed_steps: int
    keep_steps: bool  # what the log and the samples say of each step is kept, too
    accuracies: tuple[float, ...]  # ascending, to which costs are measured
    budget: tuple[int, int, int]  # steps, samples, tokens: by column of a curve


def tune(setting: Setting, records: list[dict], objective: str, method: str
         ) -> tuple[set, float | None]:
    """({all (rate, seed) that are needed so far, run or not}, the best rate or None before all
    that are needed were run)."""
    curves = {(record["rate"], record["seed"]): record["curve"] for record in records
              if (record["stage"], record["objective"], record["method"])
              == ("tune", objective, method)}

    def cost(rate: float, seeds: tuple) -> float:
        costs = run_costs([curves[rate, seed] for seed in seeds], TOKENS, setting.accuracies,
                          setting.budget[TOKENS])
        return geometric_mean(costs.mean(axis=0))

    rates, all_seeds = set(setting.first_rates), setting.search_seeds + setting.final_seeds
    while True:
        wanted = set(product(rates, setting.search_seeds))
        if not wanted <= curves.keys():
            return wanted, None
        first, second = sorted(rates, key=lambda rate: (cost(rate, setting.search_seeds), rate))[:2]
        best = first
        if {best / 2, best * 2} <= rates:
            wanted |= set(product((first, second), all_seeds))
            if not wanted <= curves.keys():
                return wanted, None
            best = min(first, second, key=lambda rate: cost(rate, all_seeds))
            if {best / 2, best * 2} <= rates:
                return wanted, best
        rates |= {best / 2, best * 2}


def missing_runs(setting: Setting, records: list[dict], objectives, methods, only_tune=False
                 ) -> list[dict]:
    """The runs that are not in the records yet: those that tune, or if there are none, and not
    only_tune, those that are reported, seed after seed."""
    tuning, reported = [], []
    for objective, method in pairs_of(objectives, methods):
        wanted, best = tune(setting, records, objective, method)
        tuning += [("tune", objective, method, *pair) for pair in sorted(wanted)]
        if best:
            reported += [("report", objective, method, best, seed) for seed in setting.seeds]
    missing = not_in(records, tuning)
    if not missing and not only_tune:
        missing = not_in(records, sorted(reported, key=lambda key: key[-1]))
    return missing


def runs_to_time(setting: Setting, records: list[dict], objectives, methods) -> list[dict]:
    """The timing runs that are missing: of each method at its best rate one for each of
    TIMED_SEEDS. Methods that are not tuned yet are left out."""
    keys = [("time", objective, method, tune(setting, records, objective, method)[1], seed)
            for seed in TIMED_SEEDS for objective, method in pairs_of(objectives, methods)]
    return not_in(records, [key for key in keys if key[3] is not None])


def pairs_of(objectives, methods) -> list[tuple[str, str]]:
    """(objective, method) of all that are run."""
    return [pair for pair in product(objectives, methods) if pair not in NOT_RUN]


def not_in(records: list[dict], keys: list[tuple]) -> list[dict]:
    """What is to be run of keys, values of KEY each: those that no record has, by name."""
    there = {tuple(record[name] for name in KEY) for record in records}
    return [dict(zip(KEY, key)) for key in keys if key not in there]


def records_of(setting: Setting, records: list[dict], stage: str, objective: str, method: str
               ) -> dict[int, dict]:
    """{seed: record} of a method, at its best rate."""
    _, best = tune(setting, records, objective, method)
    return {record["seed"]: record for record in records
            if (record["stage"], record["objective"]) == (stage, objective)
            and (record["method"], record["rate"]) == (method, best)}
