"""How much sooner does a method reach an accuracy? Costs of runs, and what is said of them.

A curve is [step, samples, tokens, accuracy] at each evaluation of a run. A run's cost for an
accuracy is what it has spent when it first comes there, linear between evaluations; if that is more
than the budget, or never, its cost is the budget. For each of some accuracies, the mean cost of
uniform's runs is divided by the method's; the speed is the geometric mean of these ratios. Its
interval comes from a bootstrap over pairs of runs with the same seed. Beside it stands the
difference of the mean accuracy over the budget, the area between the curves, with Student's
interval. It serves flat curves, too, and a few runs, for which a bootstrap's is too narrow.
"""

import numpy as np

STEP, SAMPLES, TOKENS, ACCURACY = range(4)  # columns of a curve
BOOTSTRAP_DRAWS = 10_000
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
           2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # 97.5 % quantiles: 1, 2, ... degrees


def first_reached(curve, column: int, accuracy: float) -> float:
    """What has been spent where a curve first reaches an accuracy, infinite if it never does. Any
    curve will do whose last column is its accuracy."""
    if curve[0][-1] >= accuracy:  # by luck: the runs of a seed all start alike
        return curve[0][column]
    for before, after in zip(curve, curve[1:]):
        if before[-1] < accuracy <= after[-1]:
            share = (accuracy - before[-1]) / (after[-1] - before[-1])
            return before[column] + share * (after[column] - before[column])
    return np.inf


def run_costs(curves: list, column: int, accuracies: tuple, budget: float) -> np.ndarray:
    """What each run has spent when it first reaches each accuracy, at most the budget:
    (runs, accuracies)."""
    return np.array([[min(first_reached(curve, column, accuracy), budget)
                      for accuracy in accuracies] for curve in curves])


def geometric_mean(values: np.ndarray) -> float:
    """Of values above 0."""
    return float(np.exp(np.log(values).mean()))


def speedup(of_uniform: np.ndarray, costs: np.ndarray) -> float:
    """How many times lower a method's costs are than uniform's, (runs, accuracies) each."""
    return geometric_mean(of_uniform.mean(axis=0) / costs.mean(axis=0))


def accuracy_after(curve, column: int, spent) -> np.ndarray:
    """The accuracy when so much is spent, a number or an array, linear between evaluations.
    Raises ValueError if the run has not spent it. As in first_reached, any curve will do."""
    if curve[-1][column] < np.max(spent):
        raise ValueError(f"a run ends at {curve[-1]}, below {np.max(spent):.0f} in column {column}")
    return np.interp(spent, *np.array(curve)[:, [column, -1]].T)


def points_above(of_uniform: list, curves: list, column: int, budget: float) -> np.ndarray:
    """How far the mean accuracy over the budget is above uniform's, in percentage points, (runs,);
    the curves are paired by seed.

    Both are read at the same places, and are linear between: the evaluations of that run whose
    evaluations lie further apart. A chord lies below a curve that flattens, and a long one by more:
    each read at its own evaluations, a method that is evaluated more often would seem better.
    """
    def evaluations(curve) -> list[float]:  # within the budget, and its end
        return [row[column] for row in curve if row[column] < budget] + [budget]

    points = []
    for pair in zip(of_uniform, curves, strict=True):
        spent = max(map(evaluations, pair), key=lambda places: np.diff(places).max())
        uniform, ours = (accuracy_after(curve, column, spent) for curve in pair)
        points.append(100 * np.trapezoid(ours - uniform, spent) / budget)
    return np.array(points)


def interval_half(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean over the first axis, Student's; of 2 to 20 values."""
    return STUDENT[len(values) - 2] * values.std(axis=0, ddof=1) / np.sqrt(len(values))


def mean_and_interval(values: np.ndarray, digits: int) -> str:
    """The mean of values, (runs,), with its sign, and interval_half of them, as a cell."""
    return f"{values.mean():+.{digits}f} ± {interval_half(values):.{digits}f}"


def with_interval(statistic, *per_run: np.ndarray) -> str:
    """statistic(*per_run) and its 95 % interval; per_run: (runs, ...) each, paired by seed."""
    generator, runs = np.random.default_rng(0), len(per_run[0])
    rows = generator.integers(runs, size=(BOOTSTRAP_DRAWS, runs))
    low, high = np.percentile([statistic(*(x[row] for x in per_run)) for row in rows], [2.5, 97.5])
    return f"{statistic(*per_run):.2f} ({low:.2f} to {high:.2f})"


def mixed_pairs(samples: list[dict]) -> float | None:
    """The share of prompts whose first two samples differ in their reward, of those with two or
    more; None without any. Unlike the share of mixed groups it depends neither on a group's size
    nor on a pilot that has set this size. samples: {"problem", "index", "score"} each."""
    scores = {}
    for sample in sorted(samples, key=lambda sample: sample["index"]):
        scores.setdefault(sample["problem"], []).append(sample["score"])
    pairs = [group[:2] for group in scores.values() if len(group) > 1]
    return float(np.mean([one != other for one, other in pairs])) if pairs else None
