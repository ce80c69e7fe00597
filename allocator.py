"""Where the samples go: GVM's budget allocation (arXiv 2505.02391). Needs numpy only: copy it.

    python allocator.py                                            # a small table of what it does

    counts = allocate(gvm_weights(p, G), budget=8 * len(p))        # in your project

Prompt i has an acceptance rate p_i, the probability that one sample is right, and a gradient norm
G_i, the root mean square over its right samples. Say that n_i samples are drawn, of which the right
ones form D_i. Then the unbiased estimator of the gradient (Lemma 1) is

    -sum_i 1/(n_i p_i) sum_{y in D_i} grad ln pi(y | x_i).

For each prompt it averages n_i independent terms, each with the second moment c_i = G_i^2 / p_i. So
its variance is at most sum_i c_i / n_i. Under a budget sum_i n_i = N this is smallest for n_i
proportional to sqrt(c_i): hard prompts get more, because few of their samples count. Prompts that
are never solved would get everything, so Eq. 7 divides c_i by 1 + alpha / p_i^beta. The solution is
Proposition 1:

    n_i = N w_i / sum_j w_j,        w_i = sqrt(c_i / (1 + alpha / p_i^beta))
                                        = G_i / sqrt(p_i + alpha / p_i^(beta - 1)).

(Training does not know p_i: where the estimator has n_i p_i, it has the number of right samples.)
"""

import heapq
import math
import operator

import numpy as np


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


def allocate(weights, budget: int, min_samples=0) -> np.ndarray:
    """The integers n_i that minimise sum_i w_i^2 / n_i, with sum_i n_i = budget exactly.

    weights: w_i >= 0, (prompts,). min_samples: the smallest n_i, an integer for all or (prompts,).
    Returns int64 counts, (prompts,). A prompt of weight 0 gets its minimum; if all weights are 0,
    the budget is spread evenly. Raises ValueError naming the argument for bad weights or a budget
    below the minimum, TypeError for one that is not whole.
    """
    budget = operator.index(budget)
    [weights] = _check_vectors(weights=weights)
    lower = np.asarray(min_samples)
    if lower.dtype.kind != "i" or lower.shape not in ((), weights.shape) or (lower < 0).any():
        raise ValueError("min_samples must be integers >= 0, a single one or one per prompt")
    lower = np.broadcast_to(lower, weights.shape)
    if budget < lower.sum():
        raise ValueError(f"a budget of {budget} is below min_samples, {lower.sum()} in all")
    if not weights.any():
        weights = np.ones_like(weights)

    # The loop below alone would do. To save it most of its steps, start from Proposition 1 rounded
    # down, for the budget less the minima and a sample a prompt: that is never above the best n_i.
    shares = weights / weights.max(initial=1.0)  # or their sum may overflow
    shares = shares / shares.sum()
    start = np.floor(shares * (budget - lower.sum() - len(weights))).astype(np.int64)
    counts, weights = np.maximum(lower, start).tolist(), weights.tolist()

    # Give the most useful sample, again and again. One more sample of prompt i lowers w^2 / n
    # by w^2 / (n (n + 1)), and each further one by less, so that to take the largest gain first is
    # optimal (the method of equal proportions of Huntington and Hill).
    def priority(i: int) -> tuple[bool, float, int]:
        """The smallest is served first: all first samples before any second one."""
        n = counts[i]
        return n > 0, -weights[i] / math.sqrt(max(n * (n + 1), 1)), i

    heap = [priority(i) for i, weight in enumerate(weights) if weight > 0]
    heapq.heapify(heap)
    left = budget - sum(counts)
    while heap and left > 0:
        i = heap[0][-1]
        counts[i] += 1
        left -= 1
        heapq.heapreplace(heap, priority(i))
    return np.array(counts, dtype=np.int64)


def estimator_variance(counts, second_moments) -> float:
    """sum_i c_i / n_i: the variance bound when prompt i gets n_i samples (section 3 of the paper).

    counts: n_i >= 0; second_moments: c_i >= 0, for Lemma 1 G_i^2 / p_i; (prompts,) each. It is
    infinite if some c_i > 0 has n_i = 0. Raises ValueError naming the argument.
    """
    n, c = _check_vectors(counts=counts, second_moments=second_moments)
    with np.errstate(divide="ignore"):
        return float(np.sum(c[c > 0] / n[c > 0]))


def summarise_samples(prompts, is_right, norms, num_prompts: int) -> dict[str, np.ndarray]:
    """From graded samples to p and G: a table of columns, (num_prompts,) each.

    prompts: the row of each sample's prompt, integers; is_right: booleans; norms: the gradient norm
    of each sample; (samples,) each. accept_rate is p = num_right / num_drawn, 0 without samples.
    norm_right and norm_wrong, G over right and over wrong samples, are root mean squares, as in the
    derivation (Algorithm 2 writes the mean); 0 without any. Norms that are NaN or infinite are left
    out of them. Raises ValueError naming the argument.
    """
    prompts, is_right, norms = np.asarray(prompts), np.asarray(is_right), np.asarray(norms)
    if not prompts.shape == is_right.shape == norms.shape == (prompts.size,):
        raise ValueError("prompts, is_right and norms must have one entry for each sample")
    if is_right.dtype != bool:
        raise ValueError(f"is_right must be booleans, not {is_right.dtype}; say rewards > 0")
    is_integer = prompts.dtype.kind in "iu"
    if prompts.size and not (is_integer and 0 <= prompts.min() <= prompts.max() < num_prompts):
        raise ValueError(f"prompts must be rows from 0 to {num_prompts - 1}, not ids")

    def total(values: np.ndarray) -> np.ndarray:  # (samples,) to (num_prompts,)
        return np.bincount(prompts, values, minlength=num_prompts)

    num_drawn, num_right = total(np.ones(len(prompts))), total(is_right)
    is_known = np.isfinite(norms)

    def root_mean_square(chosen: np.ndarray) -> np.ndarray:  # of norms: (samples,), booleans
        return np.sqrt(total(np.where(chosen, norms, 0) ** 2) / np.maximum(total(chosen), 1))

    return {
        "num_right": num_right.astype(int),
        "num_drawn": num_drawn.astype(int),
        "accept_rate": num_right / np.maximum(num_drawn, 1),
        "norm_right": root_mean_square(is_right & is_known),
        "norm_wrong": root_mean_square(~is_right & is_known),
    }


# --- beside the paper: another estimator -------------------------------------------------------
def reward_weights(accept_rates, norm_right, norm_wrong) -> np.ndarray:
    """w_i = sqrt(c_i), (prompts,), for the policy gradient of the expected reward: GRPO's.

    A sample's term is A grad ln pi. With the baseline p, A = r - p is q = 1 - p for a right sample
    and -p for a wrong one. With G+ and G- the gradient norms of each kind,

        c = p q^2 G+^2 + q p^2 G-^2 = p q (q G+^2 + p G-^2).

    accept_rates: p_i in [0, 1]; norm_right, norm_wrong: G+, G- >= 0; (prompts,) each. Raises
    ValueError naming the argument. (GRPO divides A by the standard deviation within a group, which
    changes c, but a rule that follows it estimates no better: tests/README.md has the error.)
    """
    p, norm_right, norm_wrong = _check_vectors(
        accept_rates=accept_rates, norm_right=norm_right, norm_wrong=norm_wrong)
    q = 1 - p
    return np.sqrt(p * q * (q * norm_right**2 + p * norm_wrong**2))


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
