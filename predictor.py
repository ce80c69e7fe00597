"""Prompts that nobody has sampled: p predicted, the best chosen. Numpy only. Read it last.

The paper spends a pilot to learn p and G. Here p is predicted from numbers about the prompt, of
which any will do that are known before sampling; gvm.py takes the model's own hidden states. What
is then drawn is what the regression learns from. G is taken to be the same for all prompts:
predicted ones were measured to do more harm than good (figures/README.md).

    predictor = Predictor({})                            # its `learnt` goes into your checkpoints
    features = predictor.features(states)                # states: (prompts, numbers)
    p, weights = predictor.weights(features, rule)       # rule: p to weights
    counts = allocate_or_leave(weights, budget, 2)       # many prompts get 0
    ...                                                  # draw, grade
    predictor.learn(features, p, num_right, num_drawn)   # of each prompt
"""

import heapq
import math
import operator

import numpy as np

FORGET = 0.98  # of what was learnt, how much is left after a step: the policy moves
NUM_STATES = 256  # of each prompt, at most: regressions on them cost next to nothing
SPREAD = 1.6  # of ln p/q between prompts: a standard deviation, before any sample

# What is believed about a single p is a distribution over a grid of log-odds ln p/q.
LOG_ODDS = np.linspace(-12, 12, 97)
LOG_P, LOG_Q = -np.logaddexp(0, -LOG_ODDS), -np.logaddexp(0, LOG_ODDS)
STRENGTHS = np.geomspace(0.25, 64, 9)  # kappa: how many samples a prediction may be worth


def logistic(x: np.ndarray) -> np.ndarray:
    """p = 1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def first_precision(size: int) -> np.ndarray:
    """Of the regression's coefficients before any sample, (size, size); the last is the intercept.

    Features are standardised: a precision of (size - 1) / SPREAD^2 for each of the others makes the
    predictions of prompts differ by SPREAD. The intercept is left to the data: its prior weighs as
    much as one sample with p = 1/2, whose curvature is p q = 1/4.
    """
    return np.diag([(size - 1) / SPREAD**2] * (size - 1) + [0.25])


def regress(belief: tuple, features, shares, num_drawn) -> tuple:
    """One step of an online logistic regression; returns the new belief about its coefficients.

    The model: of num_drawn samples, (prompts,), the share that is right, (prompts,), has the mean
    logistic(features @ c). belief: c is Gaussian, (mean, precision). A little faded, it is the
    prior for what was seen now. features: (prompts, features).
    """
    prior_mean, prior = belief
    prior = FORGET * prior + (1 - FORGET) * first_precision(len(prior_mean))

    def loss(c: np.ndarray) -> float:  # -ln of the posterior of c, but for a constant
        x, change = features @ c, c - prior_mean
        return num_drawn @ (np.logaddexp(0, x) - shares * x) + change @ prior @ change / 2

    mean = prior_mean
    for _ in range(4):  # Newton's steps to the likeliest c
        p = logistic(features @ mean)
        gradient = features.T @ (num_drawn * (shares - p)) - prior @ (mean - prior_mean)
        precision = (features.T * (num_drawn * p * (1 - p))) @ features + prior
        step = np.linalg.solve(precision, gradient)
        while loss(mean + step) > loss(mean) + 1e-6:  # it went too far
            step = step / 2
        mean = mean + step
    return mean, precision


def betas(mu: np.ndarray) -> np.ndarray:
    """Beta(kappa mu, kappa (1 - mu)) for each kappa, on the grid: (strengths, prompts, grid).

    Its density in log-odds is p^a q^b (in p it would be p^(a-1) q^(b-1)). What lies beyond the
    grid, an integral of p^a below it and of q^b above, is added to its ends: with a small a or b
    that is nearly all. mu is kept away from 0 and 1, which no Beta could leave again.
    """
    mu, spacing = mu.clip(0.005, 0.995), LOG_ODDS[1] - LOG_ODDS[0]
    a, b = (STRENGTHS[:, None, None] * share[:, None] for share in (mu, 1 - mu))
    logs = a * LOG_P + b * LOG_Q
    values = np.exp(logs - logs.max(axis=2, keepdims=True))
    values[..., :1] *= 1 + 1 / (a * spacing)
    values[..., -1:] *= 1 + 1 / (b * spacing)
    return values / values.sum(axis=2, keepdims=True)


def first_belief(states: np.ndarray) -> dict[str, np.ndarray]:
    """What a Predictor believes before its first step, whose states these are."""
    size = min(states.shape[1], NUM_STATES) + 1
    return {
        "centre": states.mean(axis=0), "scale": states.std(axis=0) + 1e-6,
        "log_evidence": np.zeros(len(STRENGTHS)),  # of each kappa
        "mean": np.zeros(size), "precision": first_precision(size),  # of ln p/q's coefficients
    }


class Predictor:
    """Predicts p, and learns from what is then drawn.

    learnt: all that it has learnt, arrays by name, in a form that JSON can keep as lists: {} at
    first, or another predictor's `learnt`. The first call of `features` sets the scale of states:
    it needs many prompts, sixteen or more.
    """

    def __init__(self, learnt: dict):
        self.learnt = {name: np.asarray(values, float) for name, values in learnt.items()}

    def features(self, states: np.ndarray) -> np.ndarray:
        """States standardised as the first step's were, clipped, and a 1: (prompts, features).

        More than NUM_STATES of them are summed up in as many random ways, but only then: a few
        states of a middle layer are huge, and would drown the others. A prompt with states that are
        NaN or infinite is taken for a mean one. Raises ValueError if all are in the first step, or
        if what was learnt is not for states like these.
        """
        is_finite = np.isfinite(states).all(axis=1)
        states = np.where(is_finite[:, None], states, 0.0)
        if not self.learnt:
            if not is_finite.any():
                raise ValueError("the states of all prompts are NaN or infinite")
            self.learnt = first_belief(states[is_finite])
        known, expected = self.learnt, first_belief(states)
        shapes, right = ({n: x.shape for n, x in each.items()} for each in (known, expected))
        if shapes != right:
            raise ValueError(f"what was learnt is not for states like these: {shapes}")
        standard = ((states - known["centre"]) / known["scale"]).clip(-10, 10)
        standard[~is_finite] = 0.0
        if states.shape[1] > NUM_STATES:  # the same random directions in every step
            directions = np.random.default_rng(0).normal(size=(states.shape[1], NUM_STATES))
            standard = standard @ directions / np.sqrt(states.shape[1])
        return np.hstack([standard, np.ones((len(states), 1))])

    def weights(self, features: np.ndarray, rule) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sqrt(E[w^2])), (prompts,) each: the predicted p, and a rule's weights.

        How far mu can be trusted is learnt, too: p is Beta(kappa mu, kappa (1 - mu)), averaged over
        kappa by how well each has explained the samples so far. The expectation of w^2 is over this
        p. rule: of some p to as many weights.
        """
        known = self.learnt
        mu = logistic(features @ known["mean"])
        evidence = np.exp(known["log_evidence"] - known["log_evidence"].max())
        belief = np.tensordot(evidence / evidence.sum(), betas(mu), 1)  # (prompts, grid)
        return mu, np.sqrt(belief @ rule(np.exp(LOG_P)) ** 2)

    def learn(self, features: np.ndarray, mu: np.ndarray, num_right, num_drawn) -> None:
        """From a step's samples, (prompts,) each. mu: what was predicted for them."""
        known = self.learnt

        # How likely is what was drawn under each kappa? ln P(drawn | kappa), faded like all else.
        log_likelihood = np.outer(num_right, LOG_P) + np.outer(num_drawn - num_right, LOG_Q)
        likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
        evidence = np.log((betas(mu) * likelihood).sum(axis=2)).sum(axis=1)  # (strengths,)
        known["log_evidence"] = FORGET * known["log_evidence"] + evidence

        shares = num_right / np.maximum(num_drawn, 1)
        known["mean"], known["precision"] = regress(
            (known["mean"], known["precision"]), features, shares, num_drawn)


def allocate_or_leave(weights, budget: int, smallest: int, missing_cost: float = 4.0) -> np.ndarray:
    """Counts n_i, (prompts,), each 0 or at least `smallest`: the best of many prompts are served.

    weights: w_i >= 0, (prompts,). smallest: 1; or 2 for a baseline within the group, which costs
    the information of one sample. What is minimised is a sum over prompts:

        w_i^2 / (n_i - smallest + 1)    the variance of a prompt that is served;
        missing_cost * w_i^2            for one that is left out: its part of the gradient is lost.

    missing_cost, above 1, is a modelling choice. 4 follows from two assumptions. An update makes
    progress as S^2 / V does, S = sum_i s_i being the signal and V the variance; so to lose s_i is
    as bad as to add 2 V s_i / S to the variance. And s_i is proportional to w_i^2, while V is twice
    sum_i w_i^2, since prompts differ as much as the samples of one do. Then it is 4 w_i^2.

    Greedy: what lowers the sum most for each sample goes first. That is optimal for smallest = 1,
    and nearly so for 2. Raises ValueError naming the argument, TypeError for a fraction as budget.
    """
    left, weights = operator.index(budget), np.asarray(weights, dtype=np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights must be (prompts,), finite, >= 0; got {weights}")
    if left < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    counts, weights = np.zeros(len(weights), dtype=np.int64), weights.tolist()
    first = math.sqrt((missing_cost - 1) / smallest)
    heap = [(-first * w, 0, i) for i, w in enumerate(weights)]  # -sqrt(gain for each sample), n, i
    heapq.heapify(heap)
    while heap and left > 0:
        _, n, i = heapq.heappop(heap)
        size = smallest if n == 0 else 1
        if size <= left:  # else it stays left out
            counts[i] += size
            left -= size
            n = int(counts[i]) - smallest + 1  # samples but for those of the baseline
            heapq.heappush(heap, (-weights[i] / math.sqrt(n * (n + 1)), n, i))
    return counts
