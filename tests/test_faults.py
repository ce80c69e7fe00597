"""What goes wrong in practice: nothing is lost, nothing is silent. The table in tests/README.md names these tests."""

import errno
import fcntl
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT, SMALL, TOY, Started, command, default_signals, flags, parameters, read_log, run_script, slow, wait_for,
)
from safetensors.torch import load_file, save_file

import raft
import run
from checkpoint import RunState, newest_checkpoint, note_problems, remove_old_checkpoints, save_checkpoint
from checkpoint import watch_divergence, write_log
from data import Problem, digest_problems
from model import load_model
from run import InputError, RunError

QUICK = [*map(str, SMALL[:-1]), "1"]  # one step


# --- models ----------------------------------------------------------------------------------
def change_weights(change):
    def damage(folder) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


def change_config(**entries):
    def damage(folder) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
    return damage


def rename_all(weights) -> None:
    for name in list(weights):
        weights[f"other.{name}"] = weights.pop(name)


def put_nan(name: str):
    return change_weights(lambda weights: weights[name].view(-1)[5:6].fill_(torch.nan))


NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(("damage", "complaint"), [
    (change_weights(lambda weights: weights.pop(NORM)), f"its files lack tensors of the model .{NORM}, 1 in all"),
    (change_weights(rename_all), "its files lack tensors of the model"),
    (change_config(tie_word_embeddings=False), "its files lack tensors of the model .lm_head.weight"),
    (change_config(num_hidden_layers=9, layer_types=["full_attention"] * 9), "its files lack tensors of the model"),
    (put_nan(NORM), f"holds NaN or infinity .{NORM}"),
    (put_nan(EMBEDDING), f"holds NaN or infinity .{EMBEDDING}"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "its tokenizer cannot tell questions apart|cannot be loaded"),
    (change_config(vocab_size=9), "cannot be loaded"),
], ids=range(8))
def test_a_model_that_is_not_whole_is_refused(device, tmp_path, damage, complaint):
    folder = tmp_path / "model"
    shutil.copytree(TOY, folder)
    damage(folder)
    with pytest.raises(InputError, match=complaint) as error:
        load_model(flags("--model", folder), device)
    assert "\n" not in str(error.value)


def test_tensors_without_a_use_are_named(device, tmp_path, capsys):
    shutil.copytree(TOY, tmp_path / "model")
    change_weights(lambda weights: weights.update(extra=torch.ones(2)))(tmp_path / "model")
    load_model(flags("--model", tmp_path / "model"), device)
    assert "tensors without a use (extra, 1 in all)" in capsys.readouterr().out


# --- problems --------------------------------------------------------------------------------
@pytest.mark.slow
def test_problems_that_changed_under_the_same_name_are_noticed(device, tmp_path):
    data, words = tmp_path / "train.jsonl", [*QUICK, "--out", str(tmp_path / "run")]
    rows = (TOY / "train.jsonl").read_text().splitlines()[:40]
    data.write_text("\n".join(rows))
    raft.main([*words, "--data", str(data)])
    before = (tmp_path / "run" / "log.jsonl").read_text()
    for changed in (rows[::-1], rows[:-1], [rows[0].replace("answer\": \"", "answer\": \"1"), *rows[1:]]):
        data.write_text("\n".join(changed))
        with pytest.raises(InputError, match="train.jsonl held other problems at the checkpoint"):
            raft.main([*words, "--data", str(data), "--resume", "--steps", "2"])
        gc.collect()  # the error held the frame that holds the lock; a process would have ended
    assert (tmp_path / "run" / "log.jsonl").read_text() == before
    data.write_text("\n".join(rows))
    raft.main([*words, "--data", str(data), "--resume", "--steps", "2"])
    assert len(read_log(tmp_path / "run")) == 3


def test_a_plan_for_other_data_is_dropped(device):
    problems, plan = [Problem(0, "1+1", "2")], {"id": [0], "step": [9]}
    for known, kept in (({"a": digest_problems(problems)}, plan), ({"b": "0"}, None)):
        state = RunState(plan=plan, problems=known)
        note_problems(state, {"a": problems})
        assert state.plan == kept and state.problems == {"a": digest_problems(problems)}


# --- divergence ------------------------------------------------------------------------------
@pytest.mark.slow
def test_ten_updates_that_are_not_finite_end_the_run_and_replace_no_checkpoint(device, tmp_path, monkeypatch):
    words = [*QUICK, "--out", str(tmp_path / "run"), "--save-every", "1"]
    raft.main(words)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())

    def bad_loss(logprobs, old_logprobs, advantages, args):
        return logprobs * torch.nan, logprobs > 0

    monkeypatch.setitem(raft.LOSSES, "bad", bad_loss)
    with pytest.raises(RunError, match="ten updates in a row were not finite"):
        raft.main([*words, "--loss", "bad", "--resume", "--steps", "30"])
    log = read_log(tmp_path / "run")
    assert log[-1]["updates_not_finite"] == 10 and "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept


def test_the_log_is_json_whatever_comes(device, tmp_path):
    write_log(tmp_path, RunState(step=1), {"loss": float("nan"), "kl": float("inf"), "grad_norm": 1.0, "x": None})
    line, = read_log(tmp_path)
    assert (line["loss"], line["kl"], line["grad_norm"], line["x"]) == (None, None, 1.0, None)


def test_ten_steps_without_a_right_sample_are_said_once(device, capsys):
    state = RunState()
    for state.step in range(1, 40):
        watch_divergence(state, {"accept_rate": 0.5 if 3 < state.step < 9 else 0.0, "updates": 1})
    assert capsys.readouterr().out.count("no sample of the last ten steps was right") == 1
    assert (state.last_solved, state.not_finite) == (8, 0)


def test_a_checkpoint_from_before_the_last_right_sample_stays(tmp_path):
    for step in (10, 20, 30, 40, 50):
        (tmp_path / f"step-{step:06d}").mkdir()
    remove_old_checkpoints(tmp_path / "step-000050", RunState(step=50, last_solved=25), keep=2)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["20", "40", "50"]
    remove_old_checkpoints(tmp_path / "step-000050", RunState(step=50, last_solved=50), keep=1)
    assert [path.name[-2:] for path in tmp_path.iterdir()] == ["50"]


# --- stopping --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def straight(tmp_path_factory, device):
    """Two steps without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    raft.main([*QUICK, "--steps", "2", "--out", str(out)])
    return out


class StopAt:
    """A signal that comes before a check."""

    def __init__(self, check: int):
        self.left = check

    def on_any_rank(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("check", [slow(1), slow(2), 3, slow(4), slow(5), slow(6)])
def test_a_stop_at_any_check_is_saved_and_resumed(straight, tmp_path, monkeypatch, check):
    """Step 0 has one check: before the evaluation. Others have two or three: before the pilot, before the rest is
    drawn, and before the evaluation."""
    words = [*QUICK, "--steps", "2", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(run, "StopSignal", lambda: StopAt(check))
        raft.main(words)
    path, state = newest_checkpoint(tmp_path / "run")
    assert path is not None and len(read_log(tmp_path / "run")) == state.step + 1
    raft.main([*words, "--resume"])
    log, expected = read_log(tmp_path / "run"), read_log(straight)
    assert [line["step"] for line in log] == [0, 1, 2]
    assert log[-1]["updates"] == expected[-1]["updates"]
    ends, whole = parameters(tmp_path / "run", 2), parameters(straight, 2)
    assert all(torch.equal(ends[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_pilot_for_several_steps_is_counted_when_its_step_is_given_up(device, tmp_path, monkeypatch):
    """The third check comes after the pilot, and before the step's own samples."""
    words, logs = [*QUICK, "--pilot-samples", "2", "--e-step-every", "2", "--steps", "2"], []
    for name, check in (("straight", 1000), ("stopped", 3)):
        with monkeypatch.context() as patched:
            patched.setattr(run, "StopSignal", lambda: StopAt(check))
            raft.main([*words, "--out", str(tmp_path / name)])
    assert newest_checkpoint(tmp_path / "stopped")[1].step == 0
    saved = tmp_path / "stopped" / "checkpoints" / "step-000000" / "state.json"
    before = saved.stat().st_mtime_ns
    with monkeypatch.context() as patched:  # stopped again, before the pilot: nothing new is there to be saved
        patched.setattr(run, "StopSignal", lambda: StopAt(1))
        raft.main([*words, "--out", str(tmp_path / "stopped"), "--resume"])
    assert saved.stat().st_mtime_ns == before
    raft.main([*words, "--out", str(tmp_path / "stopped"), "--resume"])
    for name in ("straight", "stopped"):
        logs.append([(line["step"], line["samples"], line["tokens"]) for line in read_log(tmp_path / name)])
    assert logs[0] == logs[1] and len(logs[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_save_too(tmp_path, number):
    out = tmp_path / "run"
    started = Started("raft.py", *SMALL[:-1], 1000, "--save-every", 1000, "--out", out, mark=out)
    wait_for(lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 1)
    started.process.send_signal(number)
    assert started.process.wait(timeout=60) == 0, started.output.read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{read_log(out)[-1]['step']:06d}"]


def test_a_second_signal_ends_at_once_and_nohup_is_heeded():
    program = ("import os, signal, sys, run\n"
               "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
               "stop = run.StopSignal()\n"
               "os.kill(os.getpid(), signal.SIGHUP)\n"
               "assert not stop.received\n"
               "os.kill(os.getpid(), signal.SIGTERM)\n"
               "assert stop.received\n"
               "os.kill(os.getpid(), signal.SIGINT)\n"
               "print('still here')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=default_signals)
    assert done.returncode == -signal.SIGINT and not done.stdout, done.stderr


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # Lustre's, mounted without -o flock

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(InputError, match="--out: .*Function not implemented; choose another"):
        raft.main(["--out", str(tmp_path / "run")])
    assert not list(tmp_path.rglob("*.json*"))


def test_a_finished_run_says_so(straight, capsys):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file() and path.name != "lock"}
    for steps in ("2", "1"):
        raft.main([*QUICK, "--steps", steps, "--out", str(straight), "--resume"])
        assert f"is at step 2 of --steps {steps}; nothing is left to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_screen_that_is_gone_does_not_end_the_run(tmp_path):
    words = " ".join(command("raft.py", *QUICK, "--out", tmp_path / "run"))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} | head -1"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and len(read_log(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


@pytest.mark.parametrize("screen", ["terminal", slow("disk"), slow("none")])
def test_a_screen_that_fails_does_not_end_the_run(tmp_path, screen):
    """The terminal is closed after the first line; the disk that stdout goes to is full; there is no screen."""
    words, screens, far_end = command("raft.py", *QUICK, "--steps", 2, "--out", tmp_path / "run"), {}, None
    if screen == "terminal":
        far_end, near_end = os.openpty()
        screens = {"stdout": near_end, "stderr": near_end}
    elif screen == "disk":
        words = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", *words]
    else:
        words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, **screens)
    if far_end is not None:
        os.close(near_end)
        assert b"step 0" in os.read(far_end, 1000)
        os.close(far_end)
    assert process.wait(timeout=120) == 0
    assert len(read_log(tmp_path / "run")) == 3 and (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()


# --- disks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("room", [1000, 300_000, 1_600_000])  # bytes of a file: the weights, or the optimizer, do not fit
def test_a_full_disk_keeps_the_last_checkpoint(device, model_and_tokenizer, tmp_path, room):
    model, tokenizer = model_and_tokenizer
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, RunState(step=1), model, optimizer, tokenizer, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(InputError, match="step 2 cannot be written .*make room") as error:
            save_checkpoint(tmp_path, RunState(step=2), model, optimizer, tokenizer, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert newest_checkpoint(tmp_path)[1].step == 1


# --- ranks -----------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_error_of_one_rank_is_printed_with_its_rank_and_ends_all(tmp_path):
    start = time.monotonic()
    done = run_script("tests/ranks.py", "fail", tmp_path / "out", ranks=2, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("ranks.py: error")]
    assert ours == ["ranks.py: error on rank 1: --model here: is missing"] and time.monotonic() - start < 60
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_problems_that_differ_between_ranks_are_refused(tmp_path):
    done = run_script("tests/ranks.py", "differ", tmp_path / "out", ranks=2, check=False)
    ours = [line for line in done.stderr.splitlines() if line.startswith("ranks.py: error")]
    assert ours == ["ranks.py: error on rank 1: data: holds other problems than on rank 0; copy it there"]


@pytest.mark.slow
def test_torchrun_s_own_report_names_the_reason(tmp_path):
    done = run_script("raft.py", "--data", "missing.jsonl", "--out", tmp_path / "run", ranks=2, check=False)
    assert done.stderr.count("raft.py: error: missing.jsonl: no such file or directory") == 1
    assert done.stderr.rstrip().splitlines()[-3].endswith("InputError: missing.jsonl: no such file or directory")


@pytest.mark.slow
def test_half_of_torchrun_s_environment_is_no_rank():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    done = subprocess.run(command("raft.py"), env=environment | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and "WORLD_SIZE is set in the environment, but not" in done.stderr
    assert done.stderr.count("\n") == 1
