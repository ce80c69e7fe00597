"""Make the toy: a tiny language model that makes mistakes, and the problems it makes them on.

    python tests/make_toy.py            # writes tests/toy/, in about twenty minutes on one core
    python tests/make_toy.py --mixes    # only the training files, for the model there; in eleven

The project's scripts run on this toy unless told otherwise, so it has to show on a CPU, in minutes,
what the methods are about. Three things make that possible:

- The model first *learns* arithmetic and is then tuned on chains that contain slips. The right
  answer stays within reach, and training on its own right samples brings it back quickly; a model
  that is merely under-trained improves far more slowly.
- A problem has many right chains of thought, because the terms are combined in a random order:
  `7+15-4` is `15-4=11;11+7=18;\\boxed{18}` or `7+15=22;22-4=18;\\boxed{18}` or ... With one chain a
  problem all right samples would be the same text, and there would be nothing to choose between.
- Difficulty spreads as it does in real data: slips are rare in some operations and frequent in
  others, products of two-digit numbers are beyond the model, a few training answers are wrong.

There are three mixes to train on. In the usual one, train.jsonl, as in practice, most problems
teach nothing: 45 % are mastered, 25 % hopeless; in hard.jsonl 15 % and 60 %. In spared.jsonl nearly
all can be learned, so that little is left to save. Which problem is what is measured by sampling.
"""

import argparse
import math
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from toy_mixes import write_mixes, write_rows

OUT = Path(__file__).parent / "toy"
SEED = 0
SPARED_PROBLEMS, EVAL_PROBLEMS = 2000, 200
WRONG_REFERENCES = 0.035  # share of the training problems, as in scraped data sets
HARD_SHARE, PRODUCT_SHARE = 0.14, 0.25  # problems with a large product, with a small one
BATCH = 48  # chains an optimizer step
LEARN_STEPS, LEARN_LR = 2400, 5e-3
SLIP_STEPS, SLIP_LR = 600, 1e-3

# How often a result is off, by operation and by whether a digit is carried (or borrowed).
SLIP_RATES = {
    ("+", False): 0.002, ("+", True): 0.01,
    ("-", False): 0.30, ("-", True): 0.40,
    ("*", False): 0.40,
}
SLIP_SIZES = (-10, -2, -1, 1, 2, 10)

MIX_SEED = 1
FRESH_PROBLEMS = 60_000  # drawn to find short sums and large products among them

PAD, END, USER, ASSISTANT, UNKNOWN = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>"
BOXED = "\\boxed{"

# A prompt is USER question ASSISTANT. The system message and all but the first line of the user
# message are left out: the project appends an instruction in English there, which a model of
# single characters would have to read letter by letter.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'].split('\\n')[0] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END +
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


class Term(NamedTuple):
    """A signed number, or a signed product that is still to be worked out."""

    sign: int
    factors: tuple[int, ...]

    @property
    def value(self) -> int:
        return self.sign * math.prod(self.factors)


def draw_problem(rng: random.Random) -> list[Term]:
    """One to five terms, at most one of them a product, with a sum that is not negative."""
    kind = rng.random()
    if kind < HARD_SHARE:  # beyond the model: it never gets the table of 88 * 88 products by heart
        count, product = rng.randint(1, 2), (rng.randint(12, 99), rng.randint(12, 99))
    elif kind < HARD_SHARE + PRODUCT_SHARE:
        count, product = rng.randint(3, 4), (rng.randint(2, 9), rng.randint(2, 9))
    else:  # many short ones, for problems that are solved nearly always
        count, product = rng.choice((2, 2, 5)), None
    while True:
        numbers = [(rng.randint(1, rng.choice((9, 30))),) for _ in range(count)]
        if product:
            numbers[rng.randrange(count)] = product
        signs = [1] + [rng.choice((1, -1)) for _ in range(count - 1)]
        terms = [Term(sign, number) for sign, number in zip(signs, numbers)]
        gains = sum(term.value for term in terms if term.sign > 0)
        # Below 100 a model of this size learns to add in minutes.
        if sum(term.value for term in terms) >= 0 and (gains < 100 or kind < HARD_SHARE):
            return terms


def question(terms: list[Term]) -> str:
    """`[Term(1, (7,)), Term(-1, (2, 3))]` is `7-2*3`."""
    text = "".join("+-"[term.sign < 0] + "*".join(map(str, term.factors)) for term in terms)
    return text.removeprefix("+")


def slip_size(operator: str, a: int, b: int, result: int, final: int, rng: random.Random) -> int:
    """How far off a result is written: mostly 0. Neither it nor the `final` sum falls below 0."""
    carries = {"+": a % 10 + b % 10 > 9, "-": a % 10 < b % 10, "*": False}
    if rng.random() >= SLIP_RATES[operator, carries[operator]]:
        return 0
    sizes = [size for size in SLIP_SIZES if result + size > 0 and abs(size) <= final]
    return rng.choice(sizes or [0])


def write_chain(terms: list[Term], rng: random.Random, slips: bool) -> str:
    """One chain of thought: the product, then the terms in a random order; it goes on from a slip.

    It starts at a positive term and never falls below 0, so that no minus sign leads a number. A
    sum that is not negative can always be finished so: at worst by adding before subtracting.
    """
    values = [term.value for term in terms]
    steps = []

    def step(a: int, operator: str, b: int, result: int, final: int) -> int:
        """Write a step of a chain that heads for `final`; return its result, right or wrong."""
        if slips:
            result += slip_size(operator, a, b, result, final, rng)
        steps.append(f"{a}{operator}{b}={result};")
        return result

    for index, term in enumerate(terms):
        if len(term.factors) == 2:
            a, b = term.factors
            values[index] = term.sign * step(a, "*", b, a * b, sum(values))
    total = rng.choice([value for value in values if value > 0])
    values.remove(total)
    while values:
        value = rng.choice([value for value in values if total + value >= 0])
        total = step(total, "+-"[value < 0], abs(value), total + value, total + sum(values))
        values.remove(value)
    return "".join(steps) + BOXED + f"{total}}}"


def draw_rows(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Different problems with their answers, shuffled: the short ones run out as one draws."""
    answers: dict[str, int] = {}
    while len(answers) < count:
        terms = draw_problem(rng)
        answers[question(terms)] = sum(term.value for term in terms)
    rows = [{"problem": problem, "answer": str(answer)} for problem, answer in answers.items()]
    rng.shuffle(rows)
    return rows


def spoil_references(rows: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """Make a share of the answers wrong, so far off that no slip leads there; return their rows."""
    spoiled = rng.sample(rows, round(WRONG_REFERENCES * len(rows)))
    for row in spoiled:
        row["answer"] = str(int(row["answer"]) + rng.randint(25, 75))
    return spoiled


def build_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer without merges: one token a byte, and one for `\\boxed{`.

    AutoTokenizer gives every Qwen2 model this class, so a plainer one would not survive loading.
    """
    symbols = [PAD, END, UNKNOWN, USER, ASSISTANT] + sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[],
        pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT], chat_template=CHAT_TEMPLATE,
        padding_side="left", model_max_length=512, clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(BOXED, normalized=False)])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """Small and shallow, since a CPU samples with it; with two layers it learns far more slowly."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512,
        tie_word_embeddings=True, dtype=torch.float32,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); the usual 0.02 starts far more slowly
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def encode_batch(
    tokenizer: Qwen2Tokenizer, batch: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (batch, time), padded on the right; only the chain has labels."""
    pairs = [(tokenizer.encode(USER + problem + ASSISTANT), tokenizer.encode(chain + END))
             for problem, chain in batch]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(batch), width), tokenizer.pad_token_id)
    labels = torch.full((len(batch), width), -100)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt):end] = torch.tensor(answer)
    return ids, labels


def train(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rng: random.Random,
    held_out: set[str], steps: int, lr: float, slips: bool,
) -> None:
    """Supervised training on fresh problems, none of them held out; `lr` is the peak."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(steps):
        batch = []
        while len(batch) < BATCH:
            terms = draw_problem(rng)
            if question(terms) not in held_out:
                batch.append((question(terms), write_chain(terms, rng, slips)))
        ids, labels = encode_batch(tokenizer, batch)
        # Right padding under a causal mask needs no attention mask.
        logits = model(input_ids=ids).logits[:, :-1]  # (batch, time - 1, vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            phase = "slips" if slips else "learn"
            print(f"{phase} {step + 1:4d}/{steps}  loss {loss:.3f}", flush=True)


def make_model(rng: random.Random, held_out: set[str]) -> None:
    """Train the toy in both phases and write it."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, tokenizer, rng, held_out, LEARN_STEPS, LEARN_LR, slips=False)
    train(model, tokenizer, rng, held_out, SLIP_STEPS, SLIP_LR, slips=True)
    model.save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)


def mix_candidates(
    exam: list[dict], spared: list[dict], wrong: list[dict], rng: random.Random
) -> dict[str, list]:
    """Problems that may belong to each group of a mix; none of them is in the exam."""
    asked = {row["problem"] for row in exam}
    fresh = draw_rows(rng, FRESH_PROBLEMS)
    fresh = [row for row in fresh if row["problem"] not in asked]
    return {
        "wrong reference": wrong,
        "middle": [row for row in spared if row not in wrong],  # the model was not trained on them
        "mastered": [row for row in fresh if re.fullmatch(r"\d+\+\d+", row["problem"])],
        "hopeless": [row for row in fresh if re.search(r"\d\d\*\d\d", row["problem"])],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", action="store_true", help="only the training files")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number of threads
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    rows = draw_rows(rng, EVAL_PROBLEMS + SPARED_PROBLEMS)
    held_out = {row["problem"] for row in rows}
    exam, spared = rows[:EVAL_PROBLEMS], rows[EVAL_PROBLEMS:]
    wrong = spoil_references(spared, rng)
    if not args.mixes:
        make_model(rng, held_out)
        write_rows(OUT / "eval.jsonl", exam)
    write_rows(OUT / "spared.jsonl", spared)
    rng = random.Random(MIX_SEED)  # a second one: the mixes do not depend on the training above
    write_mixes(OUT, mix_candidates(exam, spared, wrong, rng), rng)


if __name__ == "__main__":
    main()
