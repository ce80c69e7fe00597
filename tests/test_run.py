"""run.py: flags and errors in one line, folders that belong to one run, checkpoints that are whole or passed over."""

import json

import pytest
import torch
from conftest import flags, run_script

from data import InputError
from run import RunState, claim_folder, newest_checkpoint, run_script as run_main, start_log


@pytest.mark.parametrize(("words", "named"), [
    (["--steps", "0"], "--steps"), (["--allocator", "best"], "--allocator"), (["--temperature", "0"], "--temperature"),
    (["--beta", "1"], "--beta"), (["--lr", "nan"], "--lr"), (["--learning-rate", "1"], "--learning-rate"),
])
def test_wrong_flags_are_named(words, named):
    with pytest.raises(InputError, match=named):
        flags(*words)


def test_out_of_memory_names_the_flags_that_help(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_main(main)
    said = capsys.readouterr().err
    assert all(flag in said for flag in ("--tokens-per-micro-batch", "--vllm-memory", "--gradient-checkpointing"))


def make_checkpoint(out, step: int, **sizes) -> None:
    folder = out / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / "state.json").write_text(json.dumps({"state": {"step": step}, "sizes": {"model.safetensors": 5, **sizes}}))


def test_broken_checkpoints_are_passed_over_with_a_warning(device, tmp_path, capsys):
    assert newest_checkpoint(tmp_path) == (None, RunState())
    make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, **{"optimizer.pt": 3})  # a file is missing
    make_checkpoint(tmp_path, 6)
    (tmp_path / "checkpoints" / "step-000006" / "model.safetensors").write_bytes(b"123")  # cut short
    make_checkpoint(tmp_path, 8)
    (tmp_path / "checkpoints" / "step-000008" / "state.json").write_text('{"step": 8')
    (tmp_path / "checkpoints" / "step-000010.partial").mkdir()  # killed while writing
    path, state = newest_checkpoint(tmp_path)
    assert path.name == "step-000002" and state == RunState(step=2)
    assert capsys.readouterr().out.count("is incomplete") == 3


def test_a_folder_belongs_to_one_run(device, tmp_path):
    args, out = flags(), tmp_path / "run"
    with claim_folder(out, "args.json", resume=False):
        with pytest.raises(InputError, match="another process is running there"):
            claim_folder(out, "args.json", resume=False)
        start_log(out, args, 0)
    with pytest.raises(InputError, match="--resume continues it"):
        claim_folder(out, "args.json", resume=False)
    with claim_folder(out, "args.json", resume=True):
        pass
