"""gvm.py: p and G from samples, and budgets that are spent to the last sample."""

import json

import numpy as np
import pytest
import torch
from conftest import flags, make_sample, run_script

import grpo
import gvm
from allocator import allocate, gvm_weights, reward_weights
from data import InputError, Problem
from gvm import (
    SampleSource, check_budget, describe_prediction, describe_table, draw_step, estimate, pilot_step, pilot_table,
    problems_of_step, prompt_states,
)
from model import Policy
from raft import split_updates
from run import RunState, Stopped
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
    both = ["--samples-per-prompt", 1, "--pilot-samples", 1, "--e-step-every", 2]
    assert ratio([2.0, 4.0], [1, 3], *both) == pytest.approx((4 + 16 / 3) / 10)  # uniform could spend the pilot, too


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else 0.0


@pytest.mark.parametrize("words", [
    ["--weighting", "sequence"],
    ["--allocator", "reward"],
])
def test_a_pilot_estimates_p_and_g_and_the_budget_is_spent(tools, problems, words):
    args = flags("--no-predict", "--pilot-samples", 4, "--samples-per-prompt", 6, *words)
    table, everything = pilot_step(problems[:16], 1, SampleSource(*tools, args), args)
    samples = [s for s in everything if s.index < 4]  # the others tell nothing
    scored = [s for s in samples if s.reward > 0 or args.allocator == "reward"]  # the gvm rule looks at right ones only
    assert [s for s in everything if s.old_logprobs is not None] == scored and all(s.head_grad_norm for s in scored)
    assert len({(s.problem, s.index) for s in everything}) == len(everything) == 96
    assert len(samples) == 64
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
    assert table["weights"] == pytest.approx(expected)
    assert (table["counts"] == allocate(table["weights"], 16 * 6, table["num_drawn"])).all() and table["counts"].sum() == 96


def test_a_budget_of_tokens_is_what_uniform_would_spend(tools, problems):
    words = ["--no-predict", "--cost", "tokens", "--samples-per-prompt", 8, "--pilot-samples", 4]
    for reuse in ([], ["--e-step-every", 2]):
        args = flags(*words, *reuse)
        table, _ = pilot_table(problems[:16], 1, SampleSource(*tools, args), args)
        budget, spent = 8 * table["mean_length"].sum(), table["mean_length"] @ table["counts"]
        assert budget - table["mean_length"].max() < spent <= budget and table["mean_length"].max() > table["mean_length"].min() + 1


def run_steps(tools, problems, words, steps):
    args, state, results = flags("--prompts-per-step", 8, *words), RunState(), []
    for step in range(1, steps + 1):
        batch, samples, metrics = draw_step(problems, step, state, SampleSource(*tools, args), args)
        if not args.predict or args.allocator == "uniform":
            assert batch == problems_of_step(problems, step, args)
        state.plan, state.predictor = json.loads(json.dumps([state.plan, state.predictor], default=list))  # as through a checkpoint
        assert len({(s.problem, s.index) for s in samples}) == len(samples)
        results.append((samples, metrics, state.plan))
    return results


def test_a_step_spends_what_it_says(tools, problems):
    (samples, metrics, _), = run_steps(tools, problems, ["--allocator", "uniform", "--samples-per-prompt", 8], 1)
    assert np.bincount([s.problem for s in samples]).max() == 8 and metrics["samples"] == len(samples) == 64
    assert "predicted_variance" not in metrics
    pilot = ["--no-predict", "--pilot-samples", 2]  # reused, and part of the 64
    (samples, metrics, plan), = run_steps(tools, problems, [*pilot, "--samples-per-prompt", 8], 1)
    assert metrics["samples"] == len(samples) == 64 and plan is None
    assert metrics["tokens"] == sum(len(s.response_ids) for s in samples)
    batch = problems_of_step(problems, 1, flags("--prompts-per-step", 8))
    counts = [sum(s.problem == p.id for s in samples) for p in batch]
    assert min(counts) >= 2 and max(counts) > 8  # the pilot, and where they help
    assert metrics["predicted_variance"] > 0 and metrics["predicted_tokens"] > 0
    (samples, metrics, _), = run_steps(tools, problems, [*pilot, "--cost", "tokens", "--allocator", "reward"], 1)
    assert 0.9 < metrics["predicted_tokens"] <= 1


def test_a_prompt_s_states_are_what_the_model_says_of_it_alone(tools, problems, monkeypatch):
    policy, chosen = tools[0], problems[:9]
    states = prompt_states(policy, chosen, max_tokens=60)  # several batches
    for problem, found in zip(chosen, states):
        ids = torch.tensor([problem.prompt_ids])
        hidden = policy.model.base_model(ids).last_hidden_state[0].detach().numpy()
        assert found == pytest.approx(np.concatenate([hidden[-1], hidden.mean(axis=0)]), abs=1e-4)
    assert prompt_states(policy, chosen[::-1], max_tokens=60)[::-1] == pytest.approx(states, abs=1e-4)
    monkeypatch.setattr(gvm, "NUM_STATES", 64)
    fewer = prompt_states(policy, problems[:64], max_tokens=10_000)
    assert fewer.shape == (64, 64) and (fewer == prompt_states(policy, problems[:64], max_tokens=10_000)).all()
    lengths = np.linalg.norm(prompt_states(policy, problems[:64], 10_000) - fewer[0], axis=1)
    monkeypatch.setattr(gvm, "NUM_STATES", 256)
    whole = np.linalg.norm(prompt_states(policy, problems[:64], 10_000) - states[0], axis=1)
    assert np.corrcoef(lengths, whole)[0, 1] > 0.9  # who is like whom is kept


@pytest.mark.parametrize(("objective", "smallest"), [("raft", 1), ("grpo", 2)])
def test_a_predicted_step_serves_some_of_its_candidates_and_learns(tools, problems, objective, smallest):
    words = ["--objective", objective, "--candidates-per-step", 32, "--samples-per-prompt", 2]
    args, state, predicted = flags("--prompts-per-step", 8, *words, add_flags=grpo.add_flags), RunState(), []
    for step in range(1, 7):
        before = json.dumps(state.predictor, default=list)
        with pytest.raises(Stopped):
            draw_step(problems, step, state, SampleSource(*tools, args, Stop()), args)
        assert json.dumps(state.predictor, default=list) == before  # a step that is given up teaches nothing
        batch, samples, metrics = draw_step(problems, step, state, SampleSource(*tools, args), args)
        state.predictor = json.loads(json.dumps(state.predictor, default=list))  # as through a checkpoint
        candidates = problems_of_step(problems, step, args)
        assert len(candidates) == 32 and len(batch) <= 16 and len(samples) == metrics["samples"] == 16
        assert [p for p in candidates if p in batch] == batch  # in their order
        counts = [sum(s.problem == p.id for s in samples) for p in batch]
        assert min(counts) >= smallest and sum(counts) == 16
        predicted.append(metrics["predicted_accept_rate"])
    assert predicted[0] == pytest.approx(0.5) and len(set(predicted)) == 6


def test_a_budget_that_can_tell_nothing_is_left_undrawn(tools, problems):
    """A group needs two samples."""
    args = flags("--prompts-per-step", 1, "--samples-per-prompt", 1, "--objective", "grpo", add_flags=grpo.add_flags)
    batch, samples, metrics = draw_step(problems, 1, RunState(), SampleSource(*tools, args), args)
    assert batch == samples == [] and metrics["samples"] == metrics["predicted_accept_rate"] == 0
    assert split_updates(batch, samples, args) == [[]]


class Stop:
    """A signal has come."""

    def on_any_rank(self) -> bool:
        return True


def test_how_well_p_is_predicted_by_hand():
    found = describe_prediction(np.array([0.2, 0.8]), np.array([1, 3]), np.array([2, 4]))
    assert found == {"predicted_accept_rate": pytest.approx((0.2 * 2 + 0.8 * 4) / 6), "prediction_correlation": pytest.approx(1.0)}
    for p, right in (([0.5], [1]), ([0.5, 0.5], [0, 1]), ([0.2, 0.8], [1, 1])):
        assert describe_prediction(np.array(p), np.array(right), np.ones(len(p)))["prediction_correlation"] is None


def test_a_plan_allocates_over_its_steps_and_counts_its_pilot(tools, problems):
    words = ["--no-predict", "--e-step-every", 3, "--pilot-samples", 2, "--samples-per-prompt", 4]
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
    words = ["--no-predict", "--pilot-samples", 2, "--prompts-per-step", 8, "--e-step-every", 3]
    (_, _, plan), = run_steps(tools, problems, words, 1)
    for changed, others in (([], problems[::-1]), (["--seed", 1], problems), (["--prompts-per-step", 16], problems)):
        args, state = flags(*words, *changed), RunState(step=1, plan=plan)
        batch, samples, _ = draw_step(others, 2, state, SampleSource(*tools, args), args)
        other = state.plan
        assert other["last_step"] == 4 and {p.id for p in batch} <= set(other["table"]["id"]) and samples


def test_a_plan_may_hold_a_problem_twice(tools, problems):
    args = flags("--prompts-per-step", 4)
    ahead = [p.id for step in (1, 2, 3) for p in problems_of_step(problems[:8], step, args)]
    assert len(set(ahead)) < 12  # the third step begins a new epoch
    words = ["--no-predict", "--pilot-samples", 2, "--prompts-per-step", 4, "--e-step-every", 3, "--cost", "tokens"]
    (_, metrics, plan), *_ = run_steps(tools, problems[:8], words, 3)
    table = plan["table"]
    assert table["num_drawn"] == [2] * len(set(ahead)) and min(table["mean_length"]) > 0
    assert sorted(table["id"]) == sorted(set(ahead))  # one pilot for both visits


def test_flags_that_do_not_go_together_are_refused_and_an_allocator_that_does_not_fit_warned_of(device, capsys):
    pilot = ["--no-predict", "--samples-per-prompt", 4, "--pilot-samples"]
    for words in ([], ["--candidates-per-step", 64], [*pilot, 4], [*pilot, 8, "--e-step-every", 10],
                  ["--allocator", "uniform"]):
        check_budget(flags(*words), "raft")
    for words, complaint in ([[*pilot, 5], "--samples-per-prompt is below --pilot-samples"],
                             [["--pilot-samples", 2], "add --no-predict"], [["--e-step-every", 2], "add --no-predict"],
                             [["--cost", "tokens"], "add --no-predict"], [["--no-predict"], "add --pilot-samples"],
                             [[*pilot, 2, "--allocator", "uniform"], "no --allocator uniform"],
                             [[*pilot, 2, "--candidates-per-step", 64], "--candidates-per-step: "],
                             [["--allocator", "uniform", "--candidates-per-step", 64], "--candidates-per-step: "]):
        with pytest.raises(InputError, match=complaint):
            check_budget(flags(*words), "raft")
    assert capsys.readouterr().out == ""
    check_budget(flags("--allocator", "reward"), "raft")
    assert capsys.readouterr().out.count("\n") == 1


def test_the_script_writes_a_table_the_same_for_one_and_two_ranks(tmp_path):
    script, words = "tests/allocation_table.py", ["--limit", 16, "--samples-per-prompt", 8]
    done = run_script(script, *words, "--out", tmp_path / "one.jsonl")
    run_script(script, *words, "--out", tmp_path / "two.jsonl", ranks=2)
    one, two = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("one.jsonl", "two.jsonl"))
    assert [row["id"] for row in one] == list(range(16)) and sum(row["counts"] for row in one) == 128
    assert "budget: 128 samples" in done.stdout and "predicted variance" in done.stdout
    for a, b in zip(one, two):
        assert all(a[name] == b[name] for name in ("p", "num_right", "num_drawn", "counts", "mean_length"))
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in a) and a["p"] == a["num_right"] / a["num_drawn"]
    before = (tmp_path / "one.jsonl").read_text()
    refused = run_script(script, *words, "--out", tmp_path / "one.jsonl", check=False)
    assert refused.returncode == 2 and "exists already" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "one.jsonl").read_text() == before
    refused = run_script(script, "--allocator", "uniform", "--out", tmp_path / "new.jsonl", check=False)
    assert refused.returncode == 2 and "take no pilot" in refused.stderr and not (tmp_path / "new.jsonl").exists()
