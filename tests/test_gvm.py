"""gvm.py: p and G from samples, and budgets that are spent to the last sample."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import flags, make_sample, run_script, settled

import grpo
import gvm
import predictor
from allocator import allocate, gvm_weights, reward_weights
from batches import prompt_states
from folder import RunState
from data import Problem, problems_of_step
from gvm import SampleSource, e_step, estimate, plan_flags, rows_of_step, settle_budget
from losses import OBJECTIVES, Objective, raft_objective
from metrics import describe_pilot, describe_prediction
from model import Policy, decoder_layers
from predictor import Predictor
from raft import split_updates
from run import InputError, Stopped
from sampler import HfSampler


@pytest.fixture
def tools(device, model_and_tokenizer, grader):
    """(policy, sampler, grader) of the toy."""
    return Policy(model_and_tokenizer[0]), HfSampler(*model_and_tokenizer, flags()), grader


def source_of(tools, args, stop=None) -> SampleSource:
    """What e_step draws from."""
    return SampleSource(*tools, args, stop)


def test_estimate_by_hand():
    kinds = zip([0, 2, 0, 0, 2], [1, 0, 0, 1, 0], [1.0, 3.0, 5.0, 7.0, 4.0], [2, 4, 6, 1, 8])
    samples = [make_sample(i, float(right), [1] * length, head_grad_norm=norm) for i, right, norm, length in kinds]
    problems = [Problem(i, "", "") for i in range(3)]
    table = estimate(samples, problems, "prompt")
    assert table["num_right"].tolist() == [2, 0, 0] and table["num_drawn"].tolist() == [3, 0, 2]
    assert table["norm_right"] == pytest.approx([5.0, 0.0, 0.0])  # sqrt((1 + 49) / 2)
    assert table["norm_wrong"] == pytest.approx([5.0, 0.0, np.sqrt(12.5)])
    assert table["accept_rate"] == pytest.approx([2 / 3, 0, 0])
    backwards = estimate(samples, problems[::-1], "prompt")
    assert all((backwards[name][::-1] == column).all() for name, column in table.items())


def test_predicted_variance_by_hand():
    def ratio(weights, counts, even=2, is_variance=True):
        table = {"weights": np.array(weights), "counts": np.array(counts), "num_right": np.ones(len(counts))}
        return describe_pilot(table, even, is_variance)["predicted_variance"]

    # w^2 = 4, 16; two samples each: 2 + 8 = 10; (1, 3): 4 + 16/3.
    assert ratio([2.0, 4.0], [1, 3]) == pytest.approx((4 + 16 / 3) / 10)
    assert ratio([2.0, 4.0, 0.0], [2, 2, 9]) == 1.0  # prompts without a weight are left out
    assert ratio([0.0], [3]) is None and ratio([1.0, 1.0], [0, 2]) is None  # infinite: JSON has no number
    assert ratio([2.0, 4.0], [1, 3], is_variance=False) is None  # of a rule of one's own


def test_uniform_could_spend_a_pilot_that_only_informs_too(tools, problems):
    """predicted_variance compares with uniform counts at the same cost: 1 and the pilot's 1."""
    words = ["--samples-per-prompt", 1, "--pilot-samples", 1, "--e-step-every", 2]
    for _, metrics, plan in run_steps(tools, problems, words, 2):  # the same for both steps: it is the plan's
        table = {name: np.array(column) for name, column in plan.items()}
        assert metrics["predicted_variance"] == describe_pilot(table, 2, True)["predicted_variance"]


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else 0.0


@pytest.mark.parametrize("words", [
    ["--weighting", "sequence"],
    ["--allocator", "reward"],
])
def test_a_pilot_estimates_p_and_g_and_the_budget_is_spent(tools, problems, words, monkeypatch):
    args, tables = settled("--pilot-samples", 4, "--samples-per-prompt", 6, *words), []
    monkeypatch.setattr(gvm, "rows_of_step", lambda *known: tables.append(rows_of_step(*known)) or tables[-1])
    batch, everything, _ = e_step(problems[:16], 1, RunState(), source_of(tools, args), args)
    table, samples = tables[-1], [s for s in everything if s.index < 4]  # the others tell nothing
    scored = [s for s in samples if s.reward > 0 or args.allocator == "reward"]  # the gvm rule looks at right ones only
    assert [s for s in everything if s.old_logprobs is not None] == scored and all(s.head_grad_norm for s in scored)
    assert len({(s.problem, s.index) for s in everything}) == len(everything) == 96
    assert len(samples) == 64
    for i, problem in enumerate(batch):
        mine = [s for s in samples if s.problem == problem.id]
        norms = {kind: [s.head_grad_norm / (len(s.response_ids) if args.weighting == "sequence" else 1)
                        for s in mine if s.reward == kind] for kind in (0, 1)}
        assert (table["num_right"][i], table["num_drawn"][i]) == (len(norms[1]), len(mine))
        assert table["norm_right"][i] == pytest.approx(rms(norms[1]))
        assert table["norm_wrong"][i] == pytest.approx(rms(norms[0]))
        assert sorted(s.index for s in mine) == list(range(len(mine))) and table["counts"][i] >= len(mine) >= 4
    p, right, wrong = table["num_right"] / table["num_drawn"], table["norm_right"], table["norm_wrong"]
    if args.allocator == "reward":
        expected = reward_weights(p, right, wrong)
    else:
        expected = gvm_weights(p, right, args.alpha, args.beta)
    assert table["weights"] == pytest.approx(expected)
    assert (table["counts"] == allocate(table["weights"], 16 * 6, table["num_drawn"])).all() and table["counts"].sum() == 96


def run_steps(tools, problems, words, steps):
    args, state, results = settled("--prompts-per-step", 8, *words), RunState(), []
    for step in range(1, steps + 1):
        batch, samples, metrics = e_step(problems, step, state, source_of(tools, args), args)
        assert batch == problems_of_step(problems, step, args)
        state.plan = json.loads(json.dumps(state.plan, default=np.ndarray.tolist))  # as through a checkpoint
        assert len({(s.problem, s.index) for s in samples}) == len(samples)
        results.append((samples, metrics, state.plan))
    return results


def pilot_by_hand(samples, batch) -> tuple[np.ndarray, np.ndarray]:
    """p and G of each prompt, by its first two samples."""
    pilot = [[s for s in samples if s.problem == problem.id and s.index < 2] for problem in batch]
    p = np.array([np.mean([s.reward for s in group]) for group in pilot])
    return p, np.array([rms([s.head_grad_norm for s in group if s.reward]) for group in pilot])


def test_a_step_spends_what_it_says(tools, problems):
    (samples, metrics, _), = run_steps(tools, problems, ["--allocator", "uniform", "--samples-per-prompt", 8], 1)
    assert np.bincount([s.problem for s in samples]).max() == 8 and metrics["samples"] == len(samples) == 64
    assert "predicted_variance" not in metrics
    # A pilot of two, by default; reused, and part of the 64.
    (samples, metrics, plan), = run_steps(tools, problems, ["--samples-per-prompt", 8], 1)
    assert metrics["samples"] == len(samples) == 64 and plan is None
    assert metrics["tokens"] == sum(len(s.response_ids) for s in samples)
    batch = problems_of_step(problems, 1, flags("--prompts-per-step", 8))
    counts = [sum(s.problem == p.id for s in samples) for p in batch]
    assert min(counts) >= 2 and max(counts) > 8  # the pilot, and where they help
    p, G = pilot_by_hand(samples, batch)
    table = {"weights": gvm_weights(p, G), "counts": np.array(counts), "num_right": p}
    assert {name: metrics[name] for name in ("predicted_variance", "pilot_unsolved")} == pytest.approx(
        describe_pilot(table, 8, True))  # 8 of each cost the same


def test_by_default_it_is_algorithm_2(tools, problems):
    """Step by step, as the paper has it, beside what e_step draws with the flags as they come."""
    args = settled()
    batch, samples, _ = e_step(problems, 1, RunState(), source_of(tools, args), args)
    assert (len(batch), args.pilot_samples, args.alpha, args.beta) == (16, 2, 1e-3, 2.0)
    p, G = pilot_by_hand(samples, batch)
    weights = np.where(p > 0, G / np.sqrt(np.maximum(p, 0.5) + 1e-3 / np.maximum(p, 0.5)), 0.0)  # p is 0, 1/2 or 1
    counts = [sum(s.problem == problem.id for s in samples) for problem in batch]
    assert counts == allocate(weights, 64, 2).tolist() and sum(counts) == 64 and max(counts) > 4


def test_a_prompt_s_states_are_what_the_model_says_of_it_alone(tools, problems):
    policy, chosen = tools[0], problems[:9]
    states = prompt_states(policy, chosen, max_tokens=60)  # several batches
    for problem, found in zip(chosen, states):
        ids = torch.tensor([problem.prompt_ids])
        layers = policy.model.base_model(ids, output_hidden_states=True).hidden_states
        hidden = layers[2][0].detach().numpy()  # after the second of three
        assert found == pytest.approx(np.concatenate([hidden[-1], hidden.mean(axis=0)]), abs=1e-4)
    assert prompt_states(policy, chosen[::-1], max_tokens=60)[::-1] == pytest.approx(states, abs=1e-4)


def test_the_last_layers_are_not_run_for_states(tools, problems):
    ran, layers = [], decoder_layers(tools[0].model)
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    prompt_states(tools[0], problems[:3], max_tokens=1000)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1] and len(layers) == 3
    assert not any(layer._forward_hooks for layer in layers)  # nothing of ours is left


def test_counts_are_the_same_if_the_head_is_scaled(tools, problems):
    """The final norm times 8 and the head over 8 are the same policy, with eight times the gradient norms."""
    policy, sampler, grader = tools
    scaled = copy.deepcopy(policy.model)
    scaled.lm_head.weight = torch.nn.Parameter(scaled.lm_head.weight / 8)  # no longer tied
    scaled.model.norm.weight.data *= 8
    counts = []
    for model in (policy.model, scaled):
        each = Policy(model), HfSampler(model, sampler.tokenizer, settled()), grader
        args, state = settled("--candidates-per-step", 32), RunState()
        for step in (1, 2, 3):  # no update: what changes is what is known
            _, samples, _ = e_step(problems, step, state, source_of(each, args), args)
            counts.append([sample.problem for sample in samples])
    assert counts[:3] == counts[3:]


def test_many_states_are_made_fewer_and_who_is_like_whom_is_kept(tools, problems, monkeypatch):
    states = prompt_states(tools[0], problems[:64], max_tokens=10_000)
    found = {}
    for most in (64, 256):
        monkeypatch.setattr(predictor, "NUM_STATES", most)
        found[most] = Predictor({}).features(states)[:, :-1]  # the last is a 1
        assert (found[most] == Predictor({}).features(states)[:, :-1]).all()
    assert found[64].shape == (64, 64) and found[256].shape == states.shape
    fewer, whole = (np.linalg.norm(x * x.std() - x[0] * x.std(), axis=1) for x in found.values())
    assert np.corrcoef(fewer, whole)[0, 1] > 0.9


@pytest.mark.parametrize(("objective", "smallest"), [("raft", 1), ("grpo", 2)])
def test_a_predicted_step_serves_some_of_its_candidates_and_learns(tools, problems, objective, smallest):
    words = ["--objective", objective, "--candidates-per-step", 32, "--samples-per-prompt", 2]
    args, state, predicted = settled("--prompts-per-step", 8, *words, add_flags=grpo.add_flags), RunState(), []
    for step in range(1, 7):
        before = json.dumps(state.predictor, default=np.ndarray.tolist)
        with pytest.raises(Stopped):
            e_step(problems, step, state, source_of(tools, args, Stop()), args)
        assert json.dumps(state.predictor, default=np.ndarray.tolist) == before  # a step that is given up teaches nothing
        batch, samples, metrics = e_step(problems, step, state, source_of(tools, args), args)
        state.predictor = json.loads(json.dumps(state.predictor, default=np.ndarray.tolist))  # as through a checkpoint
        candidates = problems_of_step(problems, step, args)
        assert len(candidates) == 32 and len(batch) <= 16 and len(samples) == metrics["samples"] == 16
        assert [p for p in candidates if p in batch] == batch  # in their order
        counts = [sum(s.problem == p.id for s in samples) for p in batch]
        assert min(counts) >= smallest and sum(counts) == 16
        predicted.append(metrics["predicted_accept_rate"])
    assert predicted[0] == pytest.approx(0.5) and len(set(predicted)) == 6


def test_states_and_norms_that_are_not_finite_are_counted_and_teach_nothing(tools, problems, monkeypatch):
    states_of, fill_norms, sample_and_grade = gvm.prompt_states, gvm.fill_norms, SampleSource.sample_and_grade

    def some_states(*arguments):
        states = states_of(*arguments)
        states[3], states[5, 2] = np.nan, np.inf
        return states

    def some_norms(policy, samples, max_tokens):
        fill_norms(policy, samples, max_tokens)
        samples[0].head_grad_norm, samples[-1].sampler_logprobs[0] = np.inf, np.nan

    def some_samples(source, *arguments, **more):
        samples = sample_and_grade(source, *arguments, **more)
        if not more:  # of predictions: without norms
            samples[0].sampler_logprobs[0], samples[-1].sampler_logprobs[0] = -np.inf, np.nan
        return samples

    monkeypatch.setattr(gvm, "prompt_states", some_states)
    monkeypatch.setattr(gvm, "fill_norms", some_norms)
    monkeypatch.setattr(SampleSource, "sample_and_grade", some_samples)
    for words in (["--candidates-per-step", 16], ["--allocator", "gvm"], ["--allocator", "reward"]):
        args, state = settled("--prompts-per-step", 8, *words), RunState()
        for step in (1, 2, 3):
            _, samples, metrics = e_step(problems, step, state, source_of(tools, args), args)
            assert metrics["samples_not_finite"] == 2 and len(samples) == 32
        assert all(np.isfinite(array).all() for array in state.predictor.values())


@pytest.mark.parametrize(("learnt", "complaint"), [
    ({"length_mean": [0.0]}, "not for states like these: {'length_mean': .1,.}"), ({"mean": "high"}, "could not convert")])
def test_a_predictor_s_state_that_is_not_one_is_refused_in_one_line(tools, problems, learnt, complaint):
    args = settled("--candidates-per-step", 16)
    with pytest.raises(InputError, match=f"--candidates-per-step: .*{complaint}.*; leave it out, or") as error:
        e_step(problems, 1, RunState(predictor=learnt), source_of(tools, args), args)
    assert "\n" not in str(error.value)


def test_a_budget_that_can_tell_nothing_is_left_undrawn(tools, problems):
    """A group needs two samples; flags that say one are refused before."""
    words = ["--prompts-per-step", 1, "--samples-per-prompt", 2, "--candidates-per-step", 1, "--objective", "grpo"]
    args = settled(*words, add_flags=grpo.add_flags)
    args.samples_per_prompt = 1
    batch, samples, metrics = e_step(problems, 1, RunState(), source_of(tools, args), args)
    assert batch == samples == [] and metrics["samples"] == metrics["predicted_accept_rate"] == 0
    assert split_updates(batch, samples, args) == [[]]


class Stop:
    """A signal has come."""

    def on_any_rank(self) -> bool:
        return True


def test_how_well_p_is_predicted_by_hand():
    found = describe_prediction(np.array([0.2, 0.5, 0.8]), np.array([1, 0, 3]), np.array([2, 0, 4]))
    assert found == {"predicted_accept_rate": pytest.approx((0.2 * 2 + 0.8 * 4) / 6), "prediction_correlation": pytest.approx(1.0)}
    for p, right in (([0.5], [1]), ([0.5, 0.5], [0, 1]), ([0.2, 0.8], [1, 1])):
        assert describe_prediction(np.array(p), np.array(right), np.ones(len(p)))["prediction_correlation"] is None


def test_a_plan_allocates_over_its_steps_and_counts_its_pilot(tools, problems):
    words = ["--e-step-every", 3, "--pilot-samples", 2, "--samples-per-prompt", 4]
    results = run_steps(tools, problems, words, 4)
    assert [max(plan["step"]) for _, _, plan in results] == [3, 3, 3, 6]
    assert sum(len(samples) for samples, _, _ in results[:3]) == 3 * 8 * 4  # the budget, exactly, over the plan
    assert [metrics["samples"] - len(samples) for samples, metrics, _ in results] == [48, 0, 0, 48]  # the pilots
    for (samples, _, plan), step in zip(results, (1, 2, 3)):
        counts = dict(zip(plan["id"], plan["counts"]))
        for problem in problems_of_step(problems, step, flags("--prompts-per-step", 8)):
            assert sum(s.problem == problem.id for s in samples) == counts[problem.id]
        assert all(s.index >= 2 for s in samples)  # the pilot's own samples are not trained on


def test_a_plan_of_other_problems_is_made_anew(tools, problems):
    words = ["--pilot-samples", 2, "--prompts-per-step", 8, "--e-step-every", 3]
    (_, _, plan), = run_steps(tools, problems, words, 1)
    for changed, others in (([], problems[::-1]), (["--seed", 1], problems), (["--prompts-per-step", 16], problems)):
        args, state = settled(*words, *changed), RunState(step=1, plan=plan, plan_flags=plan_flags(settled(*words)))
        batch, samples, _ = e_step(others, 2, state, source_of(tools, args), args)
        other = state.plan
        assert max(other["step"]) == 4 and {p.id for p in batch} <= set(other["id"]) and samples


@pytest.mark.parametrize("changed", [
    [], ["--samples-per-prompt", 5], ["--alpha", 0.1], ["--beta", 3], ["--allocator", "reward"], ["--pilot-samples", 3],
    ["--weighting", "sequence"], ["--e-step-every", 4], ["--temperature", 0.9], ["--lr", 0.1]], ids=str)
def test_a_plan_of_other_flags_is_made_anew(tools, problems, changed):
    """Two of the plan's three steps are left. With the flags that made it, it serves them."""
    words = ["--pilot-samples", 2, "--prompts-per-step", 4, "--e-step-every", 3]
    (_, _, plan), = run_steps(tools, problems, words, 1)
    args, flags_then = settled(*words, *changed), json.loads(json.dumps(plan_flags(settled(*words))))
    state = RunState(step=1, plan=plan, plan_flags=flags_then)
    _, samples, metrics = e_step(problems, 2, state, source_of(tools, args), args)
    is_kept = changed in ([], ["--lr", 0.1])
    assert (state.plan is plan) == is_kept and (metrics["samples"] == len(samples)) == is_kept  # else with a pilot on top
    assert max(state.plan["step"]) == (3 if is_kept else 1 + args.e_step_every) and state.plan_flags == plan_flags(args)


def test_a_run_that_goes_on_with_a_pilot_for_each_step_drops_its_plan(tools, problems):
    """Two of the plan's three steps are left. A pilot that is trained on is drawn, as if there had been no plan."""
    words, every = ["--pilot-samples", 2, "--prompts-per-step", 8], ["--e-step-every", 3]
    (_, _, plan), = run_steps(tools, problems, [*words, *every], 1)
    found = []
    for kept in (plan, None):
        args, state = settled(*words), RunState(step=1, plan=kept, plan_flags=plan_flags(settled(*words, *every)))
        _, samples, metrics = e_step(problems, 2, state, source_of(tools, args), args)
        found.append(([(s.problem, s.index, list(s.response_ids)) for s in samples], metrics))
        assert state.plan is None and metrics["samples"] == len(samples) == 8 * 4
    assert found[0] == found[1]


def test_a_plan_ends_with_its_epoch_so_that_no_problem_is_there_twice(tools, problems):
    """Eight problems, four a step: an epoch has two steps. Each plan spends exactly its budget."""
    words = ["--pilot-samples", 2, "--prompts-per-step", 4, "--samples-per-prompt", 4, "--e-step-every", 3]
    results = run_steps(tools, problems[:8], words, 5)
    assert [max(plan["step"]) for _, _, plan in results] == [2, 2, 4, 4, 6]
    assert all(sorted(plan["id"]) == list(range(8)) and plan["num_drawn"] == [2] * 8 for _, _, plan in results)
    drawn = [len(samples) for samples, _, _ in results]
    assert drawn[0] + drawn[1] == drawn[2] + drawn[3] == 2 * 4 * 4
    assert [metrics["samples"] - number for (_, metrics, _), number in zip(results, drawn)] == [16, 0, 16, 0, 16]


def test_flags_that_do_not_go_together_are_refused_and_an_allocator_that_does_not_fit_warned_of(device, capsys):
    pilot, uniform, candidates = ["--pilot-samples"], ["--allocator", "uniform"], ["--candidates-per-step", 64]
    for words in ([], candidates, [*pilot, 4], [*pilot, 8, "--e-step-every", 10], uniform):
        settle_budget(flags(*words), "raft")
    for words, complaint in ([[*pilot, 5], "--samples-per-prompt is below --pilot-samples"],
                             [["--samples-per-prompt", 1], "--samples-per-prompt is below --pilot-samples"],
                             [[*pilot, 2, *uniform], "no pilot is taken"], [["--e-step-every", 2, *uniform], "no pilot is"],
                             [[*pilot, 2, *candidates], "no pilot is taken"],
                             [["--e-step-every", 2, *candidates], "no pilot is taken"],
                             [[*uniform, *candidates], "--candidates-per-step: --allocator uniform does not look at p"]):
        with pytest.raises(InputError, match=complaint):
            settle_budget(flags(*words), "raft")
    assert capsys.readouterr().out == ""
    settle_budget(flags("--allocator", "reward"), "raft")
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("words", [
    ["--allocator", "uniform"], ["--pilot-samples", 1], ["--candidates-per-step", 16, "--prompts-per-step", 1], []])
def test_groups_that_are_sure_to_be_too_small_to_learn_from_are_refused(device, words):
    one = ["--samples-per-prompt", 1, *words]
    with pytest.raises(InputError, match="--samples-per-prompt: --objective grpo learns nothing from fewer than 2 samples"):
        settle_budget(flags(*one), "grpo")
    settle_budget(flags("--samples-per-prompt", 2, *words), "grpo")
    for others in (["--e-step-every", 2], ["--candidates-per-step", 16, "--prompts-per-step", 2]):  # some may get two
        settle_budget(flags("--samples-per-prompt", 1, *others), "grpo")
    if words:  # else the pilot is of two
        settle_budget(flags(*one), "raft")


def test_the_pilot_has_two_samples_unless_told_otherwise_where_there_is_one(device):
    for words, size in ([], 2), (["--pilot-samples", 3], 3), (["--allocator", "uniform"], 0), (
            ["--candidates-per-step", 16], 0):
        args = flags(*words)
        settle_budget(args, "raft")
        assert args.pilot_samples == size


def test_the_rule_is_the_paper_s_and_with_predictions_the_one_that_fits(device, monkeypatch, capsys):
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(raft_objective, smallest_group=1))
    for objective, words, rule in (("raft", [], "gvm"), ("grpo", [], "gvm"), ("raft", ["--candidates-per-step", 16], "gvm"),
                                   ("grpo", ["--candidates-per-step", 16], "reward"), ("mine", [], "gvm"),
                                   ("grpo", ["--candidates-per-step", 16, "--allocator", "gvm"], "gvm")):
        args = flags(*words)
        settle_budget(args, objective)
        assert args.allocator == rule
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_script_writes_a_table_the_same_for_one_and_two_ranks(tmp_path):
    script, words = "tests/allocation_table.py", ["--limit", 16, "--samples-per-prompt", 8]
    done = run_script(script, *words, "--out", tmp_path / "one.jsonl")
    run_script(script, *words, "--out", tmp_path / "two.jsonl", ranks=2)
    one, two = ([json.loads(line) for line in (tmp_path / name).open()] for name in ("one.jsonl", "two.jsonl"))
    assert [row["id"] for row in one] == list(range(16)) and sum(row["counts"] for row in one) == 128
    assert "budget: 128 samples" in done.stdout and "predicted variance" in done.stdout
    for a, b in zip(one, two):
        assert all(a[name] == b[name] for name in ("accept_rate", "num_right", "num_drawn", "counts"))
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in a)
        assert a["accept_rate"] == a["num_right"] / a["num_drawn"]
    before = (tmp_path / "one.jsonl").read_text()
    refused = run_script(script, *words, "--out", tmp_path / "one.jsonl", check=False)
    assert refused.returncode == 2 and "exists already" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "one.jsonl").read_text() == before
    refused = run_script(script, "--allocator", "uniform", "--out", tmp_path / "new.jsonl", check=False)
    assert refused.returncode == 2 and "this table shows a pilot" in refused.stderr and not (tmp_path / "new.jsonl").exists()
