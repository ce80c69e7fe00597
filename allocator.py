"""Where the samples go: GVM's budget allocation (arXiv 2505.02391). Needs numpy only: copy it.

    python allocator.py                                         # a small table of what it does
    counts = allocate(gvm_weights(p, G), budget=8 * len(p))     # in your project

Prompt i has an acceptance rate p_i, the probability that one sample is right, and a gradient
norm G_i, the root mean square over its right samples. With n_i samples drawn, of which the
right ones form D_i, the unbiased estimator of Lemma 1 is

    -sum_i 1/(n_i p_i) sum_{y in D_i} grad ln pi(y | x_i).

It averages n_i independent terms of prompt i, each with second moment c_i = G_i^2 / p_i, so
its variance is at most sum_i c_i / n_i. Under a budget sum_i n_i = N this is smallest for n_i
proportional to sqrt(c_i) = G_i / sqrt(p_i). Hard prompts get more, because few of their
samples count. Prompts that are never solved would get everything, so Eq. 7 divides c_i by
1 + alpha / p_i^beta. The solution is Proposition 1:

    n_i = N w_i / sum_j w_j,        w_i = sqrt(c_i) = G_i / sqrt(p_i + alpha / p_i^(beta - 1)).

Three things are added here:
- Samples are whole. `allocate` finds the integers that minimise sum_i w_i^2 / n_i exactly.
- The weights belong to the estimator. `reward_weights` is for GRPO and its relatives.
- Nobody knows p. After two samples, the share of right ones is 0 for many a prompt that is
  merely hard. `posterior_weights` averages over every p that the samples leave possible.
"""

import heapq
import math
import operator

import numpy as np


def summarise_samples(prompts, is_right, lengths, norms, num_prompts: int) -> dict:
    """What graded samples say of each prompt: a table of columns, (num_prompts,) each.

    prompts: the row of each sample's prompt; is_right; lengths, in tokens; norms, of gradients;
    (samples,) each. norm_right, norm_wrong: root mean squares over right and over wrong samples,
    0 without any, as in the derivation (Algorithm 2 writes the mean).
    """

    def total(values: np.ndarray) -> np.ndarray:
        """The sum over each prompt's samples: (samples,) to (num_prompts,)."""
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
    damping of Eq. 7, by default as published. At p_i = 0 the weight is 0, the formula's limit.
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
        accept_rates=accept_rates, norm_right=norm_right, norm_wrong=norm_wrong
    )
    q = 1 - p
    return np.sqrt(p * q * (q * norm_right**2 + p * norm_wrong**2))


def posterior_weights(rule, num_right, num_drawn, norm_right, norm_wrong) -> np.ndarray:
    """sqrt(E[w_i^2]), (prompts,): the weights of `rule` averaged over what p_i may be.

    What is known of p_i: num_right_i of num_drawn_i samples were right; and a prior, fitted to
    all prompts. No weight is 0 by bad luck alone. A prompt without a right (wrong) sample is
    given the root mean square over the others as its G+ (G-).
    rule: (p, G+, G-) to weights, called with one p for all prompts at a time. All arrays are
    (prompts,). Raises ValueError naming the argument, or if the rule compares prompts.
    """
    num_right, num_drawn, norm_right, norm_wrong = _check_vectors(
        num_right=num_right, num_drawn=num_drawn, norm_right=norm_right, norm_wrong=norm_wrong
    )
    if (num_right > num_drawn).any():
        raise ValueError("num_right must not be above num_drawn")
    if compares_prompts(rule):
        raise ValueError("rule compares prompts: its weights cannot be averaged over p")
    num_wrong = num_drawn - num_right
    norm_right = _fill_unknown(norm_right, known=num_right > 0)
    norm_wrong = _fill_unknown(norm_wrong, known=num_wrong > 0)

    # 1. Likelihood on a grid that is even in the log-odds ln p/q, q = 1 - p:
    #    P(counts_i | p) ~ p^right q^wrong.
    log_odds = np.linspace(-12, 12, 97)  # p from 6e-6 to 1 - 6e-6: beyond what samples can tell
    log_p = -np.logaddexp(0, -log_odds)  # (grid,)
    log_q = -np.logaddexp(0, log_odds)  # (grid,)
    log_likelihood = np.outer(num_right, log_p) + np.outer(num_wrong, log_q)  # (prompts, grid)
    log_likelihood -= log_likelihood.max(axis=1, keepdims=True)  # or exp would underflow
    likelihood = np.exp(log_likelihood)

    # 2. Prior: Beta(a, b), averaged over a and b by how well they explain all counts:
    #    P(p) = sum_ab Beta(p | a, b) prod_i P(counts_i | a, b). Per log-odds it is p^a q^b.
    #    Small a and b: nearly all prompts are hopeless or mastered; large ones: all are alike.
    shapes_tried = np.geomspace(0.05, 20, 16)
    a, b = np.meshgrid(shapes_tried, shapes_tried)  # (16, 16) each
    priors = np.exp(np.outer(a, log_p) + np.outer(b, log_q))  # (256, grid), one for each a, b
    priors /= priors.sum(axis=1, keepdims=True)
    log_evidence = np.log(priors @ likelihood.T).sum(axis=1)  # (256,)
    prior = np.exp(log_evidence - log_evidence.max()) @ priors  # (grid,)

    # 3. Expectation over the posterior: E[w_i^2] = sum_p P(p | counts_i) w_i(p)^2.
    posterior = prior * likelihood  # (prompts, grid)
    posterior /= posterior.sum(axis=1, keepdims=True)
    second_moments = np.zeros(len(num_right))
    for p, probability in zip(np.exp(log_p), posterior.T):
        weights = rule(np.full(len(num_right), p), norm_right, norm_wrong)
        second_moments += probability * weights**2
    return np.sqrt(second_moments)


def compares_prompts(rule) -> bool:
    """Whether a rule gives a prompt another weight alone than among others."""
    several, norms = np.array([0.2, 0.5, 0.5, 0.8]), np.array([1.0, 1.0, 2.0, 3.0])
    alone = [rule(p, norm, norm)[0] for p, norm in zip(several.reshape(4, 1), norms.reshape(4, 1))]
    return not np.allclose(rule(several, norms, norms), alone)


def _fill_unknown(norms: np.ndarray, known: np.ndarray) -> np.ndarray:
    typical = np.sqrt(np.mean(norms[known] ** 2)) if known.any() else 0.0
    return np.where(known, norms, typical)


def allocate(weights, budget, min_samples=0, max_samples=None, prices=None) -> np.ndarray:
    """The integers n_i that minimise sum_i w_i^2 / n_i, with sum_i n_i = budget exactly.

    weights: w_i >= 0, (prompts,). min_samples, max_samples: bounds of n_i, one integer for all
    or (prompts,). prices: tau_i > 0, (prompts,), what a sample costs, say its mean tokens. The
    budget may then be fractional; sum_i tau_i n_i stays within it, by less than the next sample.
    Returns int64 counts, (prompts,), the same on every machine. A weight of 0 gets its minimum,
    unless no positive weight can take more: the rest is then spread evenly over the zeros.
    Raises ValueError naming the argument for bad weights and for bounds that no allocation can
    meet, TypeError for a budget that is not whole.
    """
    if prices is None:
        budget, prices = operator.index(budget), np.ones(np.shape(weights))
    weights, prices = _check_vectors(weights=weights, prices=prices)
    lower = _check_counts("min_samples", min_samples, len(weights))
    upper = np.full(len(weights), np.inf)
    if max_samples is not None:
        upper = _check_counts("max_samples", max_samples, len(weights))
    if (prices == 0).any():
        raise ValueError("prices must be positive")
    if (lower > upper).any():
        raise ValueError("min_samples is above max_samples")
    if not prices @ lower <= budget <= prices @ upper or budget == np.inf:
        raise ValueError(f"a budget of {budget} is below min_samples or above max_samples in all")
    value = weights / np.sqrt(prices)
    start = np.maximum(lower, np.minimum(_head_start(value, lower, prices, budget), upper))
    return _buy_one_by_one(value, start.astype(np.int64), upper, prices, budget)


def allocate_round(weights, already, mean_samples, rounds_left, prices=None) -> np.ndarray:
    """The counts after this round, (prompts,), if it spends an equal part of what is left.

    already: how many samples each prompt has, (prompts,). mean_samples: what the budget is for
    each prompt in the end. weights, prices, errors: as for `allocate`.
    """
    costs = np.ones(len(already)) if prices is None else np.asarray(prices)
    spent = costs @ already
    left = max(mean_samples * costs.sum() - spent, 0)
    return allocate(weights, spent + left / rounds_left, already, prices=costs)


def _buy_one_by_one(value, counts, upper, prices, budget) -> np.ndarray:
    """Add the most useful sample, again and again, until the next one is too expensive.

    One more sample of prompt i lowers w^2 / n by w^2 / (n (n + 1)), and each further one by less,
    so taking the largest gain per price every time is optimal (Huntington and Hill's method).
    """
    left = budget - prices @ counts
    counts, upper, prices, value = (x.tolist() for x in (counts, upper, prices, value))

    def priority(i: int) -> tuple[int, float, int]:
        """The smallest is bought first: first samples, then others, then those of weight 0."""
        n = counts[i]
        if value[i] == 0:
            return (2, n, i)
        return (1, -value[i] / math.sqrt(n * (n + 1)), i) if n > 0 else (0, -value[i], i)

    heap = [priority(i) for i in range(len(counts)) if counts[i] < upper[i]]
    heapq.heapify(heap)
    while heap and prices[heap[0][-1]] <= left:
        i = heapq.heappop(heap)[-1]
        counts[i] += 1
        left -= prices[i]
        if counts[i] < upper[i]:
            heapq.heappush(heap, priority(i))
    return np.array(counts, dtype=np.int64)


def _head_start(value, lower, prices, budget) -> np.ndarray:
    """Counts, (prompts,), that the optimum surely reaches, so that few are bought one by one.

    With t^2 the gain of the last sample bought, floor(value_i/t) <= n_i <= lower_i + value_i/t + 1.
    Together the upper bounds cost at least what is spent: that bounds 1/t, and with it each n_i.
    """
    if not value.any():
        return lower
    share = value / value.max()
    spent = budget - prices.max()  # at least: what is left does not buy the next sample
    inverse_t = (spent - prices @ lower - prices.sum()) / (prices @ share)
    return np.floor(share * max(inverse_t, 0.0))


def estimator_variance(counts, second_moments) -> float:
    """sum_i c_i / n_i: the variance bound when prompt i gets n_i samples (section 3 of the paper).

    counts: n_i >= 0; second_moments: c_i >= 0, for Lemma 1 G_i^2 / p_i; (prompts,) each. It is
    infinite if some c_i > 0 has n_i = 0. Raises ValueError naming the argument.
    """
    n, c = _check_vectors(counts=counts, second_moments=second_moments)
    with np.errstate(divide="ignore"):
        return float(np.sum(c[c > 0] / n[c > 0]))


def _check_vectors(**named) -> list[np.ndarray]:
    """The arguments as float64, (prompts,) each; ValueError unless finite and not negative."""
    vectors = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    shape = next(iter(vectors.values())).shape
    for name, vector in vectors.items():
        if vector.ndim != 1 or vector.shape != shape:
            raise ValueError(f"{name} must be (prompts,), as the others; got shape {vector.shape}")
        if not np.isfinite(vector).all() or (vector < 0).any():
            raise ValueError(f"{name} must be finite and not negative, got {vector}")
        if name == "accept_rates" and (vector > 1).any():
            raise ValueError(f"accept_rates must lie in [0, 1], found {vector.max()}")
    return list(vectors.values())


def _check_counts(name: str, values, num_prompts: int) -> np.ndarray:
    values = np.asarray(values)
    whole = np.issubdtype(values.dtype, np.integer) and (values >= 0).all()
    if not whole or values.shape not in ((), (num_prompts,)):
        raise ValueError(f"{name} must hold non-negative integers, a single one or one per prompt")
    return np.broadcast_to(values, (num_prompts,)).astype(np.int64)


def main() -> None:
    """Print both allocations of 64 samples over eight prompts, and each one's variance."""
    p = np.array([1.0, 0.9, 0.6, 0.3, 0.1, 0.05, 0.01, 0.0])
    G = np.array([0.2, 0.5, 1.0, 1.2, 1.4, 1.5, 1.5, 0.0])
    uniform, gvm = np.full(8, 8), allocate(gvm_weights(p, G), budget=64)
    print("acceptance  gradient     samples")
    print("   rate p    norm G   uniform  GVM")
    for row in zip(p, G, uniform, gvm):
        print("{:9.2f}  {:8.2f}  {:8d}  {:3d}".format(*row))
    c = np.divide(G**2, p, out=np.zeros(8), where=p > 0)
    bounds = estimator_variance(uniform, c), estimator_variance(gvm, c)
    print("variance bound: {:.1f} with uniform counts, {:.1f} with GVM's".format(*bounds))


if __name__ == "__main__":
    main()
