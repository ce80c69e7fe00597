"""allocator.py: against brute force, against the greedy algorithm, and on values computed by hand."""

import heapq
import itertools
import subprocess
import sys

import numpy as np
import pytest

from allocator import allocate, estimator_variance, gvm_weights, posterior_weights, reward_weights
from grpo import grpo_advantage


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


def expected_rate(right, drawn) -> np.ndarray:
    """The posterior mean of p, through posterior_weights: a rule whose weight is sqrt(p)."""
    ones = np.ones(len(right))
    return posterior_weights(lambda p, *norms: np.sqrt(p), right, drawn, ones, ones) ** 2


def test_the_posterior_is_as_good_as_one_that_knows_the_prior():
    rng = np.random.default_rng(0)
    for a, b in ((2.0, 5.0), (0.5, 0.5), (0.3, 2.0)):
        p = rng.beta(a, b, 3000)
        right = rng.binomial(4, p)
        found, best = expected_rate(right, np.full(3000, 4)), (right + a) / (4 + a + b)
        assert np.mean((found - p) ** 2) < 1.02 * np.mean((best - p) ** 2) < 0.9 * np.mean((right / 4 - p) ** 2)


def test_the_posterior_learns_from_all_prompts_and_from_many_samples():
    assert expected_rate([0, 30, 90], [100, 100, 100]) == pytest.approx([0.0, 0.3, 0.9], abs=0.02)
    assert expected_rate([1, 50_000], [2, 100_000]) == pytest.approx([0.5, 0.5], abs=0.02)
    few = expected_rate([0] + [0] * 20, [2] * 21)[0], expected_rate([0] + [2] * 20, [2] * 21)[0]
    assert 0 < few[0] < 0.05 < 0.15 < few[1]  # unsolved among the unsolved, and among the solved
    rates = expected_rate([0, 1, 2, 3, 4], [4] * 5)
    assert (np.diff(rates) > 0).all() and rates == pytest.approx(1 - rates[::-1])
    order = np.array([3, 0, 4, 1, 2])
    assert expected_rate(order, [4] * 5) == pytest.approx(rates[order])


def test_a_rule_that_compares_prompts_cannot_be_averaged():
    def hardest(p, norm_right, norm_wrong):
        return np.where(np.arange(len(p)) == np.argmin(p), 1.0, 0.0)

    def hardest_and_its_equals(p, norm_right, norm_wrong):
        return np.where(p == p.min(), 1.0, 0.0)

    def largest_norm(p, norm_right, norm_wrong):
        return np.where(norm_right == norm_right.max(), 1.0, 0.0)

    for rule in (hardest, hardest_and_its_equals, largest_norm):
        with pytest.raises(ValueError, match="compares prompts"):
            posterior_weights(rule, [0, 1, 2], [2, 2, 2], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0])


def test_posterior_weights_never_starve_and_fill_in_the_norms():
    def rule(p, right, wrong):
        return gvm_weights(p, right)

    weights = posterior_weights(rule, [0, 2, 2], [4, 4, 4], [0.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert weights.min() > 0 and weights[2] / weights[1] == pytest.approx(5 / 3)
    typical = posterior_weights(rule, [0, 2, 2], [4, 4, 4], [9.0, 3.0, 5.0], [1.0, 1.0, 1.0])
    assert typical == pytest.approx(weights)  # sqrt((9 + 25) / 2) stands in for whatever the unsolved one says
    rewards = posterior_weights(lambda *known: reward_weights(*known), [4, 2], [4, 4], [1.0, 1.0], [0.0, 2.0])
    assert rewards.min() > 0  # always right so far
    unsolved = posterior_weights(rule, [0, 0], [1, 1], [0.0, 0.0], [1.0, 1.0])
    assert unsolved.tolist() == [0, 0] and posterior_weights(rule, [], [], [], []).tolist() == []
    given = np.array([0.0, 3.0])
    posterior_weights(rule, [0, 1], [2, 2], given, given)
    assert given.tolist() == [0.0, 3.0]  # arguments are left alone
    with pytest.raises(ValueError, match="num_right must not be above num_drawn"):
        posterior_weights(rule, [3], [2], [1.0], [1.0])


def population(rng, prompts: int = 200):
    """p, G+, G-: a quarter never solved, a quarter nearly always, the others Beta(0.7, 1)."""
    kind = rng.random(prompts)
    p = np.where(kind < 0.25, 0.0, np.where(kind < 0.5, rng.beta(30, 1, prompts), rng.beta(0.7, 1, prompts)))
    return p, *np.exp(0.3 * rng.normal(size=(2, prompts)))


def spend(rng, p, right, wrong, rule, budget: int, pilot: int, rounds: int, shrink: bool) -> np.ndarray:
    """The counts after a pilot and some rounds, for prompts with these acceptance rates and norms."""
    solved_before = np.cumsum(rng.random((len(p), 4000)) < p[:, None], axis=1)
    counts = np.full(len(p), pilot)
    for rounds_left in range(rounds, 0, -1):
        solved = solved_before[np.arange(len(p)), counts - 1]
        norms = np.where(solved > 0, right, 0.0), np.where(solved < counts, wrong, 0.0)
        weights = posterior_weights(rule, solved, counts, *norms) if shrink else rule(solved / counts, *norms)
        goal = counts.sum() + (budget * len(p) - counts.sum()) // rounds_left
        counts = allocate(weights, goal, min_samples=counts)
    return counts


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("pilot", [1, 2, 4, 8])
@pytest.mark.parametrize("rule", ["gvm", "reward"])
def test_shrinkage_is_safe_where_the_pilot_s_rates_mislead(rule, pilot, rounds):
    """Mean gain in the true sum_i c_i / n_i over uniform, at 16 samples a prompt, over 8 populations of 200."""
    weigh = {"gvm": lambda p, right, wrong: gvm_weights(p, right),
             "reward": lambda p, right, wrong: reward_weights(p, right, wrong)}[rule]
    gains = {True: [], False: []}
    for seed in range(8):
        for shrink in gains:
            rng = np.random.default_rng(seed)
            p, right, wrong = population(rng)
            counts = spend(rng, p, right, wrong, weigh, 16, pilot, rounds, shrink)
            moments = np.zeros(200)  # alpha = 0 and known p: what the estimator really has
            moments[p > 0] = weigh(p, right, wrong)[p > 0] ** 2 if rule == "reward" else right[p > 0] ** 2 / p[p > 0]
            uniform = estimator_variance(np.full(200, 16), moments)
            gains[shrink].append(uniform / estimator_variance(counts, moments))
    print(f"{rule} pilot {pilot} rounds {rounds}: {np.mean(gains[True]):.2f}, plug-in {np.mean(gains[False]):.2f}")
    assert np.mean(gains[True]) > (1.15 if rule == "gvm" else 1.0 if rounds == 1 else 1.25)
    assert np.mean(gains[True]) > np.mean(gains[False]) - 0.01
    if rule == "gvm":
        assert np.mean(gains[False]) < 0.8


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


def buy_one_by_one(weights, budget, counts, prices) -> np.ndarray:
    """The sample with the largest gain per price, until it is too expensive: slow, and plainly right."""
    counts = counts.copy()
    while True:
        worth = weights / np.sqrt(prices)
        gain = np.where(counts == 0, np.inf, worth / np.sqrt(np.maximum(counts * (counts + 1), 1)))
        best = np.lexsort((np.arange(len(counts)), -worth, -gain))[0]
        if prices @ counts + prices[best] > budget:
            return counts
        counts[best] += 1


def test_allocation_with_prices():
    # After a first sample each, w^2 / (tau n (n + 1)): 16/2 = 8 and 16/6 = 2.7 at price 1, 16/8 = 2 at price 4.
    assert allocate([4.0, 4.0], 6, prices=[1.0, 4.0]).tolist() == [2, 1]
    assert allocate([4.0, 4.0], 8.9, prices=[1.0, 4.0]).tolist() == [3, 1]  # the next is too expensive
    assert allocate([4.0, 4.0], 11, prices=[1.0, 4.0]).tolist() == [3, 2]
    assert allocate([4.0, 4.0], 3, prices=[1.0, 4.0]).tolist() == [1, 0]  # no second of a prompt before a first
    assert allocate([0.0, 0.0], 10, prices=[1.0, 4.0]).tolist() == [2, 2]  # all weights 0: evenly
    rng = np.random.default_rng(3)
    for _ in range(200):
        prompts = int(rng.integers(1, 12))
        weights, prices = np.exp(2 * rng.normal(size=prompts)), np.exp(rng.normal(size=prompts))
        lower = rng.integers(0, 3, prompts)
        budget = prices @ lower + rng.uniform(0, 40)
        counts = allocate(weights, budget, lower, prices=prices)
        assert counts.tolist() == buy_one_by_one(weights, budget, lower, prices).tolist()
        assert budget - prices.max() < prices @ counts <= budget
        assert (allocate(weights, 50 + prompts * 2, lower) == allocate(
            weights, 3.0 * (50 + prompts * 2), lower, prices=np.full(prompts, 3.0))).all()
    for prices in ([1.0, 0.0], [1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="prices"):
            allocate([1.0, 2.0], 5, prices=prices)
    with pytest.raises(ValueError, match="min_samples"):
        allocate([1.0, 2.0], 5, min_samples=2, prices=[1.0, 4.0])


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
    ({"budget": np.inf, "prices": [1.0, 1.0]}, "budget"),
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


def test_the_script_prints_a_table_and_imports_numpy_alone():
    program = "import runpy, sys; runpy.run_path('allocator.py', run_name='__main__'); sys.exit('torch' in sys.modules)"
    table = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(table.splitlines()) == 11 and "GVM" in table
