"""Bad input, a table of it: one line names the flag or file and the remedy, and nothing of the user's is touched."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import command, make_sample, run_script, slow
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

import eval as evaluation
import allocation_table
import grpo
import raft
from folder import FORMAT, claim_folder
from data import TOY, Problem, load_problems, sample_rows
from run import InputError, check_environment

MAINS = {"raft": raft.main, "grpo": grpo.main, "table": allocation_table.main, "eval": evaluation.main}
GOOD = json.dumps({"problem": "1+1", "answer": "2"}) + "\n"
SHORT = "--max-prompt-tokens 64 --max-response-tokens 8"
FEW = "--data few.jsonl --eval-data few.jsonl --prompts-per-step 2"  # for what is noticed late


# --- what lies in the folder where a script is started: functions of that folder --------------
def nothing(folder: Path) -> None:
    """As it is."""


def holds(name: str, content):
    """A file of this content: bytes, text, or rows for a .jsonl file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else content
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())

    return prepare


def has_folder(name: str):
    """An empty folder."""
    return lambda folder: (folder / name).mkdir(parents=True)


def damaged_parquet(folder: Path) -> None:
    """Its magic bytes are whole, and its pages zeros."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "a.parquet"
    rows = [{"problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])


def model(*damages):
    """A copy of the toy in `m`, damaged by functions of its folder."""

    def prepare(folder: Path) -> None:
        shutil.copytree(TOY, folder / "m", ignore=shutil.ignore_patterns("*.jsonl"))
        for damage in damages:
            damage(folder / "m")

    return prepare


def without(*names: str):
    """Files are missing."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def edits(name: str, **entries):
    """Entries of a JSON file are others."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return damage


config = partial(edits, "config.json")


def cut_weights(folder: Path) -> None:
    """As after a download that broke off."""
    os.truncate(folder / "model.safetensors", 300_000)


def weights(change):
    """The tensors of model.safetensors, a dictionary, are changed."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def put_nan(name: str):
    """One weight is NaN."""

    def change(tensors: dict) -> None:
        tensors[name][1, 1] = torch.nan

    return weights(change)


def token_beyond(special: bool):
    """A token whose id, 262, is not in the embedding."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        token = content["added_tokens"][0] | {"id": 400, "content": "<|far|>", "special": special}
        content["added_tokens"].append(token)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return damage


def random_model(config_class, **entries):
    """A tiny model of random weights, with the toy's tokenizer."""

    def damage(folder: Path) -> None:
        sizes = {"vocab_size": 262, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
                 "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        made = AutoModelForCausalLM.from_config(config_class(**sizes, **entries))
        made.save_pretrained(folder)

    return damage


OWN_CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
NO_WEIGHTS = without("model.safetensors")
LAYER = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NO_EOS = (config(eos_token_id=None), edits("generation_config.json", eos_token_id=None),
          edits("tokenizer_config.json", eos_token=None))


def template(text: str):
    """The chat template is this one."""
    return model(lambda folder: (folder / "chat_template.jinja").write_text(text))


def named_templates(*names: str):
    """Several chat templates, each shows its name."""
    return edits("tokenizer_config.json", chat_template=[
        {"name": name, "template": f"{name} {{{{ messages[1]['content'] }}}}"} for name in names])


def checkpoint(folder: Path) -> None:
    """A whole checkpoint of step 1, as raft.py leaves it."""
    from checkpoint import save_checkpoint
    from folder import RunState
    from conftest import flags
    from pretrained import load_model

    args = flags("--data", "few.jsonl")
    policy, tokenizer = load_model(args, torch.device("cpu"))
    optimizer = torch.optim.AdamW(policy.parameters())
    save_checkpoint(folder / "out", RunState(step=1), policy, optimizer, tokenizer, 1)


def damaged_checkpoint(folder: Path) -> None:
    """The only one, cut short."""
    checkpoint(folder)
    os.truncate(folder / "out" / "checkpoints" / "step-000001" / "model.safetensors", 1000)


def empty_record(folder: Path) -> None:
    """A whole checkpoint, beside an empty args.json."""
    checkpoint(folder)
    (folder / "out" / "args.json").touch()


def samples(change=lambda rows: rows):
    """s.jsonl, four samples of two problems as eval.py writes them, but changed."""

    def prepare(folder: Path) -> None:
        made = [make_sample(i // 2, 1.0, [5, 6]) for i in range(4)]
        for i, sample in enumerate(made):
            sample.index, sample.text = i % 2, "\\boxed{2}"
        rows = sample_rows(made, [Problem(0, "1+1", "2"), Problem(1, "3-1", "2")])
        holds("s.jsonl", change(rows))(folder)

    return prepare


def both(*prepares):
    """One after the other."""
    return lambda folder: [prepare(folder) for prepare in prepares]


# --- the table: name, what lies there, the command line, what the message must hold ------------
FLAGS = [
    ("unknown-flag", nothing, "raft --modle x", "unrecognized arguments: --modle x (see --help)"),
    ("unknown-flag-grpo", nothing, "grpo --group-size 4", "unrecognized arguments: --group-size"),
    ("unknown-flag-gvm", nothing, "table --out t --steps 4", "unrecognized arguments: --steps"),
    ("unknown-flag-eval", nothing, "eval --data d --k 4", "unrecognized arguments: --k"),
    ("loose-word", nothing, "raft resume", "unrecognized arguments: resume"),
    ("abbreviation", nothing, "raft --step 4", "unrecognized arguments: --step"),
    ("abbreviation-eval", nothing, "eval --data d --resc x", "unrecognized arguments: --resc"),
    ("no-value", nothing, "raft --lr", "argument --lr: expected one argument"),
    ("no-value-before-flag", nothing, "raft --lr --steps 3", "argument --lr: expected one argument"),
    ("value-for-a-switch", nothing, "raft --resume=yes", "argument --resume: ignored explicit argument"),
    ("word-for-int", nothing, "raft --steps many", "argument --steps: invalid int value: 'many'"),
    ("float-for-int", nothing, "raft --steps 1.5", "argument --steps: invalid int value: '1.5'"),
    ("exponent-for-int", nothing, "raft --seed 1e3", "argument --seed: invalid int value: '1e3'"),
    ("word-for-float", nothing, "raft --lr small", "argument --lr: invalid float value: 'small'"),
    ("comma-for-point", nothing, "raft --lr 0,1", "argument --lr: invalid float value: '0,1'"),
    ("empty-int", nothing, "raft --steps ''", "argument --steps: invalid int value: ''"),
    ("empty-float", nothing, "raft --lr ''", "argument --lr: invalid float value: ''"),
    ("line-break", nothing, "raft --steps '1\n2'", "argument --steps: invalid int value"),
    ("line-break-in-an-unknown-flag", nothing, "raft '--st\neps' 1", "unrecognized arguments"),
    ("zero-steps", nothing, "raft --steps 0", "argument --steps: 0: must be finite, and from 1"),
    ("negative-steps", nothing, "raft --steps -3", "argument --steps: -3: must be finite, and from 1"),
    ("steps-of-20-digits", nothing, "raft --steps 99999999999999999999", "argument --steps: "),
    ("steps-of-5000-digits", nothing, f"raft --steps {'7' * 5000}", "argument --steps: "),
    ("tokens-of-20-digits", nothing, "raft --max-prompt-tokens 99999999999999999999", "--max-prompt-tokens"),
    ("prompts-of-20-digits", nothing, "raft --prompts-per-step 99999999999999999999", "--prompts-per-step"),
    ("seed-of-20-digits", nothing, "raft --seed 99999999999999999999", "argument --seed: "),
    ("negative-seed", nothing, "raft --seed -1", "argument --seed: -1: must be finite, and from 0 to 4294967295"),
    ("lr-nan", nothing, "raft --lr nan", "argument --lr: nan: must be finite, and from 0"),
    ("lr-inf", nothing, "raft --lr inf", "argument --lr: inf: must be finite, and from 0"),
    ("lr-1e309", nothing, "raft --lr 1e309", "argument --lr: 1e309: must be finite, and from 0"),
    ("lr-negative", nothing, "raft --lr -0.1", "argument --lr: -0.1: must be finite, and from 0"),
    ("lr-minus-inf", nothing, "raft --lr=-inf", "argument --lr: -inf: must be finite, and from 0"),
    ("kl-nan", nothing, "raft --kl-coef nan", "argument --kl-coef: nan: must be finite, and from 0"),
    ("clip-negative", nothing, "raft --clip-low -1", "argument --clip-low: -1: must be finite, and from 0"),
    ("clip-inf", nothing, "grpo --clip-high inf", "argument --clip-high: inf: must be finite, and from 0"),
    ("is-below-1", nothing, "raft --truncated-is 0.5", "argument --truncated-is: 0.5: must be finite, and from 1"),
    ("grad-clip-0", nothing, "raft --grad-clip 0", "argument --grad-clip: 0: must be finite, and from 1e-06"),
    ("alpha-nan", nothing, "raft --alpha nan", "argument --alpha: nan: must be finite, and from 0"),
    ("beta-1", nothing, "table --out t --beta 1", "argument --beta: 1: must be finite, and from 2"),
    ("temperature-0", nothing, "raft --temperature 0", "argument --temperature: 0: must be finite, and from 0.001"),
    ("temperature-nan", nothing, "eval --data d --temperature nan", "argument --temperature: nan"),
    ("eval-temperature-negative", nothing, "raft --eval-temperature -1", "argument --eval-temperature: -1"),
    ("memory-2", nothing, "raft --vllm-memory 2", "argument --vllm-memory: 2: must be finite, and from 0.01 to 1"),
    ("allocator", nothing, "raft --allocator best", "argument --allocator: invalid choice: 'best' (choose from"),
    ("allocator-empty", nothing, "raft --allocator ''", "argument --allocator: invalid choice: ''"),
    ("objective", nothing, "raft --objective ppo", "argument --objective: invalid choice: 'ppo'"),
    ("loss", nothing, "grpo --loss RAFT", "argument --loss: invalid choice: 'RAFT'"),
    ("weighting", nothing, "raft --weighting none", "argument --weighting: invalid choice"),
    ("advantage", nothing, "grpo --advantage mean", "argument --advantage: invalid choice"),
    ("cost-is-gone", nothing, "table --out t --cost tokens", "unrecognized arguments: --cost tokens"),
    ("predict-is-gone", nothing, "grpo --predict", "unrecognized arguments: --predict"),
    ("sampler", nothing, "eval --data d --sampler sglang", "argument --sampler: invalid choice"),
    ("fsdp-hf", holds("few.jsonl", 2 * GOOD), f"raft {FEW} --updates-per-step 1 --fsdp", "--fsdp: transformers wants"),
    ("no-out", nothing, "table", "the following arguments are required: --out"),
    ("table-of-uniform", nothing, "table --out t --allocator uniform", "this table shows a pilot, and --allocator uniform"),
    ("table-of-predictions", nothing, "table --out t --candidates-per-step 16", "this table shows a pilot, and --allocator"),
    ("no-data", nothing, "eval", "one of the arguments --data --rescore is required"),
    ("data-and-rescore", nothing, "eval --data d --rescore f", "--rescore: not allowed with argument --data"),
    ("budget-below-pilot", nothing, "raft --pilot-samples 9", "--samples-per-prompt is below --pilot-samples"),
    *[(f"huge-{flag}", nothing, f"raft --{flag} 1e300", f"argument --{flag}: 1e300: must be finite, and from {range_}")
      for flag, range_ in {
          "lr": "0 to 1", "weight-decay": "0 to 1000", "grad-clip": "1e-06 to 1000000000", "clip-low": "0 to 1",
          "clip-high": "0 to 1000000", "kl-coef": "0 to 1000", "truncated-is": "1 to 1000000", "alpha": "0 to 1000",
          "beta": "2 to 100", "temperature": "0.001 to 100", "eval-temperature": "0 to 100"}.items()],
    ("huge-temperature-eval", nothing, "eval --data d --temperature 1e300", "argument --temperature: 1e300: must be finite"),
    ("groups-of-one", nothing, "grpo --allocator uniform --samples-per-prompt 1",
     "--samples-per-prompt: --objective grpo learns nothing from fewer than 2 samples of a prompt; raise it"),
    ("groups-of-one-by-the-pilot", nothing, "grpo --pilot-samples 1 --samples-per-prompt 1", "fewer than 2 samples of a"),
    ("groups-of-one-by-prediction", nothing, "grpo --candidates-per-step 4 --prompts-per-step 1 --samples-per-prompt 1",
     "--samples-per-prompt: --objective grpo learns nothing from fewer than 2 samples of a prompt"),
    ("budget-below-the-pilot-of-two", nothing, "raft --samples-per-prompt 1", "--samples-per-prompt is below --pilot-samples"),
    ("pilot-of-none", nothing, "raft --pilot-samples 0", "argument --pilot-samples: 0: must be finite, and from 1"),
    ("budget-below-pilot-gvm", nothing, "table --out t --pilot-samples 9", "--samples-per-prompt is below"),
    ("window-of-predictions", nothing, "raft --e-step-every 2 --candidates-per-step 32", "no pilot is taken with --candidates"),
    ("pilot-and-predictions", nothing, "grpo --pilot-samples 2 --candidates-per-step 32", "no pilot is taken with --candidates"),
    ("pilot-of-uniform", nothing, "raft --allocator uniform --pilot-samples 2", "no pilot is taken with --allocator uniform"),
    ("window-of-uniform", nothing, "raft --allocator uniform --e-step-every 2", "no pilot is taken with --allocator uniform"),
    ("candidates-of-uniform", nothing, "grpo --allocator uniform --candidates-per-step 32",
     "--candidates-per-step: --allocator uniform does not look at p; leave one"),
    ("candidates-below-prompts", nothing, "raft --candidates-per-step 8", "--prompts-per-step: from --updates-per-step"),
    ("candidates-above-data", holds("few.jsonl", GOOD * 3), f"raft {FEW} --candidates-per-step 4",
     "--candidates-per-step, if set, which is at most 3, the number of problems"),
    ("prompts-above-data", holds("few.jsonl", GOOD * 3), "raft --data few.jsonl --eval-data few.jsonl",
     "--prompts-per-step: from --updates-per-step to --candidates-per-step, if set, which is at most 3, the number"),
    ("updates-above-prompts", holds("few.jsonl", GOOD * 3), f"raft {FEW} --updates-per-step 3",
     "--prompts-per-step: from --updates-per-step to"),
    ("prompts-too-long", holds("few.jsonl", GOOD * 3), f"raft {FEW} --max-prompt-tokens 2",
     "few.jsonl: every prompt is longer than --max-prompt-tokens 2"),
    ("prompts-above-data-with-answers", both(holds("few.jsonl", GOOD * 3), holds("a.jsonl", GOOD * 3 + '{"problem": "1+1"}')),
     "raft --data a.jsonl --eval-data few.jsonl --prompts-per-step 4", "which is at most 3, the number of problems"),
    ("eval-prompts-too-long", both(holds("few.jsonl", GOOD * 3), holds("e.jsonl", GOOD.replace("1+1", "1+1" * 99))),
     "raft --data few.jsonl --eval-data e.jsonl --prompts-per-step 2", "e.jsonl: every prompt is longer than --max"),
    ("above-the-context", nothing, "raft --max-response-tokens 449", "is above the model's context of 512 tokens"),
    ("above-the-context-eval", nothing, f"eval --data {TOY}/eval.jsonl", "is above the model's context of 512"),
]
BAD = "raft --eval-data few.jsonl --data"
DATA = [
    ("missing", nothing, f"{BAD} no.jsonl", "no.jsonl: no such file"),
    ("missing-eval-data", holds("few.jsonl", GOOD), "raft --data few.jsonl --eval-data no.json", "no.json: no such"),
    ("missing-eval", nothing, "eval --data no.jsonl --max-prompt-tokens 9 --max-response-tokens 9",
     "no.jsonl: no such"),
    ("missing-gvm", nothing, "table --out t --data no.parquet", "no.parquet: no such file"),
    ("a-folder", has_folder("d.jsonl"), f"{BAD} d.jsonl", "d.jsonl: is a directory"),
    ("a-folder-without-suffix", has_folder("d"), f"{BAD} d", "'d': neither"),
    ("a-file-without-suffix", holds("d", GOOD), f"{BAD} d", "'d': neither"),
    ("other-suffix", holds("d.csv", "problem,answer\n1+1,2\n"), f"{BAD} d.csv", "'d.csv': neither"),
    ("empty-name", nothing, f"{BAD} ''", "'': neither a "),
    ("slash", nothing, f"{BAD} /", "'/': neither a "),
    ("colon", nothing, f"{BAD} :", "':': neither a "),
    ("line-break-in-name", nothing, f"{BAD} 'a\nb'", "neither a "),
    ("line-break-in-file-name", nothing, f"{BAD} 'a\nb.jsonl'", "no such file"),
    ("null-byte", nothing, f"{BAD} 'a\0b.jsonl'", "null byte"),
    ("long-name", nothing, f"{BAD} {'x' * 300}.jsonl", "file name too long"),
    ("unknown-hub-name", nothing, f"{BAD} nobody/nothing", "'nobody/nothing': neither"),
    ("benchmark", nothing, f"{BAD} math500", "--data math500: is there to evaluate"),
    ("benchmark-out-of-reach", nothing, "eval --data aime24,math500 --max-prompt-tokens 9 --max-response-tokens 9",
     "nor a hub data set in reach"),
    ("two-of-one-name", nothing, "eval --data a/x.jsonl,b/x.jsonl", "two end alike"),
    ("comma-at-the-end", holds("a.jsonl", GOOD), "eval --data a.jsonl, --max-prompt-tokens 64 --max-response-tokens 64",
     "'': neither"),
    ("bytes", holds("a.jsonl", b'{"problem": "\xff", "answer": "1"}'), f"{BAD} a.jsonl", "a.jsonl: 'utf-8' codec"),
    ("utf-16", holds("a.jsonl", GOOD.encode("utf-16")), f"{BAD} a.jsonl", "a.jsonl: 'utf-8' codec can't decode"),
    ("parquet", holds("a.parquet", b"PAR1" + b"x" * 99), f"{BAD} a.parquet", "a.parquet: "),
    ("parquet-pages", damaged_parquet, f"{BAD} a.parquet", "a.parquet: "),
    ("parquet-empty", holds("a.parquet", b""), f"{BAD} a.parquet", "a.parquet: "),
    ("json", holds("a.jsonl", GOOD + '{"problem": '), f"{BAD} a.jsonl", "a.jsonl: line 2 is not readable JSON"),
    ("json-line", holds("a.json", '[{"problem": "q",\n"answer": }]'), f"{BAD} a.json",
     "a.json: line 2 is not readable"),
    ("json-nested", holds("a.jsonl", "[" * 100_000), f"{BAD} a.jsonl", "a.jsonl: line 1 is not readable JSON (max"),
    ("json-digits", holds("a.jsonl", GOOD + '{"problem": "q", "answer": ' + "7" * 5000 + "}"), f"{BAD} a.jsonl",
     "a.jsonl: line 2 is not readable JSON"),
    ("half-a-character", holds("a.jsonl", [{"problem": "\ud800", "answer": "1"}]), f"{BAD} a.jsonl",
     "a.jsonl: row 1 has nothing readable in 'problem'"),
    ("half-a-character-answer", holds("a.jsonl", [{"problem": "q", "answer": "\ud800"}]), f"{BAD} a.jsonl",
     "a.jsonl: row 1 has nothing readable in 'answer'"),
    ("no-columns", holds("a.jsonl", [{}]), f"{BAD} a.jsonl", "a.jsonl: has columns []; needs one of"),
    ("no-question", holds("a.jsonl", [{"text": "q", "answer": "1"}]), f"{BAD} a.jsonl", "needs one of ('problem', "),
    ("no-answer", holds("a.jsonl", [{"problem": "q"}]), f"{BAD} a.jsonl", "needs one of ('answer', "),
    ("half-a-character-column", holds("a.jsonl", [{"\ud800": 1}]), f"{BAD} a.jsonl", "needs one of ('problem', "),
    ("empty", holds("a.jsonl", ""), f"{BAD} a.jsonl", "a.jsonl: must hold rows"),
    ("blank", holds("a.jsonl", "\n \n"), f"{BAD} a.jsonl", "a.jsonl: must hold rows"),
    ("empty-json", holds("a.json", ""), f"{BAD} a.json", "a.json: must hold rows"),
    ("empty-list", holds("a.json", "[]"), f"{BAD} a.json", "a.json: must hold rows"),
    ("lists", holds("a.jsonl", [["q", "1"]]), f"{BAD} a.jsonl", "a.jsonl: must hold rows, each an object"),
    ("numbers", holds("a.jsonl", [1, 2]), f"{BAD} a.jsonl", "a.jsonl: must hold rows, each an object"),
    ("nulls", holds("a.jsonl", [None]), f"{BAD} a.jsonl", "a.jsonl: must hold rows, each an object"),
    ("null-question", holds("a.jsonl", [{"problem": None, "answer": "1"}]), f"{BAD} a.jsonl", "row 1 has nothing"),
    ("number-question", holds("a.jsonl", [{"problem": 5, "answer": "1"}]), f"{BAD} a.jsonl", "row 1 has nothing"),
    ("blank-question", holds("a.jsonl", [{"problem": " ", "answer": "1"}]), f"{BAD} a.jsonl", "row 1 has nothing"),
    ("null-answers", holds("a.jsonl", GOOD + 2 * '{"problem": "q", "answer": null}\n'), f"{BAD} a.jsonl",
     "a.jsonl: row 2 has nothing readable in 'answer'; its columns: ['problem', 'answer']; 2 of 3 rows"),
    ("proofs", holds("a.jsonl", GOOD + 2 * '{"problem": "q", "answer": "proof"}\n'), f"{BAD} a.jsonl", "row 2 has nothing"),
    ("null-answer-to-evaluate",
     both(holds("few.jsonl", GOOD * 3), holds("a.jsonl", GOOD + '{"problem": "q", "answer": null}')), "raft --data few.jsonl --eval-data a.jsonl", "a.jsonl: row 2 has nothing readable in 'answer'"),
    ("null-answer-eval", holds("a.jsonl", GOOD * 9 + '{"problem": "q", "answer": null}'),
     f"eval --data a.jsonl {SHORT}",
     "a.jsonl: row 10 has nothing readable in 'answer'; its columns: ['problem', 'answer']; 1 of 10 rows: mend them"),
    ("proof-eval", holds("a.json", GOOD + '{"problem": "q", "answer": "proof"}'),
     f"eval --data a.json {SHORT}", "a.json: row 2 has nothing readable in 'answer'"),
    ("json-lines", holds("a.json", GOOD + '{"problem": '), f"{BAD} a.json", "a.json: line 2 is not readable JSON"),
    *[(f"pipe{suffix}", lambda folder, n=f"p{suffix}": os.mkfifo(folder / n), f"{BAD} p{suffix}",
       f"p{suffix}: is a pipe or a device; save what it holds in a file") for suffix in (".jsonl", ".json", ".parquet")],
    ("pipe-without-suffix", lambda folder: os.mkfifo(folder / "p"), f"{BAD} p", "'p': neither"),
    ("pipe-eval", lambda folder: os.mkfifo(folder / "p.jsonl"), "eval --rescore p.jsonl", "p.jsonl: is a pipe or a device"),
    ("device", lambda folder: (folder / "s.jsonl").symlink_to("/dev/zero"), f"{BAD} s.jsonl",
     "s.jsonl: is a pipe or a device"),
    ("nan-answer", holds("a.jsonl", '{"problem": "q", "answer": NaN}'), f"{BAD} a.jsonl", "row 1 has nothing"),
    ("object-answer", holds("a.jsonl", [{"problem": "q", "answer": {}}]), f"{BAD} a.jsonl", "row 1 has nothing"),
    ("solution-without-a-box", holds("a.jsonl", [{"problem": "q", "solution": "It is 2."}]), f"{BAD} a.jsonl",
     "row 1 has nothing readable in 'solution'"),
]
BAD = "table --out t --limit 2 --model"
MODELS = [
    ("missing", nothing, "raft --model no", "--model no: cannot be loaded (no such folder"),
    ("missing-eval", nothing, "eval --data d --model no", "--model no: cannot be loaded (no such folder"),
    ("missing-gvm", nothing, f"{BAD} no/such/folder/here", "--model no/such/folder/here: cannot be loaded (no such"),
    ("empty-name", nothing, f"{BAD} ''", "--model "),
    ("line-break", nothing, f"{BAD} 'a\nb'", "cannot be loaded"),
    ("a-file", holds("m", GOOD), f"{BAD} m", "--model m: cannot be loaded"),
    ("empty-folder", has_folder("m"), f"{BAD} m", "--model m: cannot be loaded"),
    ("no-config", model(without("config.json")), f"{BAD} m", "--model m: "),
    ("config-list", model(lambda m: (m / "config.json").write_text("[]")), f"{BAD} m", "--model m: cannot be loaded"),
    ("config-empty", model(lambda m: (m / "config.json").write_text("")), f"{BAD} m", "--model m: cannot be loaded"),
    ("config-no-type", model(lambda m: (m / "config.json").write_text("{}")), f"{BAD} m",
     "--model m: cannot be loaded"),
    ("config-architecture", model(config(model_type="gpt9")), f"{BAD} m", "gpt9"),
    ("config-encoder", model(config(model_type="vit", architectures=["ViTModel"])), f"{BAD} m", "--model m: cannot be"),
    ("config-gptq", model(config(quantization_config={"quant_method": "gptq", "bits": 4})), f"{BAD} m", "--model m: "),
    ("config-bitsandbytes", model(config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
     f"{BAD} m", "--model m: "),
    ("config-sizes", model(config(hidden_size=64)), f"{BAD} m", "--model m: "),
    ("config-type", model(config(hidden_size="wide")), f"{BAD} m", "--model m: cannot be loaded"),
    ("config-more-layers", model(config(num_hidden_layers=4, layer_types=["full_attention"] * 4)), f"{BAD} m",
     "--model m: its files lack tensors of the model (model.layers.3."),
    ("no-weights", model(NO_WEIGHTS), f"{BAD} m", "--model m: cannot be loaded"),
    ("weights-cut", model(cut_weights), f"{BAD} m", "--model m: cannot be loaded"),
    ("weights-zeros", model(lambda m: (m / "model.safetensors").write_bytes(bytes(1_000_000))), f"{BAD} m",
     "--model m: cannot be loaded"),
    ("weights-empty", model(lambda m: (m / "model.safetensors").write_bytes(b"")), f"{BAD} m", "--model m: cannot be"),

     ("weights-lfs", model(lambda m: (m / "model.safetensors").write_text("version https://git-lfs")),
     f"{BAD} m", "--model m: cannot be loaded"),
    ("weights-lack-one", model(weights(lambda t: t.pop(LAYER))), f"{BAD} m",
     f"lack tensors of the model ({LAYER}, 1 in"),
    ("weights-lack-all", model(weights(lambda t: (t.clear(), t.update(x=torch.zeros(1))))), f"{BAD} m", "lack tensors"),
    ("weights-shape", model(weights(lambda t: t.update({LAYER: torch.zeros(5, 5)}))), f"{BAD} m", "--model m: "),
    ("headless", model(config(tie_word_embeddings=False)), f"{BAD} m", "lack tensors of the model (lm_head.weight, 1"),
    ("weight-nan", model(put_nan(LAYER)), f"{BAD} m", f"--model m: holds NaN or infinity ({LAYER}, 1 in all); get it again"),
    ("embedding-nan", model(put_nan(EMBEDDING)), "raft --model m", f"holds NaN or infinity ({EMBEDDING}"),
    ("pickle", model(NO_WEIGHTS, lambda m: (m / "pytorch_model.bin").write_bytes(b"junk" * 99)), f"{BAD} m",
     "--model m: cannot be loaded"),
    ("pickle-empty", model(NO_WEIGHTS, lambda m: (m / "pytorch_model.bin").touch()), f"{BAD} m",
     "--model m: cannot be"),
    ("index-names-no-file", model(NO_WEIGHTS, holds("model.safetensors.index.json", json.dumps(
        {"metadata": {}, "weight_map": {LAYER: "model-00001-of-00002.safetensors"}}))), f"{BAD} m",
     "--model m: cannot be"),
    ("no-tokenizer", model(without("tokenizer.json")), f"{BAD} m", "--model m: "),
    ("no-tokenizer-at-all", model(without("tokenizer.json", "tokenizer_config.json")), f"{BAD} m",
     "the prompt is empty"),
    ("tokenizer-broken", model(lambda m: (m / "tokenizer.json").write_text("{")), f"{BAD} m", "--model m: cannot be"),
    ("tokenizer-empty", model(lambda m: (m / "tokenizer.json").write_text("{}")), f"{BAD} m", "--model m: cannot be"),
    ("tokenizer-config-broken", model(lambda m: (m / "tokenizer_config.json").write_text("{")), f"{BAD} m",
     "--model m"),
    ("tokenizer-beyond", model(token_beyond(special=False)), f"{BAD} m",
     "its tokenizer has the id 262, but the model knows 262"),
    ("token-of-the-template-beyond", model(token_beyond(special=True), lambda m: (m / "chat_template.jinja").write_text(
        "<|far|>{{ messages[1]['content'] }}")), f"{BAD} m", "its tokenizer has the id 262, but the model knows 262"),
    ("token-of-a-question-beyond", both(model(token_beyond(special=True)), holds("few.jsonl", GOOD * 2 + GOOD.replace(
        "1+1", "1+<|far|>"))), f"raft --model m {FEW}", "--model: knows no token 262, which is in the question '1+<|far|>'"),
    ("token-of-a-question-beyond-eval",
     both(model(token_beyond(special=True)), holds("few.jsonl", GOOD.replace("1+1", "<|far|>"))), f"eval --model m --data few.jsonl {SHORT}", "--model: knows no token 262, which is in the question '<|far|>'; leave"),
    ("own-code-config", model(config(model_type="mine", auto_map=OWN_CODE)), f"{BAD} m", "--model m: needs code of its own"),
    ("own-code-model", model(config(model_type="vit", auto_map=OWN_CODE)), f"{BAD} m", "--model m: needs code of its own"),
    ("own-code-tokenizer", model(config(model_type="vit"), edits("tokenizer_config.json", tokenizer_class="Mine", auto_map={
        "AutoTokenizer": ["code.Mine", None]})), "raft --model m", "--model m: needs code of its own, which is never run here"),
    ("own-code-of-another", model(config(model_type="mine", auto_map={"AutoConfig": "a/b--code.Config"})), "raft --model m",
     "--model m: needs code of its own, which is never run here; choose a model that transformers knows"),
    ("pipe", model(without("config.json"), lambda m: os.mkfifo(m / "config.json")), f"{BAD} m", "m/config.json: is a pipe"),
    ("pipe-for-a-folder", lambda folder: os.mkfifo(folder / "m"), f"{BAD} m", "--model m: cannot be loaded"),
    ("no-eos", model(*NO_EOS), f"{BAD} m", "--model m: has no end-of-sequence token"),
    ("eos-beyond", model(config(eos_token_id=999), edits("generation_config.json", eos_token_id=[1, 999])), f"{BAD} m",
     "the id 999, but the model knows 262 tokens"),
    ("eos-word", model(config(eos_token_id="end"), edits("generation_config.json", eos_token_id="end")), f"{BAD} m",
     "--model m: "),
    ("eos-negative", model(edits("generation_config.json", eos_token_id=-1)), f"{BAD} m", "--model m: "),
    ("template-broken", template("{% for m in messages %}"), f"{BAD} m", "--model: its chat template fails"),
    ("template-system", template("{{ raise_exception('System role not supported') }}"), "raft --model m",
     "--model: its chat template fails (System role not supported)"),
    ("templates-without-a-default", model(without("chat_template.jinja"), named_templates("rag", "tool_use")), f"{BAD} m",
     "--model m: has chat templates named ['rag', 'tool_use'], and no default; rename one to default"),
    ("template-empty", template("{# nothing #}"), f"{BAD} m", "chat template fails (the prompt is empty)"),
    ("template-same", template("{{ messages[0]['content'] }}"), f"{BAD} m", "cannot tell questions apart"),
    ("template-zero", template("{{ 1 / 0 }}"), f"{BAD} m", "--model: its chat template fails"),
    ("template-message", template("{{ raise_exception('one\n\ntwo') }}"), f"{BAD} m",
     "--model: its chat template fails"),
    ("template-no-message", template("{{ raise_exception('') }}"), f"{BAD} m", "--model: its chat template fails"),
    ("cohere", model(random_model(CohereConfig, logit_scale=0.0625)), f"{BAD} m", "scales or caps its logits"),
    ("gemma", model(random_model(Gemma2Config, final_logit_softcapping=30.0)), f"{BAD} m", "scales or caps its logits"),
]
COLUMNS = tuple(evaluation.COLUMNS)
RESCORE = "eval --rescore s.jsonl"
FEW_ROWS = holds("few.jsonl", GOOD * 3)
FOLDERS = [
    ("out-holds-a-run", holds("out/args.json", "{}"), "raft --out out", "--out out: holds a run already; --resume"),
    ("out-holds-a-run-by-default", holds("runs/grpo-gvm-0/args.json", "{}"), "grpo", "holds a run already"),
    ("out-holds-an-evaluation", holds("out/protocol.json", "{}"), "eval --data d --out out", "holds a run already"),
    ("out-is-a-file", holds("out", GOOD), "raft --out out", "--out"),
    ("out-is-below-a-file", holds("a", GOOD), "raft --out a/out", "--out"),
    ("out-is-a-file-eval", holds("out", GOOD), "eval --data d --out out", "--out"),
    ("out-too-long", nothing, f"raft --out {'x' * 300}", "File name too long"),
    ("out-too-long-gvm", nothing, f"table --out {'x' * 300}", "--out"),
    ("out-below-a-file-gvm", holds("a", GOOD), "table --limit 2 --out a/t.jsonl", "--out"),
    ("out-exists-gvm", holds("t.jsonl", GOOD), "table --out t.jsonl",
     "--out t.jsonl: exists already; choose another name"),
    ("out-is-a-folder-gvm", has_folder("t"), "table --out t", "--out t: exists already"),
    ("out-empty-gvm", nothing, "table --out ''", "--out"),
    ("all-checkpoints-damaged", both(FEW_ROWS, damaged_checkpoint), f"raft {FEW} --out out --resume",
     "--resume: no checkpoint in out is whole; choose another --out"),
    ("checkpoint-is-a-file", both(FEW_ROWS, holds("out/checkpoints/step-000001", "")), f"raft {FEW} --out out --resume",
     "--resume: no checkpoint in out is whole"),
    ("record-empty", both(FEW_ROWS, empty_record), f"raft {FEW} --out out --resume",
     "out/args.json: is damaged; restore"),
    ("record-list", holds("out/args.json", "[1]"), "raft --out out --resume", "out/args.json: is damaged; restore it"),
    ("record-flags-list", holds("out/args.json", f'{{"format": {FORMAT}, "flags": [1]}}'), "raft --out out --resume",
     "out/args.json: is damag"),
    ("record-of-the-version-before", holds("out/args.json", '{"format": 2, "flags": {}}'), "raft --out out --resume",
     "--resume: out was made by another version of this project"),
    ("record-of-another-version", holds("out/args.json", '{"flags": {"predict": true}}'), "raft --out out --resume",
     "--resume: out was made by another version of this project; go on with that one, or choose another --out"),
    ("protocol-empty", both(FEW_ROWS, holds("out/protocol.json", "")),
     f"eval --data few.jsonl {SHORT} --out out --resume", "out/protocol.json: is damaged; restore it"),
    ("protocol-list", both(FEW_ROWS, holds("out/protocol.json", "[1]")),
     f"eval --data few.jsonl {SHORT} --out out --resume", "out/protocol.json: is damaged; restore it"),
    ("protocol-of-another", both(FEW_ROWS, holds("out/protocol.json", "{}")),
     f"eval --data few.jsonl {SHORT} --out out --resume", "--out out: was made with another"),
    ("rescore-missing", nothing, "eval --rescore no.jsonl", "no.jsonl: no such file"),
    ("rescore-folder", has_folder("s.jsonl"), RESCORE, "s.jsonl: is a directory"),
    ("rescore-empty", holds("s.jsonl", ""), RESCORE, "s.jsonl: "),
    ("rescore-problems", FEW_ROWS, "eval --rescore few.jsonl", "few.jsonl: line 1 is no sample; give a NAME.jsonl of"),
    ("rescore-lists", holds("s.jsonl", [[1]]), RESCORE, "s.jsonl: line 1 is no sample"),
    *[(f"rescore-without-{name}",
     samples(lambda rows, n=name: [*rows[:3], {k: v for k, v in rows[3].items() if k != n}]),
       RESCORE, "s.jsonl: line 4 is no sample") for name in COLUMNS],
    ("rescore-score-text", samples(lambda rows: [rows[0] | {"score": "1"}, *rows[1:]]), RESCORE, "line 1 is no sample"),
    ("rescore-score-nan", samples(lambda rows: [rows[0] | {"score": float("nan")}, *rows[1:]]), RESCORE,
     "line 1 is no"),
    ("rescore-index-float", samples(lambda rows: [rows[0] | {"index": 0.0}, *rows[1:]]), RESCORE,
     "line 1 is no sample"),
    ("rescore-tokens-bool", samples(lambda rows: [rows[0] | {"tokens": True}, *rows[1:]]), RESCORE,
     "line 1 is no sample"),
    ("rescore-twice", samples(lambda rows: rows + rows[:1]), RESCORE,
     "s.jsonl: holds a sample twice; choose another file"),
    ("rescore-uneven", samples(lambda rows: rows[:3]), RESCORE,
     "s.jsonl: is empty, or uneven over problems; --resume it first"),
    ("rescore-protocol-list", both(samples(), holds("protocol.json", "[1]")), RESCORE, "protocol.json: is damaged"),
    ("rescore-out-holds", both(samples(), holds("out/protocol.json", "{}")), f"{RESCORE} --out out",
     "holds a run already"),
    ("rescore-out-is-a-file", both(samples(), holds("out", GOOD)), f"{RESCORE} --out out", "--out"),
    ("rescore-into-itself", samples(), f"{RESCORE} --out .", "--out"),
]
PARTS = {"flag": FLAGS, "data": DATA, "model": MODELS, "folder": FOLDERS}
ROWS = {f"{part}-{row[0]}": row[1:] for part, rows in PARTS.items() for row in rows}
TABLE = [pytest.param(*row, id=name) for name, row in ROWS.items()]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below, and its bytes; None for folders."""
    paths = [path for path in folder.rglob("*") if path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def assert_untouched(folder: Path, before: dict) -> None:
    """Files are as before, and there is no new one; folders may have come."""
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert not [name for name in after.keys() - before.keys() if after[name] is not None]


@pytest.fixture(autouse=True)
def same_signals():
    """Training takes over signals; here it starts often, in one process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("prepare", "line", "named"), TABLE)
def test_bad_input_is_one_line(device, tmp_path, monkeypatch, prepare, line, named):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    before = contents(tmp_path)
    script, *words = shlex.split(line)
    with pytest.raises(InputError) as error:
        MAINS[script](words)
    message = str(error.value)
    assert named in message
    assert "\n" not in message or "\n" in line  # a name's own line break is folded when it is printed
    assert_untouched(tmp_path, before)


@pytest.mark.parametrize("name", ["data-missing", *map(slow, [
    "flag-lr-nan", "flag-allocator", "flag-no-out", "flag-line-break", "data-half-a-character", "data-json-nested",
    "model-missing", "model-weights-lack-one", "folder-out-holds-a-run", "folder-rescore-lists", "data-pipe.jsonl",
    "model-own-code-config",
])])
def test_users_see_one_line_and_exit_code_2(tmp_path, name):
    prepare, line, named = ROWS[name]
    prepare(tmp_path)
    before = contents(tmp_path)
    script, *words = shlex.split(line)
    script = "tests/allocation_table" if script == "table" else script
    done = run_script(f"{script}.py", *words, check=False, cwd=tmp_path)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1
    assert "[y/N]" not in done.stdout  # nobody may be there to answer
    assert_untouched(tmp_path, before)


WHOLE_PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ENVIRONMENTS = {
    "ranks-alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but not LOCAL_RANK: unset it, or launch"),
    "rank-alone": ({"RANK": "1"}, "RANK is set in the environment, but not LOCAL_RANK"),
    "local-rank-alone": ({"LOCAL_RANK": "3"}, "LOCAL_RANK is set in the environment, but not MASTER_ADDR"),
    "rank-word": ({"RANK": "abc"}, "RANK is 'abc' in the environment, not a number from 0: unset it, or launch with torchrun"),
    "rank-empty": ({"RANK": ""}, "RANK is '' in the environment"),
    "rank-negative": ({"RANK": "-1"}, "RANK is '-1' in the environment"),
    "ranks-word": ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment, not a number from 1"),
    "ranks-none": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment, not a number from 1"),
    "local-ranks-none": ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0' in the environment, not a number from 1"),
    "local-rank-word": (WHOLE_PLACE | {"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment"),
    "port-word": ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x' in the environment"),
    "digits": ({"RANK": "7" * 5000}, "in the environment, not a number"),
    "rank-beyond": (WHOLE_PLACE | {"RANK": "1"}, "RANK is 1 in the environment, and WORLD_SIZE only 1"),
}


@pytest.fixture
def no_ranks(monkeypatch):
    """An environment without torchrun's words; what a test sets in it is gone after it."""
    for name in (*WHOLE_PLACE, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("words", "complaint"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_ranks_left_in_the_environment_are_named_at_once(no_ranks, words, complaint):
    for name, value in words.items():
        no_ranks.setenv(name, value)
    for argv in ([], ["--no-such-flag"]):
        with pytest.raises(InputError) as error:
            raft.main(argv)
        assert complaint in str(error.value)


@pytest.mark.parametrize("words", [
    {}, WHOLE_PLACE, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "8"},
    WHOLE_PLACE | {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}])
def test_other_environments_are_no_fault(no_ranks, words):
    for name, value in words.items():
        no_ranks.setenv(name, value)
    check_environment()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ranks-alone", "rank-alone", "rank-word", "local-ranks-none"])
def test_users_see_one_line_of_their_environment(tmp_path, no_ranks, name):
    words, complaint = ENVIRONMENTS[name]
    for variable, value in words.items():
        no_ranks.setenv(variable, value)
    done = run_script("raft.py", check=False, cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_in_use_is_refused(device, tmp_path):
    with claim_folder(tmp_path / "out", "args.json", resume=False):
        done = run_script("raft.py", "--out", "out", check=False, cwd=tmp_path)
    assert done.returncode == 2 and f"process {os.getpid()} is running there" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out" / "args.json").exists()


@pytest.mark.slow
def test_two_tables_at_once_do_not_mix(tmp_path):
    """Into a folder that is not there yet."""
    words = ["tests/allocation_table.py", "--limit", "4", "--out", str(tmp_path / "new" / "t.jsonl")]
    both = [subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    complaints = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], complaints
    refused = complaints[0] if both[0].returncode else complaints[1]
    assert "--out" in refused and refused.count("\n") == 1
    assert len((tmp_path / "new" / "t.jsonl").read_text().splitlines()) == 4


# --- what looks bad, and is not ---------------------------------------------------------------
def test_line_breaks_at_the_end_of_a_file_are_no_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n" * 200_000)
    start = time.monotonic()
    assert load_problems(str(tmp_path / "a.jsonl")) == [Problem(0, "1+1", "2")]
    assert time.monotonic() - start < 5  # half an hour, if it were quadratic


def test_half_a_character_in_a_response_is_graded_as_any_other(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    samples(lambda rows: [rows[0] | {"response": "\\boxed{\ud800}"}, *rows[1:]])(tmp_path)
    evaluation.main(["--rescore", "s.jsonl"])
    assert "1 of 4 scores differ" in capsys.readouterr().out


@pytest.mark.slow
def test_an_ascii_terminal_gets_its_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    samples()(tmp_path)
    assert "| benchmark |" in run_script("eval.py", "--rescore", "s.jsonl", cwd=tmp_path).stdout
