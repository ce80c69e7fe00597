"""run.py: flags and errors in one line, folders that belong to one run, checkpoints that are whole or passed over."""

import gc
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import flags, settled
from safetensors import safe_open

from checkpoint import digest, load_optimizer, newest_checkpoint, save_checkpoint
from folder import LEFT_BY_A_RUN, RunState, claim_folder, run_folder, start_log
from files import write_json
from run import InputError, run_script as run_main


@pytest.mark.parametrize(("words", "named"), [
    (["--steps", "0"], "--steps"), (["--allocator", "best"], "--allocator"), (["--temperature", "0"], "--temperature"),
    (["--beta", "1"], "--beta"), (["--lr", "nan"], "--lr"), (["--learning-rate", "1"], "--learning-rate"),
])
def test_wrong_flags_are_named(words, named):
    with pytest.raises(InputError, match=named):
        flags(*words)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Error: out of memory")])
def test_out_of_memory_names_the_flags_that_help(capsys, error):
    def main():
        raise error

    with pytest.raises(RuntimeError):
        run_main(main)
    said, helping = capsys.readouterr().err, ("--tokens-per-micro-batch", "--vllm-memory", "--gradient-checkpointing")
    assert all(flag in said for flag in helping)


def test_other_errors_do_not_speak_of_memory(capsys):
    def main():
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        run_main(main)
    assert "memory" not in capsys.readouterr().err


def make_checkpoint(out, step: int) -> Path:
    """A checkpoint of a model of five bytes."""
    folder = out / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    write_json(folder / "state.json", {"step": step})
    write_json(folder / "digests.json", {path.name: digest(path) for path in folder.iterdir()})
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
    "short": lambda folder: (folder / "model.safetensors").write_bytes(b"123"),
    "zeros of the right length": lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 5),
    "a flipped bit": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "a flipped bit in the state": lambda folder: flip_a_bit(folder / "state.json"),
    "a list for a state": lambda folder: (folder / "state.json").write_text("[]"),
    "no digests": lambda folder: (folder / "digests.json").unlink(),
    "empty digests": lambda folder: (folder / "digests.json").write_text(""),
    "a list of digests": lambda folder: (folder / "digests.json").write_text('["model.safetensors"]'),
    "no digest of the state": lambda folder: (folder / "digests.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoints_are_passed_over_with_a_warning(device, tmp_path, capsys, damage):
    make_checkpoint(tmp_path, 2)
    damage(make_checkpoint(tmp_path, 4))
    (tmp_path / "checkpoints" / "step-000010.partial").mkdir()  # killed while writing
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "step-000002" and state == RunState(step=2)
    assert capsys.readouterr().out.count("step-000004 is damaged") == 1


@pytest.mark.parametrize(("words", "name"), [
    ([], "runs/raft-gvm-0"), (["--allocator", "uniform", "--seed", "3"], "runs/raft-uniform-3"),
    (["--candidates-per-step", "64"], "runs/raft-gvm-predicted-0"), (["--out", "here"], "here"),
])
def test_a_run_s_folder_is_named_by_what_is_run(device, words, name):
    assert run_folder(settled(*words)) == Path(name)


def test_a_new_folder_has_no_checkpoint(device, tmp_path):
    assert newest_checkpoint(tmp_path) == (None, RunState())


def test_a_folder_belongs_to_one_run(device, tmp_path):
    args, out = flags(), tmp_path / "run"
    with claim_folder(out, LEFT_BY_A_RUN, resume=False):
        with pytest.raises(InputError, match=f"process {os.getpid()} is running there"):
            claim_folder(out, LEFT_BY_A_RUN, resume=False)
        start_log(out, args, RunState())
    with pytest.raises(InputError, match="--resume continues it"):
        claim_folder(out, LEFT_BY_A_RUN, resume=False)
    with claim_folder(out, LEFT_BY_A_RUN, resume=True):
        pass


@pytest.mark.parametrize("left", ["args.json", "log.jsonl", "checkpoints/step-000001"])
def test_a_folder_with_a_part_of_a_run_is_not_started_in(device, tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(InputError, match="holds a run already"):
        claim_folder(tmp_path, LEFT_BY_A_RUN, resume=False)
    assert (tmp_path / left).is_dir()
    with claim_folder(tmp_path, LEFT_BY_A_RUN, resume=True):
        pass


def test_what_others_put_beside_checkpoints_is_neither_read_nor_deleted(device, model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    others = {make_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoints" / name)
              for name in ("step-backup", "step-00000x", "step-000002.old", "step-1")}
    for step in (4, 5):
        save_checkpoint(tmp_path, RunState(step=step), model, torch.optim.AdamW(model.parameters()), tokenizer, 1)
    newest = tmp_path / "checkpoints" / "step-000005"
    assert newest_checkpoint(tmp_path)[0] == newest
    assert set((tmp_path / "checkpoints").iterdir()) == {newest} | others


def test_where_all_checkpoints_are_broken_nothing_is_started_anew(device, tmp_path):
    DAMAGE["short"](make_checkpoint(tmp_path, 2))
    with pytest.raises(InputError, match="no checkpoint in .* is whole"):
        newest_checkpoint(tmp_path)


def test_the_checkpoint_just_written_is_kept_and_later_broken_ones_go(device, model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    DAMAGE["short"](make_checkpoint(tmp_path, 9))
    for step, keep, expected in ((5, 2, ["step-000004", "step-000005"]), (6, 1, ["step-000006"])):
        save_checkpoint(tmp_path, RunState(step=step), model, optimizer, tokenizer, keep)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == expected


def test_the_flags_win_over_the_optimizer_s_checkpoint_and_no_file_stays_mapped(device, model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, RunState(step=1), model, optimizer, tokenizer, 1)
    folder = tmp_path / "checkpoints" / "step-000001"
    optimizer.zero_grad()
    other = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    load_optimizer(folder, model, other)
    group, = other.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-5, 0.0)
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(state[name], other.state[parameter][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    gc.collect()  # a cycle may have held the file's tensors for a moment
    assert str(folder) not in open("/proc/self/maps").read()


def test_a_tied_head_is_saved_once_and_an_optimizer_without_a_step_not_at_all(device, model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    save_checkpoint(tmp_path, RunState(step=1), model, torch.optim.AdamW(model.parameters()), tokenizer, 1)
    folder = tmp_path / "checkpoints" / "step-000001"
    names = set(safe_open(folder / "model.safetensors", "pt").keys())
    assert names == {name for name, _ in model.named_parameters()} and "lm_head.weight" not in names
    assert not (folder / "optimizer.pt").exists()


def test_an_inner_phase_does_not_count_for_the_outer_one():
    state = RunState()
    with state.timer("sample"):
        time.sleep(0.02)
        with state.timer("grade"):
            time.sleep(0.2)
    assert 0.02 <= state.seconds["sample"] < 0.1 and state.seconds["grade"] >= 0.2
