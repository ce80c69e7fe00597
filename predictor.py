"""Prompts that nobody has sampled: p predicted, the best chosen. Numpy only. Read it last.

The paper spends a pilot to learn p and G. Here p is predicted, by a logistic regression on numbers
that describe a prompt. Any will do that are known before sampling; gvm.py takes the model's hidden
states. The regression then learns from the samples that are drawn. G is taken to be the same for
all prompts: predicted ones helped a little on the toy, and harmed GRPO on a real model
(figures/README.md).

    predictor = Predictor({})                            # its `learnt` goes into your checkpoints
    features = predictor.features(states)                # states: (prompts, numbers)
    p = predictor.predict(features)
    weights = gvm_weights(p, np.ones(len(p)))            # of allocator.py, or another rule
    counts = allocate_or_leave(weights, budget, 1)       # many prompts get 0
    ...                                                  # draw, grade
    predictor.learn(features, num_right, counts)         # num_right: (prompts,)
"""

import heapq
import math
import operator

import numpy as np

KEPT = 0.98  # of the precision of what was learnt, after each step: the policy moves
NUM_STATES = 256  # of each prompt, at most: a regression on them costs next to nothing
SPREAD = 1.6  # standard deviation of ln(p / (1 - p)) between prompts, before any sample
MISSING_COST = 4.0  # see allocate_or_leave


def logistic(x: np.ndarray) -> np.ndarray:
    """p = 1 / (1 + e^-x), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def first_precision(size: int) -> np.ndarray:
    """Of the regression's coefficients before any sample, (size, size); the last is the intercept.

    Features are standardised: a precision of (size - 1) / SPREAD^2 for each of the others makes the
    predictions of prompts differ by SPREAD. The intercept is left to the data: its prior weighs as
    much as one sample with p = 1/2, whose curvature is p q = 1/4.
    """
    return np.diag([(size - 1) / SPREAD**2] * (size - 1) + [0.25])


def regress(known: tuple, features, num_right, num_drawn) -> tuple:
    """One step of an online logistic regression; what is known of its coefficients c afterwards.

    The model: a sample of a prompt is right with the probability logistic(features @ c). What is
    known of c is Gaussian, (mean, precision). The prior of a step is what was known before, less
    certain: its mean stays, and its precision fades towards the first one. features: (prompts,
    features); num_right, num_drawn: (prompts,), the samples of this step.
    """
    prior_mean, precision = known
    prior_precision = KEPT * precision + (1 - KEPT) * first_precision(len(prior_mean))

    def loss(c: np.ndarray) -> float:  # -ln of the posterior of c, but for a constant
        x, change = features @ c, c - prior_mean
        return (num_drawn @ np.logaddexp(0, x) - num_right @ x
                + change @ prior_precision @ change / 2)

    mean = prior_mean
    for _ in range(4):  # Newton's steps come close to the likeliest c
        p = logistic(features @ mean)
        precision = (features.T * (num_drawn * p * (1 - p))) @ features + prior_precision
        slope = features.T @ (num_right - num_drawn * p) - prior_precision @ (mean - prior_mean)
        change = np.linalg.solve(precision, slope)
        while loss(mean + change) > loss(mean) + 1e-6:  # too far; 1e-6 is for rounding
            change = change / 2
        mean = mean + change
    return mean, precision


class Predictor:
    """Predicts p, and learns from what is then drawn.

    learnt: all that it has learnt, arrays by name, in a form that JSON can keep as lists: {} at
    first, or another predictor's `learnt`. The prompts of the first call of `features` set the
    scale of all states: let them be sixteen or more.
    """

    def __init__(self, learnt: dict):
        self.learnt = {name: np.asarray(values, float) for name, values in learnt.items()}

    def features(self, states: np.ndarray) -> np.ndarray:
        """States standardised as the first step's were, clipped, and a 1: (prompts, features).

        If there are more than NUM_STATES, that many random sums of them take their place. They are
        standardised before: a few states of a middle layer are huge, and would drown the others. A
        prompt with states that are NaN or infinite counts as an average one. Raises ValueError if
        all prompts of the first step have such, or if what was learnt is not for states like these.
        """
        is_finite = np.isfinite(states).all(axis=1)
        states = np.where(is_finite[:, None], states, 0.0)
        size = min(states.shape[1], NUM_STATES) + 1
        if not self.learnt:
            if not is_finite.any():
                raise ValueError("the states of all prompts are NaN or infinite")
            finite = states[is_finite]
            self.learnt = {
                "centre": finite.mean(axis=0), "scale": finite.std(axis=0) + 1e-6,
                "mean": np.zeros(size), "precision": first_precision(size)}  # of the coefficients

        shapes = {name: array.shape for name, array in self.learnt.items()}
        one = states.shape[1:]  # of each prompt
        if shapes != {"centre": one, "scale": one, "mean": (size,), "precision": (size, size)}:
            raise ValueError(f"what was learnt is not for states like these: {shapes}")
        standard = ((states - self.learnt["centre"]) / self.learnt["scale"]).clip(-10, 10)
        standard[~is_finite] = 0.0
        if states.shape[1] > NUM_STATES:  # the same random sums in every step
            directions = np.random.default_rng(0).normal(size=(states.shape[1], NUM_STATES))
            standard = standard @ directions / np.sqrt(states.shape[1])
        return np.hstack([standard, np.ones((len(states), 1))])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """p, (prompts,)."""
        return logistic(features @ self.learnt["mean"])

    def learn(self, features: np.ndarray, num_right: np.ndarray, num_drawn: np.ndarray) -> None:
        """From a step's samples, (prompts,) each."""
        known = self.learnt["mean"], self.learnt["precision"]
        self.learnt["mean"], self.learnt["precision"] = regress(
            known, features, num_right, num_drawn)


def allocate_or_leave(weights, budget: int, smallest: int) -> np.ndarray:
    """Counts n_i, (prompts,), each 0 or at least `smallest`: the best of many prompts are served.
    They add up to the budget, if that is at least `smallest`.

    weights: w_i >= 0, (prompts,). smallest: 1; or 2 for a baseline within the group, which costs
    the information of one sample. What is minimised is a sum over prompts:

        w_i^2 / (n_i - smallest + 1)    the variance of a prompt that is served;
        MISSING_COST * w_i^2            for one that is left out: its part of the gradient is lost.

    MISSING_COST is a choice. Why 4? An update's progress grows with S^2 / V, where S = sum_i s_i is
    the signal and V the variance; so to lose s_i costs as much as to add 2 V s_i / S to V. Suppose
    that s_i is proportional to w_i^2 (so it is in GRPO with equal G), that each prompt has one
    informative sample, and that prompts differ as much as the samples of one: V = 2 sum_i w_i^2.
    Then it costs 4 w_i^2.

    Greedy: what lowers the sum most for each sample goes first. That is optimal for smallest = 1,
    and nearly so for 2. Raises ValueError naming the argument, TypeError for a fraction as budget.
    """
    unspent, weights = operator.index(budget), np.asarray(weights, dtype=np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights must be (prompts,), finite, >= 0; got {weights}")
    if unspent < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    counts, weights = np.zeros(len(weights), dtype=np.int64), weights.tolist()
    first = math.sqrt((MISSING_COST - 1) / smallest)
    heap = [(-first * w, 0, i) for i, w in enumerate(weights)]  # (-sqrt(gain a sample), n_i, i)
    heapq.heapify(heap)
    while heap and unspent > 0:
        _, count, i = heapq.heappop(heap)
        size = smallest if count == 0 else 1
        if size <= unspent:  # else it stays left out
            counts[i] += size
            unspent -= size
            informative = int(counts[i]) - smallest + 1
            gain = weights[i] / math.sqrt(informative * (informative + 1))
            heapq.heappush(heap, (-gain, int(counts[i]), i))
    return counts
