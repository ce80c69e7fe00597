"""step_cost.py: its operations are those that torch counts, its bytes those that one can count by hand."""

import pytest
import step_cost
import torch
from conftest import m_step, make_sample
from memory import parameter_counts
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import raft
import run
from batches import distribute, fill_norms, prompt_states
from data import TOY, Problem
from gvm import settle_budget
from model import Policy, load_model

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
    expected = costs("--gpus", 1, *checkpointing)["training"][0]
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_scoring_takes_the_operations_that_torch_counts(device):
    policy = Policy(load_model(flags(), device)[0])
    with FlopCounterMode(display=False) as counter:
        fill_norms(policy, eight_samples(), 100_000)
    expected = costs("--gpus", 1, "--pilot-samples", 2)["scoring"][0]  # a budget that is all pilot
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_bytes_by_hand():
    total = parameter_counts(AutoConfig.from_pretrained(TOY))[0]
    four = ["--gpus", 4, "--updates-per-step", 3]
    assert costs(*four)["optimizer"][1] == 3 * 28 * total
    assert costs(*four, "--fsdp")["optimizer"][1] == 3 * 7 * total
    assert costs(*four)["training"][2] == 3 * 8 * total * 3 / 4  # an all-reduce for each update
    assert costs(*four, "--fsdp")["training"][2] == 3 * 12 * total * 3 / 4  # three micro-batches, one for each update
    assert costs("--gpus", 1)["training"][2] == 0
    assert costs(*four)["weights to the engine"][2] == 0
    assert costs(*four, "--fsdp", *PILOT)["weights to the engine"][2] == 2 * 4 * total * 3 / 4


def test_a_prediction_takes_the_operations_that_torch_counts(device):
    policy, problems = Policy(load_model(flags(), device)[0]), [Problem(i, "", "", prompt_ids=[5] * 12) for i in range(8)]
    with FlopCounterMode(display=False) as counter:
        prompt_states(policy, problems, 100_000)
    one, two = (costs("--gpus", 1, "--candidates-per-step", number)["scoring"][0] for number in (8, 16))
    assert counter.get_total_flops() == pytest.approx(two - one, rel=0.03)


def test_predictions_and_pilots_by_hand():
    five = ["--samples-per-prompt", 5, *PILOT]
    assert step_cost.draws(flags("--allocator", "uniform")) == (1, 0)
    assert step_cost.draws(flags("--candidates-per-step", 4)) == (1, 0)
    assert step_cost.draws(flags(*five)) == (2, 0)
    assert step_cost.draws(flags("--e-step-every", 4, *five)) == (1.25, 8)
    assert step_cost.scored_share(flags("--candidates-per-step", 4)) == 1
    assert step_cost.scored_share(flags(*five)) == pytest.approx(2 / 5)
    assert step_cost.scored_share(flags("--allocator", "uniform")) == 0
    # A token costs a pilot and the budget the same: with as many of each, a step draws twice as much.
    one, two = costs("--allocator", "uniform"), costs("--e-step-every", 1000, *PILOT)
    assert two["sampling"][0] == pytest.approx(2 * one["sampling"][0])


def test_the_table_has_seconds_where_throughputs_are_given(capsys):
    words = list(map(str, (*STEP, *LENGTHS)))
    step_cost.main(words)
    assert "0.0" in capsys.readouterr().out.splitlines()[-1]
    step_cost.main([*words, "--tflops", "1e-6"])  # a million operations a second
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["sampling", "weights", "scoring", "training", "optimizer", "sum"]
    seconds = [float(line.split()[-1]) for line in lines[1:]]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.3) and seconds[3] > 10
