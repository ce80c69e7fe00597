"""Problems and answers: loading, the one prompt template, and grading by mathematical equivalence.

    problems = load_problems("train.jsonl")           # or a hub data set: "openai/gsm8k:main"
    prompt_ids = encode_prompt(tokenizer, problems[0])
    with Grader(workers=2) as grader:
        [(score, failed)] = grader(["... so it is \\boxed{18}"], [problems[0].answer])
"""

import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import TimeoutError
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOY = Path(__file__).resolve().parent / "tests" / "toy"  # the model and problems used by default
QUESTION_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "reference_answer", "solution")
LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")
BENCHMARKS = {  # hub data set:config:split
    "math500": "HuggingFaceH4/MATH-500::test",
    "minerva": "math-ai/minervamath::test",
    "aime24": "HuggingFaceH4/aime_2024::train",
    "amc23": "math-ai/amc23::test",
    "gsm8k": "openai/gsm8k:main:test",
}
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PLAIN_TEMPLATE = (  # for base models, which have no chat template
    "{{ bos_token }}{{ messages[0]['content'] }}\n\n"
    "Problem: {{ messages[1]['content'] }}\n\nSolution:"
)


class InputError(Exception):
    """Bad input from the user: one line that names the flag or file and the remedy."""


@dataclass(frozen=True)
class Problem:
    """One problem of a data set. `id` is its row, from 0; samples, seeds and groups refer to it."""

    id: int
    question: str
    answer: str  # the reference, reduced to what belongs in the box: "18", "\\frac{1}{2}"
    prompt_ids: list[int] | None = None  # filled in by sampler.load_prompts


@dataclass
class Sample:
    """One response to one problem, and what training needs to know of it."""

    problem: int  # Problem.id
    index: int  # among the samples of this problem, from 0
    prompt_ids: list[int]
    response_ids: np.ndarray  # int32 (response,), the end-of-sequence token included
    finished: bool  # False: cut at --max-response-tokens
    text: str = ""  # the response, for people; training takes the token ids
    # From the grader.
    reward: float = 0.0  # 1.0 if right
    grader_failed: bool = False  # hung or crashed the grader: counted as wrong
    # Log-probs of the response's tokens, float32 (response,); None where not computed.
    sampler_logprobs: np.ndarray | None = None  # by the sampler, when it drew them
    old_logprobs: np.ndarray | None = None  # by the policy, before the step's first update
    ref_logprobs: np.ndarray | None = None  # by the reference of the KL penalty
    # What the response counts for.
    head_grad_norm: float = 0.0  # of the gradient of -ln pi with respect to the output head
    advantage: float = 0.0  # A in the losses of raft.py
    loss_weight: float = 0.0  # w_j in the losses of raft.py

    @property
    def total_tokens(self) -> int:
        """The length of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


def load_problems(spec: str, split: str = "train", limit: int | None = None) -> list[Problem]:
    """Problems of a benchmark (by name), a local file, or a hub data set name[:config[:split]].

    Local files are .jsonl, .json or .parquet. split: for hub data sets that name none. limit:
    keep the first rows only. The question is the first of QUESTION_COLUMNS that the data has,
    the answer the first of ANSWER_COLUMNS, reduced by `reference_answer`. Raises InputError
    naming the file, the row (from 1) and the columns found.
    """
    if spec.endswith(LOCAL_SUFFIXES):
        rows = read_rows(Path(spec))
    else:
        rows = _read_hub(BENCHMARKS.get(spec, spec), split)
    if not rows:
        raise InputError(f"{spec}: holds no problems")
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{spec}: every row must be an object with a question and an answer")
    question_column = _first_column(spec, rows, QUESTION_COLUMNS)
    answer_column = _first_column(spec, rows, ANSWER_COLUMNS)
    problems = []
    for i, row in enumerate(rows[:limit]):
        question, columns = row.get(question_column), f"(columns: {', '.join(row)})"
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{spec}: row {i + 1} has no text in '{question_column}' {columns}")
        answer = reference_answer(row.get(answer_column))
        if answer_column == "solution" and answer == str(row.get("solution")).strip():
            answer = ""  # a solution without a box: there is no telling its answer
        if not answer:
            raise InputError(f"{spec}: row {i + 1} has no answer in '{answer_column}' {columns}")
        problems.append(Problem(i, question.strip(), answer))
    return problems


def _first_column(spec: str, rows: list[dict], wanted: tuple[str, ...]) -> str:
    found = {}  # names, in order of appearance
    for row in rows:
        found |= row
    for name in wanted:
        if name in found:
            return name
    raise InputError(f"{spec}: found columns {', '.join(found)}; needs one of {', '.join(wanted)}")


def read_rows(path: Path) -> list:
    """The rows of a local .jsonl, .json or .parquet file; InputError names the file and line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and JSON files do without it

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:  # pyarrow.ArrowInvalid and UnicodeDecodeError are ValueErrors
        kind = "a parquet file" if path.suffix == ".parquet" else "UTF-8 text"
        raise InputError(f"{path}: not {kind} ({str(error).splitlines()[0]})") from error
    if path.suffix == ".json":
        rows = _parse_json(path, text, first_line=1)
        return rows if isinstance(rows, list) else [rows]
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_json(path, line, number) for number, line in lines if line.strip()]


def _parse_json(path: Path, text: str, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}: line {line} is not JSON ({error.msg})") from error


def _read_hub(spec: str, split: str) -> list:
    import datasets  # slow to import, and local files do without it

    name, _, rest = spec.partition(":")
    config, _, own_split = rest.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=own_split or split).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{spec}: neither a {LOCAL_SUFFIXES} file, nor one of {', '.join(BENCHMARKS)}, "
            f"nor a hub data set that can be reached ({reason})"
        ) from error


def reference_answer(value) -> str:
    """What belongs in the box, from what real files hold; "" if there is nothing.

    `... #### 1,234` (GSM8K) -> "1234"; a solution with `\\boxed{}` -> the content of its last
    box; 27.0 or "27.0" (AMC) -> "27"; "$x$, $y$" -> "x, y"; ["$2$", "$3$"] (OlympiadBench) ->
    "2, 3".
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(reference_answer, value)))
    if value is None or value != value:  # NaN: a missing value in a parquet file
        return ""
    text = str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    text = re.sub(r"(?<!\\)\$", "", text).strip()  # dollars around math, not \$
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def encode_prompt(tokenizer, problem: Problem) -> list[int]:
    """Token ids of the prompt, by the tokenizer's chat template or, without one, PLAIN_TEMPLATE."""
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"{problem.question}\n{INSTRUCTION}"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
        add_generation_prompt=True,
    )
    return encoded["input_ids"]


def extract_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None if there is none or it never closes."""
    _, box, rest = text.rpartition("\\boxed{")
    depth = 1
    for token in re.finditer(r"\\.|[{}]", rest if box else "", re.DOTALL):
        # `\{` is a printed brace: it is matched as a whole, and does not nest.
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return rest[: token.start()].strip()
    return None


class Grader(AbstractContextManager):
    """Scores responses in worker processes that can be killed.

    Model output can hang any algebra system (`9^{9^{9^{9}}}`) in code that no exception
    interrupts: a worker that overruns `deadline` seconds is killed. The workers belong to a
    process of their own, this file run as a script, which shares no thread, lock or GPU with
    the trainer and ends with it. To be used as a context manager.
    """

    def __init__(self, workers: int | None = None, deadline: float = 10.0):
        """workers: by default this rank's share of the machine's cores."""
        if workers is None:
            workers = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), str(workers), str(deadline)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )

    def __call__(self, responses: list[str], answers: list[str]) -> list[tuple[float, bool]]:
        """(score, failed) of each response: 1.0 if its last box is equivalent to the answer.

        failed: it overran the deadline, or its worker died. It then scores 0.0, and the other
        responses are graded all the same.
        """
        pairs = [(extract_boxed(r), answer) for r, answer in zip(responses, answers, strict=True)]
        grades = {(boxed, answer): (float(boxed == answer), False) for boxed, answer in pairs}
        unequal = [(boxed, answer) for boxed, answer in grades if boxed and boxed != answer]
        self.process.stdin.write(json.dumps(unequal) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError("the grading process has died: no sample can be scored")
        for pair, (score, failed) in zip(unequal, json.loads(reply), strict=True):
            grades[pair] = (score, failed)
        return [grades[pair] for pair in pairs]

    def __exit__(self, *exception) -> None:
        """End the grading process and its workers."""
        self.process.communicate()


def equivalent(boxed: str, answer: str) -> bool:
    """Math-Verify's judgement of a boxed response. May hang or exhaust memory: see Grader.

    Only its LaTeX reader is used: the reader for plain expressions ends in Python's `eval`.
    """
    from math_verify import LatexExtractionConfig, parse, verify  # needed by the workers only

    def read(text: str) -> list:
        # Math-Verify reads neither LaTeX's spaces nor a full stop or line break at the end.
        text = re.sub(r"(?<!\\)\\[,;:! ]|~|(?<=[\d}])\.$|\\+$", "", text)
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    return verify(read(answer), read(boxed), timeout_seconds=None)  # the Grader has a deadline


def grading_loop(workers: int, deadline: float) -> None:
    """The grading process: a line of JSON pairs (boxed, answer) in, a line of grades out."""
    from pebble import ProcessExpired, ProcessPool  # needed by this process only

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # or it warns of odd answers
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    equivalent("1", "2")  # imports Math-Verify, so that the workers, forked, have it
    with ProcessPool(workers) as pool:
        for line in sys.stdin:
            pairs, grades = json.loads(line), []
            for future in [pool.schedule(equivalent, args=p, timeout=deadline) for p in pairs]:
                try:
                    grades.append((float(future.result()), False))
                except (TimeoutError, ProcessExpired, MemoryError, RecursionError):
                    grades.append((0.0, True))
            print(json.dumps(grades), file=replies, flush=True)
        pool.stop()


if __name__ == "__main__":
    grading_loop(workers=int(sys.argv[1]), deadline=float(sys.argv[2]))
