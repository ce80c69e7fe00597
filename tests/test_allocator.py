"""allocator.py: against brute force, against the greedy algorithm, and on values computed by hand."""

import heapq
import itertools
import subprocess
import sys

import numpy as np
import pytest

from allocator import allocate, estimator_variance, gvm_weights, variance_ratio


def objective(weights, counts) -> float:
    return estimator_variance(counts, np.square(weights))


def compositions(budget, lower, upper):
    """Every list of counts within the bounds whose sum is the budget."""
    for counts in itertools.product(*(range(low, high + 1) for low, high in zip(lower, upper))):
        if sum(counts) == budget:
            yield counts


def greedy(weights, budget, lower, upper) -> np.ndarray:
    """One sample at a time to the largest w / sqrt(n (n + 1)): slow, and plainly right."""
    counts = list(lower)
    heap = []

    def push(i):
        if counts[i] < upper[i]:
            n = counts[i]
            first = n == 0
            heapq.heappush(heap, (-weights[i] if first else -weights[i] / np.sqrt(n * (n + 1)), i, first))

    for i in range(len(weights)):
        push(i)
    for _ in range(budget - sum(lower)):
        best = min((entry for entry in heap if entry[2]), default=heap[0])  # first samples before all others
        heap.remove(best)
        heapq.heapify(heap)
        counts[best[1]] += 1
        push(best[1])
    return np.array(counts)


def test_weights_by_hand():
    # p = 1/2, alpha = 0.25, beta = 2: sqrt(1/2 + 0.25 / (1/2)) = 1; p = 1, alpha = 3: sqrt(1 + 3) = 2.
    assert gvm_weights([0.5], [3.0], alpha=0.25) == pytest.approx([3.0])
    assert gvm_weights([1.0], [3.0], alpha=3.0) == pytest.approx([1.5])
    assert gvm_weights([0.5], [2.0], alpha=0.5, beta=3.0) == pytest.approx([2 / np.sqrt(0.5 + 0.5 / 0.25)])
    assert gvm_weights([0.25], [3.0], alpha=0.0) == pytest.approx([6.0])


def test_weights_vanish_where_nothing_can_be_gained():
    weights = gvm_weights([0.0, 0.5, 1e-300, 1e-3], [5.0, 0.0, 1.0, 1.0])
    assert weights[0] == weights[1] == 0
    assert weights[2] < 1e-100 and 0 < weights[3] < 1.01  # the penalty outweighs 1 / sqrt(p)


@pytest.mark.parametrize(("arguments", "named"), [
    (([np.nan], [1.0]), "accept_rates"),
    (([-0.1], [1.0]), "accept_rates"),
    (([1.1], [1.0]), "accept_rates"),
    (([[0.5]], [1.0]), "accept_rates"),
    (([0.5], [np.nan]), "grad_norms"),
    (([0.5], [np.inf]), "grad_norms"),
    (([0.5], [-1.0]), "grad_norms"),
    (([0.5, 0.5], [1.0]), "grad_norms"),
    (([0.5], [1.0], -1.0), "alpha"),
    (([0.5], [1.0], np.nan), "alpha"),
    (([0.5], [1.0], 1e-3, 1.5), "beta"),
])
def test_weights_refuse_bad_input(arguments, named):
    with pytest.raises(ValueError, match=named):
        gvm_weights(*arguments)


def test_allocation_by_hand():
    # Priorities w / sqrt(n (n + 1)): 4/sqrt(2) = 2.83 and 4/sqrt(6) = 1.63 beat 2/sqrt(2) = 1.41 and 4/sqrt(12).
    assert allocate([4.0, 2.0], 5).tolist() == [3, 2]
    assert allocate([4.0, 2.0], 4).tolist() == [3, 1]
    assert allocate([1.0, 0.0, 3.0], 10, min_samples=2).tolist() == [2, 2, 6]


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_allocation_is_the_minimum_of_every_small_case(prompts):
    for weights in itertools.product([0.5, 1.0, 2.0, 5.0], repeat=prompts):
        for low, high in [(0, 8), (0, 3), (1, 4), (2, 8)]:
            lower, upper = [low] * prompts, [high] * prompts
            for budget in range(low * prompts, min(high * prompts, 8) + 1):
                counts = allocate(weights, budget, low, high)
                assert counts.sum() == budget and counts.min() >= low and counts.max() <= high
                best = min(objective(weights, other) for other in compositions(budget, lower, upper))
                assert objective(weights, counts) == pytest.approx(best, rel=1e-12)  # inf on both sides included


def test_allocation_is_the_minimum_of_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompts = rng.integers(1, 5)
        weights = np.exp(rng.normal(size=prompts) * 2)
        lower = rng.integers(0, 3, prompts)
        upper = lower + rng.integers(0, 5, prompts)
        budget = int(rng.integers(lower.sum(), upper.sum() + 1))
        counts = allocate(weights, budget, lower, upper)
        assert counts.sum() == budget and (lower <= counts).all() and (counts <= upper).all()
        best = min(objective(weights, other) for other in compositions(budget, lower, upper))
        assert objective(weights, counts) == pytest.approx(best, rel=1e-12)


def test_allocation_equals_one_at_a_time_on_larger_cases():
    rng = np.random.default_rng(1)
    for _ in range(60):
        prompts = int(rng.integers(5, 40))
        weights = np.exp(rng.normal(size=prompts) * rng.choice([0.1, 1.0, 4.0]))
        lower = rng.integers(0, 3, prompts)
        upper = lower + rng.integers(0, 60, prompts)
        budget = int(rng.integers(lower.sum(), upper.sum() + 1))
        assert allocate(weights, budget, lower, upper).tolist() == greedy(weights, budget, lower, upper).tolist()


def test_settled_cases():
    assert allocate([0.0, 0.0, 0.0], 8).tolist() == [3, 3, 2]  # all weights 0: uniform, ties by index
    assert allocate([1.0, 3.0, 2.0], 2).tolist() == [0, 1, 1]  # fewer samples than prompts: the largest
    assert allocate([1.0, 1.0, 1.0], 2).tolist() == [1, 1, 0]
    assert allocate([1.0, 0.0], 6, min_samples=1).tolist() == [5, 1]  # weight 0: its minimum
    assert allocate([1.0, 0.0, 0.0], 9, max_samples=4).tolist() == [4, 3, 2]  # the rest, evenly over the zeros
    assert allocate(np.ones(7), 7 * 5 + 3).tolist() == [6, 6, 6, 5, 5, 5, 5]
    assert allocate([2.0, 1.0], 0).tolist() == [0, 0]
    assert allocate([], 0).tolist() == []
    assert allocate([1.0, 2.0], 3).dtype == np.int64


def test_allocation_ignores_the_scale_of_the_weights_and_follows_their_order():
    rng = np.random.default_rng(2)
    weights, order = np.exp(rng.normal(size=50)), rng.permutation(50)
    counts = allocate(weights, 400)
    assert (allocate(weights * 1e-200, 400) == counts).all() and (allocate(weights * 1e200, 400) == counts).all()
    assert (allocate(weights[order], 400) == counts[order]).all()
    assert allocate([1e-300, 1.0, 1e300], 50).tolist() == [1, 1, 48]


@pytest.mark.parametrize(("keywords", "named"), [
    ({"budget": 1, "min_samples": 1}, "min_samples"),
    ({"budget": 9, "max_samples": 4}, "max_samples"),
    ({"budget": 4, "min_samples": 3, "max_samples": 2}, "min_samples"),
    ({"budget": -1}, "budget"),
    ({"budget": 4, "min_samples": -1}, "min_samples"),
    ({"budget": 4, "min_samples": [1, 1, 1]}, "min_samples"),
    ({"budget": 4, "max_samples": 2.5}, "max_samples"),
])
def test_allocation_refuses_bounds_that_cannot_be_met(keywords, named):
    with pytest.raises(ValueError, match=named):
        allocate([1.0, 2.0], **keywords)


@pytest.mark.parametrize("weights", [[np.nan, 1.0], [-1.0, 1.0], [np.inf, 1.0], 3.0])
def test_allocation_refuses_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        allocate(weights, 4)


def test_a_budget_must_be_whole():
    with pytest.raises(TypeError):
        allocate([1.0], 2.5)


def test_estimator_variance():
    assert estimator_variance([2, 4], [3.0, 2.0]) == 2.0
    assert estimator_variance([0, 4], [0.0, 2.0]) == 0.5
    assert estimator_variance([0, 4], [1.0, 2.0]) == np.inf
    for counts, moments, named in [([-1], [1.0], "counts"), ([1], [np.nan], "second_moments"), ([1], [1, 2], "second")]:
        with pytest.raises(ValueError, match=named):
            estimator_variance(counts, moments)


def test_variance_ratio():
    # c = G^2 / p = 4, 16; two samples each cost 2 + 8 = 10; (1, 3) costs 4 + 16/3.
    assert variance_ratio([1.0, 0.25], [2.0, 2.0], [1, 3], even=2) == pytest.approx((4 + 16 / 3) / 10)
    assert variance_ratio([1.0, 0.25, 0.0], [2.0, 2.0, 0.0], [2, 2, 9], even=2) == 1.0  # unsolved prompts are left out
    assert variance_ratio([0.0], [0.0], [3], even=2) is None


def test_the_script_prints_a_table_and_imports_numpy_alone():
    program = "import runpy, sys; runpy.run_path('allocator.py', run_name='__main__'); sys.exit('torch' in sys.modules)"
    table = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(table.splitlines()) == 11 and "GVM" in table
