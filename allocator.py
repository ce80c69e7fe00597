"""Where the samples go: GVM's budget allocation (arXiv 2505.02391). Needs numpy only: copy it.

    python allocator.py                                         # a small table of what it does
    counts = allocate(gvm_weights(p, G), budget=8 * len(p))     # in your project

Prompt i has an acceptance rate p_i, the probability that one sample is right, and a gradient
norm G_i, the root mean square over its right samples. With n_i samples drawn, of which the
right ones form D_i, the unbiased estimator of Lemma 1 is

    -sum_i 1/(n_i p_i) sum_{y in D_i} grad ln pi(y | x_i).

It averages n_i independent terms of prompt i, each with second moment c_i = G_i^2 / p_i, so
its variance is at most sum_i c_i / n_i. Under a budget sum_i n_i = N this is smallest for n_i
proportional to sqrt(c_i): hard prompts get more, because few of their samples count. Those that
are never solved would get everything, so Eq. 7 divides c_i by 1 + alpha / p_i^beta. The solution
is Proposition 1:

    n_i = N w_i / sum_j w_j,        w_i = sqrt(c_i) = G_i / sqrt(p_i + alpha / p_i^(beta - 1)).

Added here: `allocate` finds the best whole numbers. `reward_weights` is for GRPO. `Predictor` tells
p and G before a prompt is sampled; `allocate_or_leave` then serves the best of many prompts.
"""

import heapq
import math
import operator

import numpy as np


def summarise_samples(prompts, is_right, lengths, norms, num_prompts: int) -> dict:
    """What graded samples say of each prompt: a table of columns, (num_prompts,) each.

    prompts: the row of each sample's prompt; is_right, booleans; lengths, in tokens; norms;
    (samples,) each. norm_right, norm_wrong: root mean squares over right and over wrong samples,
    0 without any, as in the derivation (Algorithm 2 writes the mean).
    """

    def total(values: np.ndarray) -> np.ndarray:  # (samples,) to (num_prompts,)
        return np.bincount(prompts, values, minlength=num_prompts)

    num_drawn, num_right = total(np.ones(len(prompts))), total(is_right)
    return {
        "num_right": num_right.astype(int),
        "num_drawn": num_drawn.astype(int),
        "norm_right": np.sqrt(total(norms**2 * is_right) / np.maximum(num_right, 1)),
        "norm_wrong": np.sqrt(total(norms**2 * ~is_right) / np.maximum(num_drawn - num_right, 1)),
        "mean_length": total(lengths) / np.maximum(num_drawn, 1),
    }


def gvm_weights(accept_rates, grad_norms, alpha: float = 1e-3, beta: float = 2.0) -> np.ndarray:
    """Proposition 1: w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), (prompts,).

    accept_rates: p_i in [0, 1], (prompts,). grad_norms: G_i >= 0, (prompts,). alpha, beta: the
    damping of Eq. 7, by default as published. The weight at p_i = 0 is 0, its limit if alpha > 0.
    Raises ValueError naming the argument that is NaN, infinite, negative or out of range.
    """
    p, G = _check_vectors(accept_rates=accept_rates, grad_norms=grad_norms)
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    if not 2 <= beta < np.inf:
        raise ValueError(f"beta must be finite and at least 2, got {beta}")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # p near 0
        damping = alpha / p ** (beta - 1) if alpha > 0 else 0.0
        return np.where(p > 0, G / np.sqrt(p + damping), 0.0)


def reward_weights(accept_rates, norm_right, norm_wrong) -> np.ndarray:
    """w_i = sqrt(c_i), (prompts,), for the policy gradient of the expected reward.

    A sample's term is A grad ln pi. With the baseline p, A = r - p is q = 1 - p for a right sample
    and -p for a wrong one. With G+ and G- the gradient norms of each kind,

        c = p q^2 G+^2 + q p^2 G-^2 = p q (q G+^2 + p G-^2).

    GRPO also divides A by the rewards' standard deviation within a group of n. That makes it c =
    (q - q^n) G+^2 + (p - p^n) G-^2, but the estimate of the gradient is no better for it: see the
    error measured in tests/README.md. accept_rates: p_i in [0, 1]; norm_right, norm_wrong: G+, G-
    >= 0; (prompts,) each. Raises ValueError naming the argument.
    """
    p, norm_right, norm_wrong = _check_vectors(
        accept_rates=accept_rates, norm_right=norm_right, norm_wrong=norm_wrong)
    q = 1 - p
    return np.sqrt(p * q * (q * norm_right**2 + p * norm_wrong**2))


def allocate(weights, budget, min_samples=0, prices=None) -> np.ndarray:
    """The integers n_i that minimise sum_i w_i^2 / n_i, with sum_i n_i = budget exactly.

    weights: w_i >= 0, (prompts,). min_samples: the smallest n_i, an integer for all or (prompts,).
    prices: tau_i > 0, (prompts,), what a sample costs, say its mean tokens. The budget may then be
    fractional; sum_i tau_i n_i stays within it, by less than the next sample.
    Returns int64 counts, (prompts,), the same on every machine. A weight of 0 gets its minimum;
    if all are 0, the rest is spread evenly. Raises ValueError naming the argument for bad weights
    or a budget that is too small, TypeError for one that is not whole.
    """
    if prices is None:
        budget, prices = operator.index(budget), np.ones(np.shape(weights))
    weights, prices = _check_vectors(weights=weights, prices=prices)
    lower = np.asarray(min_samples)
    if lower.dtype.kind != "i" or lower.shape not in ((), weights.shape) or (lower < 0).any():
        raise ValueError("min_samples must be integers >= 0, a single one or one per prompt")
    lower = np.broadcast_to(lower, weights.shape)
    if (prices == 0).any():
        raise ValueError("prices must be positive")
    if not prices @ lower <= budget * (1 + 1e-9) < np.inf:  # rounding allowed
        raise ValueError(f"a budget of {budget} is below min_samples in all, or infinite")

    # Buy the most useful sample, again and again, until the next one is too expensive. One more
    # sample of prompt i lowers w^2 / n by w^2 / (n (n + 1)), and each further one by less: to take
    # the largest gain per price is optimal if prices are equal (Huntington and Hill's method).
    left, value = budget * (1 + 1e-9) - prices @ lower, weights / np.sqrt(prices)
    counts, prices, value = lower.tolist(), prices.tolist(), value.tolist()

    def priority(i: int) -> tuple[int, float, int]:
        """The smallest is bought first: first samples, then others, then those of weight 0."""
        n = counts[i]
        if value[i] == 0:
            return (2, n, i)
        return (1, -value[i] / math.sqrt(n * (n + 1)), i) if n > 0 else (0, -value[i], i)

    heap = [priority(i) for i in range(len(counts))]
    heapq.heapify(heap)
    while heap and prices[heap[0][-1]] <= left:
        i = heap[0][-1]
        counts[i] += 1
        left -= prices[i]
        heapq.heapreplace(heap, priority(i))
    return np.array(counts, dtype=np.int64)


def allocate_or_leave(weights, budget: int, smallest: int, left_out: float = 4.0) -> np.ndarray:
    """Counts n_i, (prompts,), each 0 or at least `smallest`: some prompts are left out.

    smallest = 2 is for a group baseline, where one sample serves the others and says nothing by
    itself: the variance is w^2 / (n - 1). Without one it is w^2 / n, and smallest = 1. If n = 0,
    signal is missing, at a cost of left_out > 1 times w^2. Progress goes as S^2 / V, S = sum_i
    s_i being the signal, V the variance: to lose s_i hurts like a variance of 2 V s_i / S. With a
    baseline s_i ~ w_i^2, as both have a factor p q, and V = (1 + rho) sum_i w_i^2 if all have
    `smallest` samples; rho: variance between prompts over that within. This makes it 2 (1 + rho)
    w_i^2. The default takes rho for 1, and serves RAFT as well. Bought is, again and again, what
    lowers the sum most for each sample: optimal for smallest = 1, nearly so for 2.
    """
    counts, left = np.zeros(len(weights), dtype=np.int64), operator.index(budget)
    weights = _check_vectors(weights=weights)[0].tolist()
    first = math.sqrt((left_out - 1) / smallest)
    heap = [(-first * w, 0, i) for i, w in enumerate(weights)]  # -sqrt(gain for each sample), n, i
    heapq.heapify(heap)
    while heap and left > 0:
        _, n, i = heapq.heappop(heap)
        size = smallest if n == 0 else 1
        if size <= left:  # else it stays left out
            counts[i] += size
            left -= size
            n = int(counts[i]) - smallest + 1  # that say something
            heapq.heappush(heap, (-weights[i] / math.sqrt(n * (n + 1)), n, i))
    return counts


def estimator_variance(counts, second_moments) -> float:
    """sum_i c_i / n_i: the variance bound when prompt i gets n_i samples (section 3 of the paper).

    counts: n_i >= 0; second_moments: c_i >= 0, for Lemma 1 G_i^2 / p_i; (prompts,) each. It is
    infinite if some c_i > 0 has n_i = 0. Raises ValueError naming the argument.
    """
    n, c = _check_vectors(counts=counts, second_moments=second_moments)
    with np.errstate(divide="ignore"):
        return float(np.sum(c[c > 0] / n[c > 0]))


# --- p and G of prompts that nobody has sampled yet ------------------------------------------
FORGET = 0.98  # of what was learnt, how much is left after a step: the policy moves
RIDGE = 30.0  # prior precision of a regression's coefficients
LOG_ODDS = np.linspace(-12, 12, 97)  # ln p/q, q = 1 - p: a grid for beliefs about p
LOG_P, LOG_Q = -np.logaddexp(0, -LOG_ODDS), -np.logaddexp(0, LOG_ODDS)
STRENGTHS = np.geomspace(0.25, 64, 9)  # kappa: as how many samples a prediction counts


def logistic(x: np.ndarray) -> np.ndarray:
    """p = 1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


def regress(belief, features, targets, num_drawn, is_share: bool) -> tuple:
    """One step of an online regression: E[target] = features @ c; of shares, its logistic.

    belief: what is known of c is Gaussian, (mean, precision); a little faded, it is the prior here.
    features: (prompts, features). targets: what was seen, with a weight of num_drawn; (prompts,).
    """
    mean, precision = belief
    prior = FORGET * precision + (1 - FORGET) * RIDGE * np.eye(len(mean))

    def loss(c) -> float:  # of shares: -ln of how likely c is, but for a constant
        x, change = features @ c, c - belief[0]
        return num_drawn @ (np.logaddexp(0, x) - targets * x) + change @ prior @ change / 2

    for _ in range(4):  # Newton's steps to the likeliest c
        expected = logistic(features @ mean) if is_share else features @ mean
        slope = expected * (1 - expected) if is_share else 1.0
        gradient = features.T @ (num_drawn * (targets - expected)) - prior @ (mean - belief[0])
        precision = (features.T * (num_drawn * slope)) @ features + prior
        step = np.linalg.solve(precision, gradient)
        while is_share and loss(mean + step) > loss(mean) + 1e-6:  # it went too far
            step = step / 2
        mean = mean + step
    return mean, precision


def betas(mu: np.ndarray) -> np.ndarray:
    """Beta(kappa mu, kappa (1 - mu)) of each kappa, on the grid: (strengths, prompts, grid)."""
    mu = mu.clip(0.005, 0.995)  # the grid, too, leaves small mu some hope: it begins at p = 6e-6
    a, b = (STRENGTHS[:, None, None] * share[:, None] for share in (mu, 1 - mu))
    logs = a * LOG_P + b * LOG_Q  # per log-odds: per p, it would be a - 1 and b - 1
    values = np.exp(logs - logs.max(axis=2, keepdims=True))
    return values / values.sum(axis=2, keepdims=True)


class Predictor:
    """Predicts p, G+ and G- from hidden states of a prompt, and learns from what is then drawn.

    learnt: all that it has learnt, arrays by name: {} at first, or another's `learnt`, in arrays
    or lists. states: numbers about each prompt, (prompts, states); several at first.
    """

    def __init__(self, learnt: dict):
        self.learnt = {name: np.asarray(values) for name, values in learnt.items()}

    def features(self, states: np.ndarray) -> np.ndarray:
        """States standardised as the first step's were, clipped, and a 1: (prompts, features)."""
        known, size = self.learnt, states.shape[1] + 1
        if not known:
            known |= {"centre": states.mean(axis=0), "scale": states.std(axis=0) + 1e-6}
            known["log_evidence"] = np.zeros(len(STRENGTHS))  # of each kappa
            for name in ("p", "norm_right", "norm_wrong"):  # regressions of ln p/q and of ln G
                known |= {f"{name} mean": np.zeros(size), f"{name} precision": RIDGE * np.eye(size)}
        standard = (states - known["centre"]) / known["scale"]
        return np.hstack([standard.clip(-10, 10), np.ones((len(states), 1))])

    def weights(self, features: np.ndarray, rule) -> tuple[np.ndarray, np.ndarray]:
        """(mu, sqrt(E[w^2] over p)), (prompts,) each: the mean of p, and a rule's weights.

        p is Beta(kappa mu, kappa (1 - mu)), averaged over kappa by how well each has explained the
        samples so far. rule: (p, G+, G-), (prompts,) each, to weights.
        """
        known = self.learnt
        x = features @ known["p mean"]  # ln p/q, and its variance
        variance = (features * np.linalg.solve(known["p precision"], features.T).T).sum(axis=1)
        mu = logistic(x / np.sqrt(1 + np.pi / 8 * variance))  # E[p], MacKay's approximation
        evidence = np.exp(known["log_evidence"] - known["log_evidence"].max())
        prior = np.tensordot(evidence / evidence.sum(), betas(mu), 1)  # (prompts, grid)
        norms = [np.exp(features @ known[f"{name} mean"]) for name in ("norm_right", "norm_wrong")]
        squares = [rule(np.full(len(mu), p), *norms) ** 2 for p in np.exp(LOG_P)]  # grid x prompts
        return mu, np.sqrt((prior.T * squares).sum(axis=0))

    def learn(self, features: np.ndarray, mu: np.ndarray, table: dict) -> None:
        """From a step's samples: table, of summarise_samples; mu, what was predicted."""
        known, right, drawn = self.learnt, table["num_right"], table["num_drawn"]
        log_likelihood = np.outer(right, LOG_P) + np.outer(drawn - right, LOG_Q)  # (prompts, grid)
        likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
        evidence = np.log((betas(mu) * likelihood).sum(axis=2)).sum(axis=1)  # ln P(table | kappa)
        known["log_evidence"] = FORGET * known["log_evidence"] + evidence
        observed = {"p": (right / np.maximum(drawn, 1), drawn)}  # (targets, their weights)
        for name in ("norm_right", "norm_wrong"):
            seen = table[name] > 0
            observed[name] = np.log(np.where(seen, table[name], 1.0)), seen
        for name, (targets, num_observed) in observed.items():
            belief = known[f"{name} mean"], known[f"{name} precision"]
            belief = regress(belief, features, targets, num_observed, is_share=name == "p")
            known[f"{name} mean"], known[f"{name} precision"] = belief


def _check_vectors(**named) -> list[np.ndarray]:
    """The arguments as float64, (prompts,) each; ValueError unless finite and not negative."""
    vectors = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    shape = next(iter(vectors.values())).shape
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.shape != shape or not (0 <= vector).all() or np.inf in vector:
            raise ValueError(f"{name} must be (prompts,) like others, finite, >= 0; got {vector}")
        if name == "accept_rates" and (vector > 1).any():
            raise ValueError(f"accept_rates must lie in [0, 1], found {vector.max()}")
    return list(vectors.values())


def main() -> None:
    """Print how GVM spreads 64 samples over eight prompts, and the variance with 8 of each."""
    p = np.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.05, 0.01, 0.0])
    G = np.array([0.2, 0.5, 1.0, 1.2, 1.4, 1.5, 1.5, 0.0])
    gvm = allocate(gvm_weights(p, G), budget=64)
    print("  p     G    n")
    for row in zip(p, G, gvm):
        print("{:.2f}  {:.2f}  {:2d}".format(*row))
    c = np.divide(G**2, p, out=np.zeros(8), where=p > 0)
    uniform_bound, bound = estimator_variance(np.full(8, 8), c), estimator_variance(gvm, c)
    print(f"variance bound: {uniform_bound:.1f} with 8 samples of each, {bound:.1f} with these n")


if __name__ == "__main__":
    main()
