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

import eval as evaluation
import grpo
import raft
import run
import sampler
from checkpoint import newest_checkpoint, remove_old_checkpoints, save_checkpoint
from folder import RunState, digest_problems, note_problems, watch_run, write_log
from data import Problem
from pretrained import load_model
from run import InputError, RunError
from sampler import HfSampler

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


@pytest.mark.parametrize("kind", [
    (grpo, ["--candidates-per-step", "32"]), slow(raft, []), slow(raft, ["--allocator", "reward"]), slow(grpo, []),
    slow(grpo, ["--allocator", "reward"]), slow(raft, ["--candidates-per-step", "32"])])
def test_a_policy_that_is_nan_ends_the_run_and_is_not_saved(device, tmp_path, kind):
    """After an update with a learning rate that the command line does not take."""
    (script, words), out = kind, tmp_path / "run"
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    args = flags(*QUICK, "--updates-per-step", 1, "--kl-coef", 0, "--eval-data", tmp_path / "few.jsonl", "--save-every", 1,
                 "--steps", 20, *words, "--out", out, add_flags=script.add_flags)
    args.lr = 1e12
    with pytest.raises(RunError, match="ten updates in a row were not finite"):
        raft.train(args)
    log = read_log(out)
    first = next(line["step"] for line in log if line["updates"])  # its weights are finite; what follows from them is not
    assert [line["step"] for line in log] == list(range(first + 11)) and log[-1]["updates"] == 1
    assert log[-1]["samples_not_finite"] == 10 * 32 and newest_checkpoint(out)[1].step == first


def test_what_is_not_saved_is_not_called_saved(device, tmp_path, monkeypatch, capsys):
    def bad_loss(logprobs, old_logprobs, advantages, args):
        return logprobs * torch.nan, logprobs > 0

    monkeypatch.setitem(raft.LOSSES, "bad", bad_loss)
    raft.main([*QUICK, "--loss", "bad", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "saved in" not in said and "updates were not finite, so their steps are not saved" in said
    assert not (tmp_path / "checkpoints").exists()


def test_the_log_is_json_whatever_comes(device, tmp_path):
    write_log(tmp_path, RunState(step=1), {"loss": float("nan"), "kl": float("inf"), "grad_norm": 1.0, "x": None})
    line, = read_log(tmp_path)
    assert (line["loss"], line["kl"], line["grad_norm"], line["x"]) == (None, None, 1.0, None)


def test_ten_steps_without_a_right_sample_are_said_once(device, capsys):
    state = RunState()
    for state.step in range(1, 40):
        watch_run(state, {"accept_rate": 0.5 if 3 < state.step < 9 else 0.0, "updates": 1}, flags())
    assert capsys.readouterr().out.count("no sample of the last ten steps was right") == 1
    assert (state.last_solved, state.not_finite) == (8, 0)


def test_ten_steps_without_an_update_are_said_until_there_is_one(device, capsys):
    state = RunState()
    for state.step in range(1, 60):  # right samples in all steps, but no mixed group; then in none
        updates = int(state.step in (15, 40))
        watch_run(state, {"accept_rate": 0.5 if state.step <= 40 else 0.0, "updates": updates, "updates_empty": 1 - updates},
                  flags())
        said = capsys.readouterr().out
        assert said.count("warning") == (state.step in (10, 25, 50)), state.step
        assert ("no sample of the last ten steps" if state.step == 50 else "no update in the last ten steps") in said or not said


class Shifted(HfSampler):
    """A sampler whose log-probs are off, as if its model were another than the trainer's."""

    gap = 0.2

    def __call__(self, *arguments):
        return [response._replace(logprobs=response.logprobs + self.gap) for response in super().__call__(*arguments)]


def test_a_sampler_of_another_model_ends_the_run_before_anything_is_saved(device, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    words = [*QUICK, "--save-every", "1", "--eval-data", str(tmp_path / "few.jsonl"), "--out", str(tmp_path / "run")]
    monkeypatch.setitem(sampler.SAMPLERS, "hf", Shifted)
    with pytest.raises(RunError, match="off by 0.2 nats a token: .*--truncated-is 2.*--resume"):
        raft.main(words)
    gc.collect()  # the error held the frame that holds the lock; a process would have ended
    assert not (tmp_path / "run" / "checkpoints").exists() and "warning" not in capsys.readouterr().out
    raft.main([*words, "--resume", "--truncated-is", "2", "--steps", "2"])  # the remedy
    assert [line["step"] for line in read_log(tmp_path / "run")] == [0, 1, 2]
    assert capsys.readouterr().out.count("off by 0.2 nats a token") == 1
    # It has updates behind it: it is not ended, and what was said is not said again.
    raft.main([*words, "--resume", "--steps", "3"])
    assert newest_checkpoint(tmp_path / "run")[1].step == 3 and "nats" not in capsys.readouterr().out


def test_updates_that_teach_nothing_do_not_keep_a_run_from_saving(device):
    """A skipped update changes no weight: only updates in a row that are not finite speak of a run that is lost."""
    state = RunState(step=1)
    watch_run(state, {"updates": 1, "updates_not_finite": 1, "accept_rate": 0.5}, flags())
    assert state.not_finite == 1
    state.step = 2
    watch_run(state, {"updates_empty": 2}, flags())
    assert state.not_finite == 0
    watch_run(state, {"updates_not_finite": 2}, flags())
    watch_run(state, {"updates_empty": 2, "samples_not_finite": 3}, flags())
    assert state.not_finite == 4


def test_a_copy_of_a_checkpoint_under_another_number_is_neither_read_nor_deleted(device, tmp_path):
    words = [*QUICK, "--save-every", "1", "--keep", "1", "--out", str(tmp_path / "run")]
    raft.main(words)
    saved = newest_checkpoint(tmp_path / "run")[0]
    copy = saved.with_name("step-000099")
    shutil.copytree(saved, copy)
    assert newest_checkpoint(tmp_path / "run")[0] == saved
    raft.main([*words, "--resume", "--steps", "3"])
    assert copy.is_dir() and newest_checkpoint(tmp_path / "run")[1].step == 3


def test_a_lock_of_somebody_else_is_not_written_over(device, tmp_path):
    (tmp_path / "lock").write_text("mine")
    with pytest.raises(InputError, match="lock: is not of this program; choose another --out"):
        raft.main([*QUICK, "--out", str(tmp_path)])
    assert (tmp_path / "lock").read_text() == "mine"


def test_a_log_of_somebody_else_is_not_emptied_by_resume(device, tmp_path):
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(InputError, match="has a log.jsonl, but neither args.json nor a checkpoint; choose another --out"):
        raft.main([*QUICK, "--out", str(tmp_path), "--resume"])
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_a_small_gap_is_said_once_a_run(device, capsys):
    state = RunState()
    for state.step, gap in enumerate([None, 0.009, 0.011, 0.02, 0.5], start=1):
        watch_run(state, {"sampler_gap": gap, "updates": 1}, flags())
        assert capsys.readouterr().out.count("nats a token") == (state.step == 3)


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
        said = capsys.readouterr().out
        assert f"is at step 2 of --steps {steps}; nothing is left to do" in said
        assert f"to evaluate it: eval.py --model {straight}/checkpoints/step-000002 --data {TOY}/eval.jsonl" in said
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_an_evaluation_that_a_signal_left_out_is_made_by_the_command_that_is_named(straight, tmp_path, capsys):
    """With as many samples as the run's: the same figure."""
    raft.main([*QUICK, "--steps", "2", "--out", str(straight), "--resume"])
    words = capsys.readouterr().out.partition("to evaluate it: eval.py ")[2].split()
    evaluation.main([*words, "--samples", "1", "--out", str(tmp_path / "made")])
    results = json.loads((tmp_path / "made" / "summary.json").read_text())["results"]["eval"]
    assert results["avg@1"]["mean"] == read_log(straight)[-1]["eval_accuracy"]


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
