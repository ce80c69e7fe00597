"""gvm.py: p and G from samples, and budgets that are spent to the last sample."""

import json

import numpy as np
import pytest
from conftest import flags, make_sample, run_script

from allocator import allocate, gvm_weights, posterior_weights, reward_weights
from data import InputError, Problem
from gvm import (
    SampleSource, allocation_table, check_budget, describe_table, draw_step, e_step, estimate, problems_of_step,
)
from model import Policy
from run import RunState
from sampler import HfSampler


@pytest.fixture
def tools(device, model_and_tokenizer, grader):
    """(policy, sampler, grader) of the toy."""
    return Policy(model_and_tokenizer[0]), HfSampler(*model_and_tokenizer, flags()), grader


def test_estimate_by_hand():
    kinds = zip([0, 2, 0, 0, 2], [1, 0, 0, 1, 0], [1.0, 3.0, 5.0, 7.0, 4.0], [2, 4, 6, 1, 8])
    samples = [make_sample(i, float(right), [1] * length, head_grad_norm=norm) for i, right, norm, length in kinds]
    problems = [Problem(i, "", "") for i in range(3)]
    table = estimate(samples, problems, "prompt")
    assert table["num_right"].tolist() == [2, 0, 0] and table["num_drawn"].tolist() == [3, 0, 2]
    assert table["norm_right"] == pytest.approx([5.0, 0.0, 0.0])  # sqrt((1 + 49) / 2)
    assert table["norm_wrong"] == pytest.approx([5.0, 0.0, np.sqrt(12.5)])
    assert table["mean_length"].tolist() == [3.0, 0.0, 6.0]
    backwards = estimate(samples, problems[::-1], "prompt")
    assert all((backwards[name][::-1] == column).all() for name, column in table.items())


def test_predicted_variance_by_hand():
    def ratio(weights, counts, *words):
        table = {"weights": np.array(weights), "counts": np.array(counts), "mean_length": np.ones(len(counts)),
                 "num_right": np.ones(len(counts))}
        return describe_table(table, flags(*words))["predicted_variance"]

    # w^2 = 4, 16; two samples each: 2 + 8 = 10; (1, 3): 4 + 16/3.
    two = ["--samples-per-prompt", 2]
    assert ratio([2.0, 4.0], [1, 3], *two) == pytest.approx((4 + 16 / 3) / 10)
    assert ratio([2.0, 4.0, 0.0], [2, 2, 9], *two) == 1.0  # prompts without a weight are left out
    assert ratio([0.0], [3], *two) is None and ratio([1.0, 1.0], [0, 2], *two) is None  # infinite: JSON has no number
    both = ["--samples-per-prompt", 1, "--pilot-samples", 1, "--e-step-every", 2, "--rounds", 1]
    assert ratio([2.0, 4.0], [1, 3], *both) == pytest.approx((4 + 16 / 3) / 10)  # uniform could spend the pilot, too


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else 0.0


@pytest.mark.parametrize("words", [
    ["--weighting", "sequence", "--no-shrink", "--rounds", 1],
    ["--allocator", "reward", "--no-shrink", "--rounds", 1],
    ["--allocator", "reward", "--rounds", 1],
    ["--rounds", 2],
])
def test_e_step_estimates_p_and_g_and_spends_the_budget(tools, problems, words):
    args = flags("--pilot-samples", 4, "--samples-per-prompt", 6, *words)
    table, everything = e_step(problems[:16], 1, SampleSource(*tools, args), args)
    drawn = dict(zip(table["id"], table["num_drawn"]))
    samples = [s for s in everything if s.index < drawn[s.problem]]  # the last round has told nothing
    scored = [s for s in samples if s.reward > 0 or args.allocator == "reward"]  # the gvm rule looks at right ones only
    assert [s for s in everything if s.old_logprobs is not None] == scored and all(s.head_grad_norm for s in scored)
    assert len({(s.problem, s.index) for s in everything}) == len(everything) == 96
    assert len(samples) == 64 + 16 * (args.rounds - 1)
    for i, problem in enumerate(problems[:16]):
        mine = [s for s in samples if s.problem == problem.id]
        norms = {kind: [s.head_grad_norm / (len(s.response_ids) if args.weighting == "sequence" else 1)
                        for s in mine if s.reward == kind] for kind in (0, 1)}
        assert (table["num_right"][i], table["num_drawn"][i]) == (len(norms[1]), len(mine))
        assert table["norm_right"][i] == pytest.approx(rms(norms[1]))
        assert table["norm_wrong"][i] == pytest.approx(rms(norms[0]))
        assert table["mean_length"][i] == np.mean([len(s.response_ids) for s in mine])
        assert sorted(s.index for s in mine) == list(range(len(mine))) and table["counts"][i] >= len(mine) >= 4
    p, right, wrong = table["num_right"] / table["num_drawn"], table["norm_right"], table["norm_wrong"]
    if args.allocator == "reward":
        expected = reward_weights(p, right, wrong)
    else:
        expected = gvm_weights(p, right, args.alpha, args.beta)
    assert (table["weights"] == pytest.approx(expected)) != args.shrink
    assert (table["counts"] == allocate(table["weights"], 16 * 6, table["num_drawn"])).all() and table["counts"].sum() == 96


def test_rounds_each_take_an_equal_part_and_learn_from_the_last(problems):
    """Problem i is right with probability i / 8, drawn from a table instead of a model."""
    luck, requests, with_norms = np.random.default_rng(0).random((9, 500)), [], []
    args = flags("--pilot-samples", 1, "--samples-per-prompt", 9, "--rounds", 4)

    class Table(SampleSource):
        def draw(self, _, counts, step, first_index=0, **options):
            requests.append(counts)
            with_norms.append(options)
            starts = np.broadcast_to(first_index, 9)
            return [make_sample(problems[i].id, float(luck[i, j] < i / 8), [1] * (i + 1), head_grad_norm=1.0 + i)
                    for i in range(9) for j in range(starts[i], starts[i] + counts[i])]

    table, samples = e_step(problems[:9], 1, Table(None, None, None, args), args)
    assert [counts.sum() for counts in requests] == [9, 18, 18, 18, 18] and table["counts"].sum() == 81
    assert (table["num_drawn"] == sum(requests[:-1])).all() and len(samples) == 81
    assert (table["counts"] == sum(requests)).all() and with_norms == [{"with_norms": True}] * 4 + [{}]
    weights = posterior_weights(lambda p, right, wrong: gvm_weights(p, right, args.alpha, args.beta), table["num_right"],
                                table["num_drawn"], table["norm_right"], table["norm_wrong"])
    assert table["weights"] == pytest.approx(weights)


def test_a_budget_of_tokens_is_what_uniform_would_spend(tools, problems):
    words = ["--cost", "tokens", "--samples-per-prompt", 8, "--pilot-samples", 4, "--rounds", 2]
    for reuse in ([], ["--e-step-every", 2, "--rounds", 1]):
        args = flags(*words, *reuse)
        table, _ = allocation_table(problems[:16], 1, SampleSource(*tools, args), args)
        budget, spent = 8 * table["mean_length"].sum(), table["mean_length"] @ table["counts"]
        assert budget - table["mean_length"].max() < spent <= budget and table["mean_length"].max() > table["mean_length"].min() + 1


def run_steps(tools, problems, words, steps):
    args, state, results = flags("--prompts-per-step", 8, *words), RunState(), []
    for step in range(1, steps + 1):
        batch, samples, metrics = draw_step(problems, step, state, SampleSource(*tools, args), args)
        assert batch == problems_of_step(problems, step, args)
        state.plan = json.loads(json.dumps(state.plan))  # as through a checkpoint
        assert len({(s.problem, s.index) for s in samples}) == len(samples)
        results.append((samples, metrics, state.plan))
    return results


def test_a_step_spends_what_it_says(tools, problems):
    (samples, metrics, _), = run_steps(tools, problems, ["--allocator", "uniform", "--samples-per-prompt", 8], 1)
    assert np.bincount([s.problem for s in samples]).max() == 8 and metrics["samples"] == len(samples) == 64
    assert "predicted_variance" not in metrics
    (samples, metrics, plan), = run_steps(tools, problems, ["--samples-per-prompt", 8], 1)  # the pilot is reused, and part of the 64
    assert metrics["samples"] == len(samples) == 64 and plan is None
    assert metrics["tokens"] == sum(len(s.response_ids) for s in samples)
    batch = problems_of_step(problems, 1, flags("--prompts-per-step", 8))
    counts = [sum(s.problem == p.id for s in samples) for p in batch]
    assert min(counts) >= 2 and max(counts) > 8  # the pilot, and where they help
    assert metrics["predicted_variance"] > 0 and metrics["predicted_tokens"] > 0
    (samples, metrics, _), = run_steps(tools, problems, ["--cost", "tokens", "--allocator", "reward"], 1)
    assert 0.9 < metrics["predicted_tokens"] <= 1


def test_a_plan_allocates_over_its_steps_and_counts_its_pilot(tools, problems):
    words = ["--e-step-every", 3, "--pilot-samples", 2, "--samples-per-prompt", 4, "--rounds", 1]
    results = run_steps(tools, problems, words, 4)
    assert [plan["last_step"] for _, _, plan in results] == [3, 3, 3, 6]
    assert sum(len(samples) for samples, _, _ in results[:3]) == 3 * 8 * 4  # the budget, exactly, over the plan
    assert [metrics["samples"] - len(samples) for samples, metrics, _ in results] == [48, 0, 0, 48]  # the pilots
    for (samples, _, plan), step in zip(results, (1, 2, 3)):
        counts = dict(zip(plan["table"]["id"], plan["table"]["counts"]))
        for problem in problems_of_step(problems, step, flags("--prompts-per-step", 8)):
            assert sum(s.problem == problem.id for s in samples) == counts[problem.id]
        assert all(s.index >= 2 for s in samples)  # the pilot's own samples are not trained on


def test_a_plan_of_other_problems_is_made_anew(tools, problems):
    words = ["--prompts-per-step", 8, "--e-step-every", 3, "--rounds", 1]
    (_, _, plan), = run_steps(tools, problems, words, 1)
    for changed, others in (([], problems[::-1]), (["--seed", 1], problems), (["--prompts-per-step", 16], problems)):
        args, state = flags(*words, *changed), RunState(step=1, plan=plan)
        batch, samples, _ = draw_step(others, 2, state, SampleSource(*tools, args), args)
        other = state.plan
        assert other["last_step"] == 4 and {p.id for p in batch} <= set(other["table"]["id"]) and samples


def test_the_last_round_may_be_left_undrawn(tools, problems):
    args = flags("--pilot-samples", 2, "--samples-per-prompt", 8, "--rounds", 3)
    table, samples = allocation_table(problems[:16], 1, SampleSource(*tools, args), args)
    assert table["counts"].sum() == 128 and len(samples) == table["num_drawn"].sum() == 32 + 2 * 32


def test_a_plan_may_hold_a_problem_twice(tools, problems):
    args = flags("--prompts-per-step", 4)
    ahead = [p.id for step in (1, 2, 3) for p in problems_of_step(problems[:8], step, args)]
    assert len(set(ahead)) < 12  # the third step begins a new epoch
    words = ["--prompts-per-step", 4, "--e-step-every", 3, "--rounds", 1, "--cost", "tokens"]
    (_, metrics, plan), *_ = run_steps(tools, problems[:8], words, 3)
    table = plan["table"]
    assert table["num_drawn"] == [2] * len(set(ahead)) and min(table["mean_length"]) > 0
    assert sorted(table["id"]) == sorted(set(ahead))  # one pilot for both visits


def test_a_budget_below_the_pilot_is_refused_and_an_allocator_that_does_not_fit_warned_of(device, capsys):
    check_budget(flags("--samples-per-prompt", 4, "--pilot-samples", 4), "raft")
    check_budget(flags("--samples-per-prompt", 4, "--pilot-samples", 8, "--e-step-every", 10, "--rounds", 1), "raft")
    check_budget(flags("--samples-per-prompt", 4, "--pilot-samples", 5, "--allocator", "uniform"), "raft")
    with pytest.raises(InputError, match="--samples-per-prompt is below --pilot-samples"):
        check_budget(flags("--samples-per-prompt", 4, "--pilot-samples", 5), "raft")
    with pytest.raises(InputError, match="add --rounds 1"):
        check_budget(flags("--e-step-every", 2, "--rounds", 2), "raft")
    assert capsys.readouterr().out == ""
    check_budget(flags("--allocator", "reward"), "raft")
    assert capsys.readouterr().out.count("\n") == 1


def test_the_script_writes_a_table_the_same_for_one_and_two_ranks(tmp_path):
    words = ["--limit", 16, "--samples-per-prompt", 8]
    done = run_script("gvm.py", *words, "--out", tmp_path / "one.jsonl")
    run_script("gvm.py", *words, "--out", tmp_path / "two.jsonl", ranks=2)
    one, two = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("one.jsonl", "two.jsonl"))
    assert [row["id"] for row in one] == list(range(16)) and sum(row["counts"] for row in one) == 128
    assert "budget: 128 samples" in done.stdout and "predicted variance" in done.stdout
    for a, b in zip(one, two):
        assert all(a[name] == b[name] for name in ("p", "num_right", "num_drawn", "counts", "mean_length"))
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in a) and a["p"] == a["num_right"] / a["num_drawn"]
    before = (tmp_path / "one.jsonl").read_text()
    refused = run_script("gvm.py", *words, "--out", tmp_path / "one.jsonl", check=False)
    assert refused.returncode == 2 and "exists already" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "one.jsonl").read_text() == before
    refused = run_script("gvm.py", "--allocator", "uniform", "--out", tmp_path / "new.jsonl", check=False)
    assert refused.returncode == 2 and "has no E-step" in refused.stderr and not (tmp_path / "new.jsonl").exists()
