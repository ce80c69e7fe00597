"""How much sooner does a method reach an accuracy? Costs of runs, and what is said of them.

A curve is [step, samples, tokens, accuracy] at each evaluation of a run. A run's cost for an
accuracy is what it has spent when it first comes there, linear between evaluations; if that is more
than the budget, or never, its cost is the budget. For each of some accuracies, the mean cost of
uniform's runs is divided by the method's; the speed is the geometric mean of these ratios. Its
interval comes from a bootstrap over pairs of runs with the same seed. Beside it stands the
difference of the mean accuracy over the budget in tokens: the area between the curves.
"""

import numpy as np

STEP, SAMPLES, TOKENS, ACCURACY = range(4)  # columns of a curve
BOOTSTRAP_DRAWS = 10_000


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


def accuracy_after(curve, tokens) -> np.ndarray:
    """The accuracy when so many tokens are spent, a number or an array, linear between evaluations.
    Raises ValueError if the run has not spent them."""
    if curve[-1][TOKENS] < np.max(tokens):
        raise ValueError(f"a run ends after {curve[-1][TOKENS]} tokens, below {np.max(tokens):.0f}")
    return np.interp(tokens, *np.array(curve)[:, [TOKENS, ACCURACY]].T)


def mean_accuracy(curve, budget: float) -> float:
    """Over the budget in tokens. Raises ValueError if the run has not spent it."""
    return float(accuracy_after(curve, np.linspace(0, budget, 1001)).mean())


def points_above(of_uniform: np.ndarray, accuracies: np.ndarray) -> float:
    """How far a method's mean accuracies are above uniform's, (runs,) each, in percentage points.
    """
    return 100 * float((accuracies - of_uniform).mean())


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
