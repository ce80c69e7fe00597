"""Checkpoints, and how a run goes on from them: OUT/checkpoints/step-N.

Each holds model and tokenizer for from_pretrained, optimizer.pt, state.json, and digests of them.
It is there whole or not at all. All functions are called on every rank, unless they say that rank 0
calls them.
"""

import hashlib
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict as state_dicts
from safetensors import SafetensorError

from files import read_json, write_json
from folder import FORMAT, RunState
from run import InputError, of_rank0, on_rank0, print0

CHECKPOINT = "step-" + 6 * "[0-9]"  # other names beside these are somebody else's
# Checkpoints hold whole tensors under plain names, so that any number of ranks can load them.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(out: Path, state: RunState, model, optimizer, tokenizer, keep: int) -> None:
    """Write OUT/checkpoints/step-N, and keep the newest `keep`.

    It is not written twice, nor after updates that are not finite.
    """
    if state.saved == state.step or state.not_finite > 0:
        return
    state.saved = state.step
    weights, moments = state_dicts.get_model_state_dict(model, options=WHOLE), None
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: weights[name] for name in names & weights.keys()}  # a tied head only once
    if optimizer.state:  # it has none before its first step, and asking would make a step
        moments = state_dicts.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    final = out / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")

    def write():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if moments is not None:
                torch.save(moments, partial / "optimizer.pt")
            write_json(partial / "state.json", asdict(state))
            digests = {path.name: digest(path) for path in partial.iterdir()}
            write_json(partial / "digests.json", digests)
            digest(partial / "digests.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            shutil.rmtree(partial, ignore_errors=True)  # it may not have come so far
            raise InputError(f"--out: the checkpoint of step {state.step} cannot be written "
                             f"({error}); make room, then --resume") from error
        shutil.rmtree(final, ignore_errors=True)  # a broken one, which --resume passed over
        partial.rename(final)
        remove_old_checkpoints(final, state, keep)

    on_rank0(write)


def newest_checkpoint(out: Path) -> tuple[Path | None, RunState]:
    """The newest whole checkpoint, or None, and its state. Warns of damaged ones; InputError if
    none is whole, or if another version of this project has made the run."""

    def find():
        record, folder = out / "args.json", out / "checkpoints"
        saved = checkpoints_in(folder)[::-1]
        if record.exists() and read_json(record).get("format") != FORMAT:
            raise InputError(f"--resume: {out} was made by another version of this project; go on "
                             "with that one, or choose another --out")
        for path in saved:
            try:
                digests = read_json(path / "digests.json")
                if digests and all(digest(path / n) == value for n, value in digests.items()):
                    return path, RunState(**read_json(path / "state.json"))
            except (OSError, InputError, TypeError):
                pass  # as good as another digest
            print0(f"warning: {path} is damaged, trying the one before")
        if saved:
            raise InputError(f"--resume: no checkpoint in {out} is whole; choose another --out")
        if (out / "log.jsonl").exists() and not record.exists():
            raise InputError(f"--resume: {out} has a log.jsonl, but neither args.json nor a "
                             "checkpoint; choose another --out")
        return None, RunState()

    return of_rank0(on_rank0(find))


def checkpoints_in(folder: Path) -> list[Path]:
    """Those of a run, whole or not, in order; without copies by hand under another number."""

    def is_copy(path: Path) -> bool:
        try:
            is_whole = read_json(path / "digests.json")["state.json"] == digest(path / "state.json")
            return is_whole and read_json(path / "state.json")["step"] != int(path.name[-6:])
        except (OSError, InputError, KeyError):
            return False  # broken

    return [path for path in sorted(folder.glob(CHECKPOINT)) if not is_copy(path)]


def load_optimizer(checkpoint: Path, model, optimizer) -> None:
    """Load the optimizer's state from a checkpoint, if it had one."""
    path = checkpoint / "optimizer.pt"
    if path.exists():
        flags = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        moments = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state_dicts.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        optimizer.param_groups[0].update(flags)  # they win over those of the checkpoint
        for state in optimizer.state.values():  # copies: the file may be deleted, not stay mapped
            state.update({name: value.clone() for name, value in state.items()})


def remove_old_checkpoints(newest: Path, state: RunState, keep: int) -> None:
    """On rank 0: keep the newest `keep`, and one from before the last step with a right sample."""
    saved = checkpoints_in(newest.parent)
    older = [path for path in saved if path <= newest]  # --resume passed over the others
    kept = older[-keep:]
    if state.step > state.last_solved:  # the run may have diverged since
        kept += [path for path in older if path.name < f"step-{state.last_solved:06d}"][-1:]
    for path in set(saved) - set(kept):
        shutil.rmtree(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, which is first brought to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
