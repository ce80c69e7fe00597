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

Another estimator has other c_i, and so other weights w_i = sqrt(c_i): `reward_weights` is for GRPO and its kin. And p
is never known. After few samples, right / drawn is 0 for many a prompt that is merely hard: `posterior_weights` weighs
all acceptance rates that the samples leave possible.

    python allocator.py                                         # a small table of what all this does
    counts = allocate(gvm_weights(p, G), budget=8 * len(p))     # in your project
"""

import operator

import numpy as np


def gvm_weights(accept_rates, grad_norms, alpha: float = 1e-3, beta: float = 2.0) -> np.ndarray:
    """Proposition 1: w_i = G_i / sqrt(p_i + alpha / p_i^(beta - 1)), the ideal shares of the budget up to scale.

    accept_rates: p_i in [0, 1], (prompts,). grad_norms: G_i >= 0, (prompts,); ignored where p_i = 0. alpha, beta: the
    damping of Eq. 7, by default as published. Returns float64 weights, (prompts,). Weight 0 where p_i = 0, the limit of
    the formula: nothing that is drawn there is accepted, so nothing reduces the variance; and where G_i = 0: there is
    no variance to reduce.
    Raises ValueError naming the argument for NaN, infinite, negative or out-of-range values, or unequal shapes.
    """
    accept_rates, grad_norms = _vectors(accept_rates=accept_rates, grad_norms=grad_norms)
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


def reward_weights(accept_rates, grad_norms_right, grad_norms_wrong, normalize_std: bool) -> np.ndarray:
    """w_i = sqrt(c_i) for policy gradients: the estimator of the expected reward's gradient, with a baseline.

    A sample's term is A grad ln pi. With A = r - p (the baseline p_i of a large group, or leave-one-out) a right sample
    has A = 1 - p, a wrong one -p, and with G+ and G- the norms of each kind the second moment is

        c = p (1 - p)^2 G+^2 + (1 - p) p^2 G-^2 = p (1 - p) [(1 - p) G+^2 + p G-^2].

    normalize_std: A is also divided by the rewards' standard deviation sqrt(p (1 - p)), so that
    c = (1 - p) G+^2 + p G-^2 for 0 < p < 1. In both cases 0 at p = 0 and p = 1, where all rewards are equal.
    accept_rates: p_i in [0, 1], grad_norms_right, grad_norms_wrong: >= 0, (prompts,) each; G+ does not matter where
    p_i = 0, nor G- where p_i = 1. Returns float64 weights, (prompts,). Raises ValueError naming the argument.
    """
    p, right, wrong = _vectors(accept_rates=accept_rates, grad_norms_right=grad_norms_right,
                               grad_norms_wrong=grad_norms_wrong)
    if (p > 1).any():
        raise ValueError(f"accept_rates must lie in [0, 1], found {p.max()}")
    variance = p * (1 - p)  # of the reward
    scale = variance > 0 if normalize_std else variance
    return np.sqrt(scale * ((1 - p) * right**2 + p * wrong**2))


def estimate(owners, right, grad_norms, lengths, prompts: int) -> dict[str, np.ndarray]:
    """What samples tell of their prompts, (prompts,) each; the arguments are (samples,), owners a sample's prompt.

    right, drawn: the number of samples that are right, of all. grad_norms_right, grad_norms_wrong: root mean squares
    over samples of each kind, as in the derivation (Algorithm 2 writes the mean), 0 without any. tokens: mean length.
    """
    owners, right = np.asarray(owners, dtype=np.int64), np.asarray(right, dtype=bool)

    def total(values) -> np.ndarray:
        return np.bincount(owners, values, minlength=prompts)

    def rms(kind: np.ndarray) -> np.ndarray:
        return np.sqrt(total(np.square(grad_norms) * kind) / np.maximum(total(kind), 1))

    drawn = np.bincount(owners, minlength=prompts)
    return {"right": np.bincount(owners[right], minlength=prompts), "drawn": drawn, "grad_norms_right": rms(right),
            "grad_norms_wrong": rms(~right), "tokens": total(lengths) / np.maximum(drawn, 1)}


def posterior_weights(rule, right, drawn, grad_norms_right, grad_norms_wrong) -> np.ndarray:
    """sqrt(E[c_i]), the weights of `rule` when p_i is known only from right_i of drawn_i samples: never 0 by bad luck.

    The expectation runs over the posterior of p_i. Its prior is a Beta(a, b), fitted to the counts of all prompts
    together: many unsolved prompts make a hopeless one likelier. Rather than the one best (a, b), which a few counts
    leave open, the prior averages over them by their likelihood. Prompts without a right (wrong) sample get the root
    mean square over the others as G+ (G-).
    rule: maps (p, G+, G-), (prompts,) each, to weights. right, drawn: integers, right <= drawn, grad_norms_right,
    grad_norms_wrong: >= 0, (prompts,) each. Returns float64 weights, (prompts,). Raises ValueError naming the argument.
    """
    right, drawn, *norms = _vectors(right=right, drawn=drawn, grad_norms_right=grad_norms_right,
                                    grad_norms_wrong=grad_norms_wrong)
    if (right > drawn).any():
        raise ValueError("right must not be above drawn")
    for kind, seen in enumerate((right > 0, right < drawn)):
        typical = np.sqrt(np.mean(norms[kind][seen] ** 2)) if seen.any() else 0.0
        norms[kind] = np.where(seen, norms[kind], typical)
    # Everything on a grid of p, even in ln p/(1-p), from 6e-6 to 1 - 6e-6. Prompts of equal counts share a posterior.
    log_odds = np.linspace(-12, 12, 97)
    log_p, log_q = -np.logaddexp(0, -log_odds), -np.logaddexp(0, log_odds)
    pairs = np.stack([right, drawn - right])
    (rights, wrongs), group, prompts = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    likelihood = np.outer(rights, log_p) + np.outer(wrongs, log_q)  # (groups, grid), in logarithms
    likelihood = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))  # up to a factor: they underflow
    a, b = (axis.ravel() for axis in np.meshgrid(*[np.geomspace(0.05, 20, 16)] * 2))
    priors = np.exp(np.outer(a, log_p) + np.outer(b, log_q))  # p^a (1-p)^b: Beta(a, b) as a density in log-odds
    priors /= priors.sum(axis=1, keepdims=True)
    evidence = np.log(priors @ likelihood.T) @ prompts  # ln P(all counts | a, b)
    posterior = np.exp(evidence - evidence.max()) @ priors * likelihood
    posterior /= posterior.sum(axis=1, keepdims=True)
    second_moments = np.zeros(len(right))
    for p, probabilities in zip(np.exp(log_p), posterior.T):
        second_moments += probabilities[group.ravel()] * rule(np.full(len(right), p), *norms) ** 2
    return np.sqrt(second_moments)


def allocate(weights, budget, min_samples=0, max_samples=None, prices=None) -> np.ndarray:
    """The integers n_i that minimise sum_i w_i^2 / n_i, with min <= n_i <= max and sum n_i = budget exactly.

    weights: w_i >= 0, (prompts,). min_samples, max_samples: integers, one for all or (prompts,); no maximum if None.
    Returns int64 counts, (prompts,), the same on every machine; equal priorities are served by index. Settled cases:
    weight 0 gets its minimum, unless all positive ones are at their maximum (the rest is then spread evenly over the
    zeros) or all weights are 0 (evenly over all); a budget too small for one sample each serves the largest weights.
    prices: tau_i > 0, (prompts,), what a sample of prompt i costs, say its mean response tokens. The budget, then any
    number, bounds sum tau_i n_i: samples are bought by gain per price, w_i^2 / (tau_i n_i (n_i + 1)), until the next
    one is too expensive, so that less than its price is left.
    Raises ValueError naming the argument for bad weights and for bounds that no allocation can meet, TypeError for a
    budget that is not whole.
    """
    if prices is None:
        budget, prices = operator.index(budget), np.ones(np.shape(weights))
    weights, prices = _vectors(weights=weights, prices=prices)
    if (prices == 0).any():
        raise ValueError("prices must be positive")
    lower = _counts("min_samples", min_samples, len(weights))
    if max_samples is None:  # more than the budget can buy
        max_samples = lower + max(int(np.ceil(budget / prices.min(initial=np.inf))), 0)
    upper = _counts("max_samples", max_samples, len(weights))
    if (lower > upper).any():
        raise ValueError("min_samples is above max_samples")
    if prices @ lower > budget:
        raise ValueError(f"a budget of {budget} is below min_samples, {prices @ lower:g} over {len(weights)} prompts")
    if prices @ upper < budget:
        raise ValueError(f"a budget of {budget} is above max_samples, {prices @ upper:g} over {len(weights)} prompts")
    counts, positive = lower.copy(), weights > 0

    def serve(group: np.ndarray, group_weights: np.ndarray) -> None:
        if group.any():
            spend = min(budget - prices[~group] @ counts[~group], prices[group] @ upper[group])
            counts[group] = _minimise(group_weights[group], spend, lower[group], upper[group], prices[group])

    serve(positive, weights)
    if (counts == upper)[positive].all():
        serve(~positive, np.sqrt(prices))  # with these, equal gains per price, and so equal counts
    return counts


def estimator_variance(counts, second_moments) -> float:
    """sum_i c_i / n_i: the variance bound of a gradient estimate that draws n_i samples of prompt i (section 3).

    counts: n_i >= 0, (prompts,). second_moments: c_i >= 0, (prompts,), the expected squared norm of one sample's term,
    for Lemma 1 c_i = G_i^2 / p_i. A prompt with c_i = 0 adds nothing, one with c_i > 0 and n_i = 0 makes it infinite.
    Raises ValueError naming the argument for bad values.
    """
    counts, second_moments = _vectors(counts=counts, second_moments=second_moments)
    needed = second_moments > 0
    if (counts[needed] == 0).any():
        return float("inf")
    return float(np.sum(second_moments[needed] / counts[needed]))


def variance_ratio(weights, counts, even: float) -> float | None:
    """sum_i w_i^2 / n_i of these counts over that of `even` samples for every prompt: below 1, better than uniform.

    weights, counts: (prompts,) each. Prompts of weight 0 are left out: None if all are. Infinite if another has none.
    If weights and counts come from the same samples it is optimistic: it believes what may have misled them.
    """
    weights, counts = _vectors(weights=weights, counts=counts)
    if not weights.any():
        return None
    return estimator_variance(counts, weights**2) / estimator_variance(np.full(len(weights), even), weights**2)


def _minimise(weights: np.ndarray, budget, lower: np.ndarray, upper: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """`allocate` for positive weights and bounds that can be met."""
    weights = weights / np.sqrt(prices)  # gain per price: (w / sqrt(tau))^2 / (n (n + 1))
    unserved = np.flatnonzero((lower == 0) & (upper > 0))  # a first sample has infinite priority ...
    spare = budget - prices @ lower
    counts = lower.copy()
    if prices[unserved].sum() > spare:  # ... and among first samples the larger weight gains more
        unserved = unserved[np.argsort(-weights[unserved], kind="stable")]
        counts[unserved[np.cumsum(prices[unserved]) <= spare]] = 1
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
        if prices @ trial <= budget:
            high, counts = middle, trial
        else:
            low, most = middle, trial

    # What is left undecided is about one sample a prompt: rank those samples and take the best.
    undecided = most - counts
    owner = np.repeat(np.arange(len(weights)), undecided)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(undecided) - undecided, undecided)
    held = (counts[owner] + nth).astype(float)
    order = np.argsort(-weights[owner] / np.sqrt(held * (held + 1)), kind="stable")
    affordable = np.cumsum(prices[owner[order]]) <= budget - prices @ counts
    return counts + np.bincount(owner[order[affordable]], minlength=len(weights))


def _vectors(**named) -> list[np.ndarray]:
    vectors = [_vector(name, values) for name, values in named.items()]
    for name, vector in zip(named, vectors):
        if len(vector) != len(vectors[0]):
            raise ValueError(f"{name} has {len(vector)} entries for {len(vectors[0])} {next(iter(named))}")
    return vectors


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
