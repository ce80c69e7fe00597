"""allocator.py: against brute force, against the greedy algorithm, and on values computed by hand."""

import heapq
import itertools
import subprocess
import sys
import time

import numpy as np
import pytest

from allocator import allocate, estimator_variance, gvm_weights, reward_weights, summarise_samples
from grpo import grpo_advantage


def objective(weights, counts) -> float:
    return estimator_variance(counts, np.square(weights))


def compositions(budget, lower):
    """Every list of counts, none below its minimum, whose sum is the budget."""
    for counts in itertools.product(*(range(low, budget + 1) for low in lower)):
        if sum(counts) == budget:
            yield counts


def greedy(weights, budget, lower) -> np.ndarray:
    """One sample at a time to the largest w / sqrt(n (n + 1)): slow, and plainly right."""
    counts = list(lower)
    heap = []

    def push(i):
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


def test_reward_weights_by_hand():
    # p = 1/4, G+ = 2, G- = 4: 3/16 [3/4 * 4 + 1/4 * 16] = 21/16.
    assert reward_weights([0.25], [2.0], [4.0]) ** 2 == pytest.approx([21 / 16])
    assert reward_weights([0.0, 1.0], [0.0, 3.0], [3.0, 0.0]).tolist() == [0.0, 0.0]  # equal rewards: no gradient
    p, right, wrong = np.array([0.1, 0.7]), np.array([1.0, 2.0]), np.array([3.0, 0.5])  # right and wrong change places
    assert reward_weights(p, right, wrong) == pytest.approx(reward_weights(1 - p, wrong, right))
    for arguments, named in [(([2.0], [1.0], [1.0]), "accept_rates"), (([0.5], [-1.0], [1.0]), "norm_right"),
                             (([0.5], [1.0], [1.0, 1.0]), "norm_wrong")]:
        with pytest.raises(ValueError, match=named):
            reward_weights(*arguments)


def test_reward_weights_are_the_spread_of_a_sample_s_term():
    rng = np.random.default_rng(0)
    right = rng.random(200_000) < 0.3
    norms = np.where(right, 2.0, 0.7)
    expected = np.mean(((right - 0.3) * norms) ** 2)
    assert reward_weights([0.3], [2.0], [0.7]) ** 2 == pytest.approx([expected], rel=0.02)
    for n in (2, 4, 8):
        advantages = np.concatenate([grpo_advantage(group.astype(float)) for group in right[:80_000].reshape(-1, n)])
        expected = np.mean((advantages * norms[:80_000]) ** 2)
        exact = (0.7 - 0.7**n) * 2.0**2 + (0.3 - 0.3**n) * 0.7**2  # as the docstring has it, up to (n - 1) / n
        assert (n - 1) / n * exact == pytest.approx(expected, rel=0.03)


def test_allocation_by_hand():
    # Priorities w / sqrt(n (n + 1)): 4/sqrt(2) = 2.83 and 4/sqrt(6) = 1.63 beat 2/sqrt(2) = 1.41 and 4/sqrt(12).
    assert allocate([4.0, 2.0], 5).tolist() == [3, 2]
    assert allocate([4.0, 2.0], 4).tolist() == [3, 1]
    assert allocate([1.0, 0.0, 3.0], 10, min_samples=2).tolist() == [2, 2, 6]


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_allocation_is_the_minimum_of_every_small_case(prompts):
    for weights in itertools.product([0.5, 1.0, 2.0, 5.0], repeat=prompts):
        for low in (0, 1, 2):
            for budget in range(low * prompts, 9):
                counts = allocate(weights, budget, low)
                assert counts.sum() == budget and counts.min() >= low
                best = min(objective(weights, other) for other in compositions(budget, [low] * prompts))
                assert objective(weights, counts) == pytest.approx(best, rel=1e-12)  # inf on both sides included


def test_allocation_is_the_minimum_of_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(300):
        prompts = rng.integers(1, 5)
        weights = np.exp(rng.normal(size=prompts) * 2)
        lower = rng.integers(0, 3, prompts)
        budget = int(lower.sum() + rng.integers(0, 9))
        counts = allocate(weights, budget, lower)
        assert counts.sum() == budget and (lower <= counts).all()
        best = min(objective(weights, other) for other in compositions(budget, lower))
        assert objective(weights, counts) == pytest.approx(best, rel=1e-12)


def test_allocation_equals_one_at_a_time_on_larger_cases():
    rng = np.random.default_rng(1)
    for _ in range(60):
        prompts = int(rng.integers(5, 40))
        weights = np.exp(rng.normal(size=prompts) * rng.choice([0.1, 1.0, 4.0]))
        lower = rng.integers(0, 3, prompts)
        budget = int(lower.sum() + rng.integers(0, 30 * prompts))
        assert allocate(weights, budget, lower).tolist() == greedy(weights, budget, lower).tolist()


def first_counts(weights, budget, lower) -> np.ndarray:
    """Where `allocate` begins: Proposition 1 of a budget that is one sample a prompt smaller, beyond the minima."""
    share = np.asarray(weights) / np.sum(weights)
    return np.maximum(lower, np.floor(share * (budget - np.sum(lower) - len(weights))))


def test_the_start_never_exceeds_the_minimiser():
    """By brute force for small cases, and by one at a time for larger ones; the plain formula does exceed it."""
    rng, above = np.random.default_rng(4), 0
    for _ in range(1000):
        prompts = int(rng.integers(1, 5))
        weights, lower = np.exp(rng.normal(size=prompts) * rng.choice([0.1, 1.0, 3.0])), rng.integers(0, 3, prompts)
        budget = int(lower.sum() + rng.integers(0, 9))
        values = [(objective(weights, counts), counts) for counts in compositions(budget, lower)]
        best = [counts for value, counts in values if value <= min(values)[0] * (1 + 1e-12)]
        assert any((first_counts(weights, budget, lower) <= counts).all() for counts in best)
    for _ in range(1000):
        prompts = int(rng.integers(2, 60))
        weights, lower = np.exp(rng.normal(size=prompts) * rng.choice([0.1, 1.0, 4.0])), rng.integers(0, 3, prompts)
        budget = int(lower.sum() + rng.integers(0, 30 * prompts))
        best = greedy(weights, budget, lower) if prompts < 12 else allocate(weights, budget, lower)
        assert (first_counts(weights, budget, lower) <= best).all()
        above += (np.floor(weights / weights.sum() * budget) > best).any()
    assert above > 200


def test_a_hundred_thousand_prompts_take_no_time():
    weights = np.exp(2 * np.random.default_rng(0).normal(size=100_000))
    start = time.perf_counter()
    counts = allocate(weights, 10_000_000)
    assert time.perf_counter() - start < 5 and counts.sum() == 10_000_000  # one sample at a time, a minute
    priorities = weights / np.sqrt(np.maximum(counts * (counts + 1), 0.5))  # of the next sample: w^2 / (n (n + 1))
    kept = weights / np.sqrt(np.maximum(counts * (counts - 1), 0.5))  # of the last one
    assert counts.min() >= 1 and kept[counts > 1].min() >= priorities.max()  # no exchange of two samples helps


def test_a_large_budget_is_met_exactly():
    weights = np.exp(np.random.default_rng(0).normal(size=1000))
    assert allocate(weights, 10**12).sum() == 10**12


def test_settled_cases():
    assert allocate([0.0, 0.0, 0.0], 8).tolist() == [3, 3, 2]  # all weights 0: uniform, ties by index
    assert allocate([1.0, 3.0, 2.0], 2).tolist() == [0, 1, 1]  # fewer samples than prompts: the largest
    assert allocate([1.0, 1.0, 1.0], 2).tolist() == [1, 1, 0]
    assert allocate([1.0, 0.0], 6, min_samples=1).tolist() == [5, 1]  # weight 0: its minimum
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
    ({"budget": -1}, "budget"),
    ({"budget": 4, "min_samples": -1}, "min_samples"),
    ({"budget": 4, "min_samples": [1, 1, 1]}, "min_samples"),
    ({"budget": 4, "min_samples": 0.5}, "min_samples"),
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


def test_from_samples_to_p_and_g_by_hand():
    table = summarise_samples(
        prompts=np.array([0, 2, 0, 0, 2]), is_right=np.array([True, False, False, True, False]),
        norms=np.array([1.0, 3.0, 5.0, 7.0, 4.0]), num_prompts=3)
    assert table["num_right"].tolist() == [2, 0, 0] and table["num_drawn"].tolist() == [3, 0, 2]
    assert table["accept_rate"] == pytest.approx([2 / 3, 0, 0])
    assert table["norm_right"] == pytest.approx([5.0, 0.0, 0.0])  # sqrt((1 + 49) / 2)
    assert table["norm_wrong"] == pytest.approx([5.0, 0.0, np.sqrt(12.5)])


def test_samples_that_cannot_be_summarised_are_named():
    good = {"prompts": [0, 1, 1], "is_right": [True, False, True], "norms": [1.0, np.nan, 2.0]}
    table = summarise_samples(**good, num_prompts=2)
    assert table["norm_right"].tolist() == [1.0, 2.0]  # nobody has to know norms that are not looked at
    for wrong, named in (({"is_right": [1, 0, 1]}, "is_right must be booleans"), ({"prompts": [0, 1, 7]}, "rows from 0"),
                         ({"prompts": ["a", "b", "b"]}, "rows from 0"), ({"prompts": [0.0, 1.0, 1.0]}, "rows from 0"),
                         ({"prompts": [0, 1]}, "one entry for each sample"), ({"norms": [1.0]}, "one entry for each")):
        with pytest.raises(ValueError, match=named):
            summarise_samples(**good | wrong, num_prompts=2)


def test_norms_that_are_not_finite_are_left_out_and_their_samples_still_count_for_p():
    table = summarise_samples(
        prompts=np.array([0, 0, 0, 1, 1, 1]), is_right=np.array([True, True, False, True, False, False]),
        norms=np.array([3.0, np.inf, np.nan, np.nan, 4.0, -np.inf]), num_prompts=2)
    assert table["norm_right"].tolist() == [3.0, 0.0] and table["norm_wrong"].tolist() == [0.0, 4.0]
    assert table["accept_rate"] == pytest.approx([2 / 3, 1 / 3]) and table["num_drawn"].tolist() == [3, 3]


def test_estimator_variance():
    assert estimator_variance([2, 4], [3.0, 2.0]) == 2.0
    assert estimator_variance([0, 4], [0.0, 2.0]) == 0.5
    assert estimator_variance([0, 4], [1.0, 2.0]) == np.inf
    for counts, moments, named in [([-1], [1.0], "counts"), ([1], [np.nan], "second_moments"), ([1], [1, 2], "second")]:
        with pytest.raises(ValueError, match=named):
            estimator_variance(counts, moments)


def test_the_script_prints_a_table_and_imports_numpy_alone():
    program = "import runpy, sys; runpy.run_path('allocator.py', run_name='__main__'); sys.exit('torch' in sys.modules)"
    table = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(table.splitlines()) == 10 and "variance bound" in table
