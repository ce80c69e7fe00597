"""step_cost.py: its operations are those that torch counts, its bytes those that one can count by hand."""

import heapq

import numpy as np
import pytest
import step_cost
import torch
from conftest import m_step, make_sample
from memory import parameter_counts
from test_memory import policy_of
from test_model import TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig

import model as model_module
import raft
import run
from batches import collate, distribute, fill_norms, prompt_states
from data import TOY, Problem
from gvm import settle_budget
from model import Policy
from pretrained import load_model

PILOT = ["--pilot-samples", 2]
LENGTHS = ["--prompt-tokens", 12, "--response-tokens", 10]
STEP = ["--prompts-per-step", 4, "--samples-per-prompt", 2, "--updates-per-step", 1, "--trained-share", 1.0]


def flags(*words):
    """The flags of the script; with STEP and LENGTHS, a step has eight samples of 22 tokens, and all are trained on."""
    words = list(map(str, (*STEP, *LENGTHS, *words)))
    args = run.parse_flags(words, step_cost.__doc__, raft.add_flags, step_cost.add_flags)
    settle_budget(args, args.objective)
    return args


def costs(*words) -> dict:
    return step_cost.step_cost(AutoConfig.from_pretrained(TOY), flags(*words))


def eight_samples() -> list:
    samples = [make_sample(i // 2, 1.0, [9] * 10, prompt=[5] * 12, advantage=1.0, loss_weight=1.0) for i in range(8)]
    for sample in samples:
        sample.old_logprobs = sample.sampler_logprobs
    return samples


@pytest.mark.parametrize("checkpointing", [[], ["--gradient-checkpointing"]])
def test_training_takes_the_operations_that_torch_counts(device, checkpointing):
    args = flags(*checkpointing)
    policy = Policy(load_model(args, device)[0], 1.0, args.gradient_checkpointing)
    learner, optimizer = distribute(policy), torch.optim.SGD(policy.parameters(), lr=0.0)
    with FlopCounterMode(display=False) as counter:
        m_step(learner, optimizer, [Problem(i, "", "") for i in range(4)], eight_samples(), args)
    expected = costs("--gpus", 1, *checkpointing)["training: products"].operations
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_scoring_takes_the_operations_that_torch_counts(device):
    policy = Policy(load_model(flags(), device)[0])
    with FlopCounterMode(display=False) as counter:
        fill_norms(policy, eight_samples(), 100_000)
    expected = costs("--gpus", 1, "--pilot-samples", 2)["scoring: products"].operations  # a budget that is all pilot
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_bytes_by_hand():
    total = parameter_counts(AutoConfig.from_pretrained(TOY))[0]
    four = ["--gpus", 4, "--updates-per-step", 3]
    assert costs(*four)["optimizer"].moved == 3 * 28 * total
    assert costs(*four, "--fsdp")["optimizer"].moved == 3 * 7 * total
    assert costs(*four)["training: products"].sent == 3 * 8 * total * 3 / 4  # an all-reduce for each update
    assert costs(*four, "--fsdp")["training: products"].sent == 3 * 12 * total * 3 / 4  # three micro-batches, one for each update
    assert costs("--gpus", 1)["training: products"].sent == 0
    assert costs(*four)["weights to the engine"].sent == 0
    assert costs(*four, "--fsdp", *PILOT)["weights to the engine"].sent == 2 * 4 * total * 3 / 4


def test_a_prediction_takes_the_operations_that_torch_counts(device):
    policy, problems = Policy(load_model(flags(), device)[0]), [Problem(i, "", "", prompt_ids=[5] * 12) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        prompt_states(policy, problems, 100_000)
    one, two = (costs("--gpus", 1, "--candidates-per-step", number)["scoring: products"].operations for number in (8, 16))
    assert counter.get_total_flops() == pytest.approx(two - one, rel=0.03)


def test_predictions_and_pilots_by_hand():
    five = ["--samples-per-prompt", 5, *PILOT]
    assert step_cost.draws(flags("--allocator", "uniform")) == step_cost.draws(flags("--candidates-per-step", 4)) == [(1, 4, 2)]
    assert step_cost.draws(flags(*five)) == [(1, 4, 2), (1, 4, 3)]
    assert step_cost.draws(flags("--e-step-every", 4, *five)) == [(1 / 4, 16, 2), (1, 4, 5)]
    assert step_cost.scored_share(flags("--candidates-per-step", 4)) == 0  # the sampler's log-probs will do
    assert step_cost.scored_share(flags(*five)) == pytest.approx(2 / 5)
    assert step_cost.scored_share(flags("--allocator", "uniform")) == 0
    # A token costs a pilot and the budget the same: with as many of each, a step draws twice as much.
    one, two = (costs("--gpus", 1, *words) for words in (["--allocator", "uniform"], ["--e-step-every", 1000, *PILOT]))
    assert two["sampling"].operations == pytest.approx(2 * one["sampling"].operations)


def traffic_of(function) -> int:
    with step_cost.Traffic() as found:
        function()
    return found.bytes


@pytest.fixture
def policy_in_bf16(device, monkeypatch):
    """Makes policies that compute under autocast, as on CUDA, with gradients that stay."""
    monkeypatch.setattr(Policy, "_autocast", lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    return policy_of


@pytest.mark.parametrize("checkpointing", [[], ["--gradient-checkpointing"]])
def test_what_layers_move_is_what_torch_s_operations_read_and_write(policy_in_bf16, checkpointing):
    policy = policy_in_bf16(AutoConfig.from_pretrained(TOY), bool(checkpointing))
    batch = collate(eight_samples(), policy.device)
    words = ["--gpus", 1, "--allocator", "uniform", *checkpointing]
    found = traffic_of(lambda: policy(**batch).sum().backward())
    assert found == pytest.approx(costs(*words)["training: the rest"].moved, rel=0.05)
    found = traffic_of(lambda: policy.logprobs_and_norms(**batch))
    assert found == pytest.approx(costs("--gpus", 1, *PILOT)["scoring: the rest"].moved, rel=0.05)


def test_what_the_head_moves_is_what_torch_s_operations_read_and_write(policy_in_bf16, monkeypatch):
    for module in (model_module, step_cost):
        monkeypatch.setattr(module, "HEAD_BYTES", 20 * 4 * 20_000)  # four chunks of 20 tokens
    config = LlamaConfig(**TINY | {"vocab_size": 20_000, "tie_word_embeddings": False})
    policy = policy_in_bf16(config)
    batch = collate(eight_samples(), policy.device)
    found = traffic_of(lambda: policy(**batch).sum().backward())
    args = flags("--gpus", 1, "--allocator", "uniform")
    assert found == pytest.approx(step_cost.step_cost(config, args)["training: the rest"].moved, rel=0.05)
    found = traffic_of(lambda: policy.logprobs_and_norms(**batch))
    args = flags("--gpus", 1, *PILOT)
    assert found == pytest.approx(step_cost.step_cost(config, args)["scoring: the rest"].moved, rel=0.05)


@pytest.mark.parametrize(("samples", "slots"), [(1024, 256), (1024, 1024), (100, 256), (9216, 1024)])
def test_a_draw_takes_the_decoding_steps_of_a_queue_with_as_many_slots(samples, slots):
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.3, 0.75, samples), 3072)
    ends = [0.0] * slots  # of what each slot decodes
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    args = flags("--response-tokens", round(lengths.mean()), "--longest", round(lengths.max()), "--sampler-batch-size", slots)
    assert step_cost.decode_steps(samples, args) == pytest.approx(max(ends), rel=0.15)


def test_prompts_that_a_rank_reads_by_hand():
    assert step_cost.prompts_read(1024, 8, gpus=8) == 1024 * 2 / 8  # two pieces of four
    assert step_cost.prompts_read(1024, 64, gpus=8) == 1024  # more pieces than ranks
    assert step_cost.prompts_read(4, 2, gpus=1) == 4


def test_python_is_counted_by_the_token():
    assert costs("--gpus", 2, "--allocator", "uniform")["sampling"].tokens == 8 * 10 / 2
    assert costs("--gpus", 2, "--e-step-every", 4, *PILOT)["sampling"].tokens == 2 * 8 * 10 / 2


def test_the_table_has_seconds_where_throughputs_are_given(capsys):
    words = list(map(str, (*STEP, *LENGTHS)))
    step_cost.main(words)
    assert "0.0" in capsys.readouterr().out.splitlines()[-1]
    step_cost.main([*words, "--tflops", "1e-6"])  # a million operations a second
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "sampling", "weights", "scoring:", "scoring:", "training:", "training:", "optimizer", "sum"]
    seconds = [float(line.split()[-1]) for line in lines[1:]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.3) and seconds[4] > 10
