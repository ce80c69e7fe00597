"""Where the samples go: GVM's budget allocation (arXiv 2505.02391). numpy only; copy this file.

The idea. A prompt i with acceptance rate p_i (the probability that one sample is right) and gradient
norm G_i (root mean square over its right samples) gets n_i samples. The unbiased estimator of Lemma 1,

    -sum_i 1/(n_i p_i) * sum over the accepted samples of  grad ln pi(y, z_i | x_i),

averages n_i independent terms per prompt, each with second moment c_i = G_i^2 / p_i, so that its variance
is at most sum_i c_i / n_i. Setting the derivative of sum_i c_i / n_i + lambda * sum_i n_i to zero gives
n_i proportional to sqrt(c_i) = G_i / sqrt(p_i): hard prompts get more, because few of their samples count.
Eq. 7 divides c_i by (1 + alpha / p_i^beta), which sends n_i back to 0 as p_i -> 0, so that hopeless prompts do
not eat the budget; its solution is Proposition 1:

    n_i = N * w_i / sum_j w_j,        w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)).

Samples are whole. Rounding that formula neither keeps the sum nor minimises; `allocate` returns the exact
integer minimiser of sum_i w_i^2 / n_i. One more sample lowers the term of prompt i by w_i^2 / (n_i (n_i + 1)),
and each further one by less, so giving every sample to the prompt with the largest

    w_i / sqrt(n_i (n_i + 1))                                  (its "priority"; Huntington-Hill's method)

is optimal. Instead of one sample at a time, the code finds the priority that the last sample has.

    python allocator.py                                    # a small table of what all this does
    counts = allocate(gvm_weights(p, G), budget=8 * len(p))     # in your project
"""

import operator

import numpy as np


def gvm_weights(accept_rates, grad_norms, alpha: float = 1e-3, beta: float = 2.0) -> np.ndarray:
    """Proposition 1: w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), the ideal shares of the budget up to scale.

    accept_rates: p_i in [0, 1], (prompts,). grad_norms: G_i >= 0, (prompts,); ignored where p_i = 0.
    Returns float64 weights, (prompts,). Weight 0 where p_i = 0, the limit of the formula: nothing that is drawn there
    is accepted, so nothing reduces the variance; and where G_i = 0: there is no variance to reduce.
    Raises ValueError naming the argument for NaN, infinite, negative or out-of-range values, or unequal shapes.
    """
    accept_rates, grad_norms = _vector("accept_rates", accept_rates), _vector("grad_norms", grad_norms)
    if accept_rates.shape != grad_norms.shape:
        raise ValueError(f"grad_norms has {grad_norms.size} entries for {accept_rates.size} accept_rates")
    if (accept_rates > 1).any():
        raise ValueError(f"accept_rates must lie in [0, 1], found {accept_rates.max()}")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
    if not 2 <= beta < np.inf:
        raise ValueError(f"beta must be finite and at least 2, got {beta}")
    solved = accept_rates > 0
    p, G = accept_rates[solved], grad_norms[solved]
    weights = np.zeros(len(accept_rates))
    with np.errstate(over="ignore", divide="ignore"):  # a tiny p: the penalty is infinite, the weight 0
        penalty = alpha / p ** (beta - 1) if alpha > 0 else 0.0
        weights[solved] = G / np.sqrt(p + penalty)
    return weights


def allocate(weights, budget: int, min_samples=0, max_samples=None) -> np.ndarray:
    """The integers n_i that minimise sum_i w_i^2 / n_i, with min <= n_i <= max and sum n_i = budget exactly.

    weights: w_i >= 0, (prompts,). min_samples, max_samples: integers, one for all or (prompts,); no maximum if None.
    Returns int64 counts, (prompts,), the same on every machine; equal priorities are served by index. Settled cases:
    weight 0 gets its minimum, unless all positive ones are at their maximum (the rest is then spread evenly over the
    zeros) or all weights are 0 (evenly over all); a budget too small for one sample each serves the largest weights.
    Raises ValueError naming the argument for bad weights and for bounds that no allocation can meet.
    """
    weights, budget = _vector("weights", weights), operator.index(budget)
    lower = _counts("min_samples", min_samples, len(weights))
    upper = _counts("max_samples", max(budget, 0) if max_samples is None else max_samples, len(weights))
    if max_samples is not None and (lower > upper).any():
        raise ValueError("min_samples is above max_samples")
    if lower.sum() > budget:
        raise ValueError(f"a budget of {budget} is below min_samples, {lower.sum()} over {len(weights)} prompts")
    if upper.sum() < budget:
        raise ValueError(f"a budget of {budget} is above max_samples, {upper.sum()} over {len(weights)} prompts")
    counts = lower.copy()
    positive = weights > 0
    spend = min(budget - lower[~positive].sum(), upper[positive].sum())
    counts[positive] = _minimise(weights[positive], spend, lower[positive], upper[positive])
    rest = budget - counts[positive].sum()
    counts[~positive] = _minimise(np.ones((~positive).sum()), rest, lower[~positive], upper[~positive])
    return counts


def estimator_variance(counts, second_moments) -> float:
    """sum_i c_i / n_i: the variance bound of a gradient estimate that draws n_i samples of prompt i (section 3).

    counts: n_i >= 0, (prompts,). second_moments: c_i >= 0, (prompts,), the expected squared norm of one sample's term,
    for Lemma 1 c_i = G_i^2 / p_i. A prompt with c_i = 0 adds nothing, one with c_i > 0 and n_i = 0 makes it infinite.
    Raises ValueError naming the argument for bad values.
    """
    counts, second_moments = _vector("counts", counts), _vector("second_moments", second_moments)
    if counts.shape != second_moments.shape:
        raise ValueError(f"second_moments has {second_moments.size} entries for {counts.size} counts")
    needed = second_moments > 0
    if (counts[needed] == 0).any():
        return float("inf")
    return float(np.sum(second_moments[needed] / counts[needed]))


def variance_ratio(accept_rates, grad_norms, counts, even: float) -> float | None:
    """The variance bound of `counts` over that of `even` samples for every prompt, with c_i = G_i^2 / p_i (Lemma 1).

    All (prompts,). Below 1: better than uniform. Prompts with p_i = 0 have no known c_i and are left out; None if all
    are. With p and G estimated from the same pilot as the counts it is optimistic: it believes what misled them.
    """
    accept_rates, grad_norms = _vector("accept_rates", accept_rates), _vector("grad_norms", grad_norms)
    known = (accept_rates > 0) & (grad_norms > 0)
    if not known.any():
        return None
    second_moments = grad_norms[known] ** 2 / accept_rates[known]
    chosen = estimator_variance(np.asarray(counts)[known], second_moments)
    return chosen / estimator_variance(np.full(known.sum(), even), second_moments)


def _minimise(weights: np.ndarray, budget: int, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """`allocate` for positive weights and bounds that can be met."""
    unserved = np.flatnonzero((lower == 0) & (upper > 0))  # a first sample has infinite priority ...
    spare = budget - lower.sum()
    counts = lower.copy()
    if spare <= len(unserved):  # ... and among first samples the larger weight gains more
        counts[unserved[np.argsort(-weights[unserved], kind="stable")[:spare]]] = 1
        return counts
    counts[unserved] = 1

    # Sample k + 1 of prompt i has priority w / sqrt(k (k + 1)), which is at least t for k (k + 1) <= (w / t)^2. Solved
    # for k, the prompt holds (1 + sqrt(1 + 4 (w / t)^2)) / 2 such samples, its first included. Logarithms, because
    # weights may span any range.
    floor, log_weights = counts, np.log(weights)

    def at_least(log_threshold: float) -> np.ndarray:
        with np.errstate(over="ignore"):
            ratio_squared = np.exp(2 * (log_weights - log_threshold))
        return np.clip(np.floor((1 + np.sqrt(1 + 4 * ratio_squared)) / 2), floor, upper).astype(np.int64)

    # Bisect: at `high` at most the budget is spent, at `low` at least the budget.
    high, low = log_weights.max() + 1, log_weights.min() - np.log(upper.max() + 1.0)
    counts, most = floor, upper
    while (most - counts).sum() > len(weights):
        middle = (high + low) / 2
        if not low < middle < high:
            break
        trial = at_least(middle)
        if trial.sum() <= budget:
            high, counts = middle, trial
        else:
            low, most = middle, trial

    # What is left undecided is about one sample a prompt: rank those samples and take the best.
    undecided = most - counts
    owner = np.repeat(np.arange(len(weights)), undecided)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(undecided) - undecided, undecided)
    held = (counts[owner] + nth).astype(float)
    order = np.argsort(-weights[owner] / np.sqrt(held * (held + 1)), kind="stable")
    return counts + np.bincount(owner[order[: budget - counts.sum()]], minlength=len(weights))


def _vector(name: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, (prompts,), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity at index {np.flatnonzero(~np.isfinite(values))[0]}")
    if (values < 0).any():
        raise ValueError(f"{name} must not be negative, found {values.min()}")
    return values


def _counts(name: str, values, prompts: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape not in ((), (prompts,)) or not np.issubdtype(values.dtype, np.integer) or (values < 0).any():
        raise ValueError(f"{name} must hold non-negative integers, one or one a prompt")
    return np.broadcast_to(values, (prompts,)).astype(np.int64)


def main() -> None:
    """Print p, G and both allocations of 64 samples over eight prompts, with each one's share of the variance."""
    accept_rates = np.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.05, 0.01, 0.0])
    grad_norms = np.array([0.2, 0.5, 1.0, 1.2, 1.4, 1.5, 1.5, 0.0])
    solved = accept_rates > 0  # a prompt that is never solved is outside of the estimate
    second_moments = np.zeros(8)
    second_moments[solved] = grad_norms[solved] ** 2 / accept_rates[solved]
    uniform, gvm = np.full(8, 8), allocate(gvm_weights(accept_rates, grad_norms), budget=64)
    print("acceptance  gradient     samples       variance c/n")
    print("   rate p    norm G   uniform  GVM    uniform     GVM")
    for p, G, c, n, m in zip(accept_rates, grad_norms, second_moments, uniform, gvm):
        print(f"{p:9.2f}  {G:8.2f}  {n:8d}  {m:3d}  {c / n:9.3f}  {c / m if m else 0:6.3f}")
    totals = [estimator_variance(counts, second_moments) for counts in (uniform, gvm)]
    print(f"{'sum':>9s}  {'':8s}  {uniform.sum():8d}  {gvm.sum():3d}  {totals[0]:9.3f}  {totals[1]:6.3f}")


if __name__ == "__main__":
    main()
