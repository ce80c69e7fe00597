"""Problems and answers: loading, the one prompt template, and grading by mathematical equivalence.

    problems = load_problems("train.jsonl")           # or a hub data set: "openai/gsm8k:main"
    prompt_ids = encode_prompt(tokenizer, problems[0])
    with Grader(workers=2) as grader:
        [(score, failed)] = grader(["... so it is \\boxed{18}"], [problems[0].answer])
"""

import hashlib
import json
import logging
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from subprocess import PIPE, Popen

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
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # "\\ud800" in JSON, which cannot be encoded
BETWEEN_BOXES = re.compile(r"(?:[\s,;$~{}]|and\b|or\b|\\(?:text|mathrm|q?quad|[,;:! \\()\[\]]))*")
PLAIN_TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}\n\n"  # for base models
PLAIN_TEMPLATE += "Problem: {{ messages[1]['content'] }}\n\nSolution:"


class InputError(Exception):
    """Bad input from the user: one line that names the flag or file and the remedy."""


class RunError(Exception):
    """The run cannot go on, through no fault of its input: one line; checkpoints are kept."""


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
    reward: float = 0.0  # by the grader: 1.0 if right
    grader_failed: bool = False  # hung or crashed the grader: counted as wrong
    # Log-probs of the response's tokens, float32 (response,); None where not computed.
    sampler_logprobs: np.ndarray | None = None  # by the sampler, when it drew them
    old_logprobs: np.ndarray | None = None  # by the policy before the step's updates
    ref_logprobs: np.ndarray | None = None  # by the reference of the KL penalty
    head_grad_norm: float = 0.0  # of the gradient of -ln pi with respect to the output head
    advantage: float = 0.0  # A in the losses of raft.py
    loss_weight: float = 0.0  # w_j in the losses of raft.py

    @property
    def total_tokens(self) -> int:
        """The length of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


def load_problems(spec: str, split: str = "train", limit: int | None = None) -> list[Problem]:
    """Problems of a benchmark (by name), a local file, or a hub data set name[:config[:split]].

    split: for hub data sets that name none. limit: keep the first rows only. The question is the
    first of QUESTION_COLUMNS that the data has, the answer the first of ANSWER_COLUMNS, reduced by
    `reference_answer`. Raises InputError naming the file, the row (from 1) and the columns found.
    """
    rows = read_rows(Path(spec)) if spec.endswith(LOCAL_SUFFIXES) else _read_hub(spec, split)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{spec}: must hold rows, each an object with a question and an answer")
    found = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    for wanted in (QUESTION_COLUMNS, ANSWER_COLUMNS):
        if not any(name in found for name in wanted):
            raise InputError(f"{spec}: has columns {list(found)}; needs one of {wanted}")
    question_column = next(name for name in QUESTION_COLUMNS if name in found)
    answer_column = next(name for name in ANSWER_COLUMNS if name in found)
    problems = []
    for i, row in enumerate(rows[:limit]):
        question, answer = row.get(question_column), reference_answer(row.get(answer_column))
        if answer_column == "solution" and answer == str(row.get("solution")).strip():
            answer = ""  # a solution without a box: there is no telling its answer
        for column, text in [(question_column, question), (answer_column, answer)]:
            if not isinstance(text, str) or not text.strip() or HALF_CHARACTER.search(text):
                reason = f"has nothing readable in '{column}'; its columns: {list(row)}"
                raise InputError(f"{spec}: row {i + 1} {reason}")
        problems.append(Problem(i, question.strip(), answer))
    return problems


def digest_problems(problems: list[Problem]) -> str:
    """16 hex digits that change with any id, question or answer, so that a changed file is seen."""
    rows = [(problem.id, problem.question, problem.answer) for problem in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list:
    """The rows of a local .jsonl, .json or .parquet file; InputError names the file and line."""
    try:
        content = path.read_bytes()
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and JSON files do without it
            return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason.splitlines()[0].lower()}") from error
    rows = []
    for number, part in enumerate([text] if path.suffix == ".json" else text.split("\n"), start=1):
        try:
            rows += [json.loads(part)] if part.strip() else []
        except (ValueError, RecursionError) as error:  # also 5,000 digits, or a thousand brackets
            line, reason = number + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
            raise InputError(f"{path}: line {line} is not readable JSON ({reason})") from error
    return rows[0] if path.suffix == ".json" and isinstance((rows or [{}])[0], list) else rows


def _read_hub(spec: str, split: str) -> list:
    import datasets  # slow to import, and local files do without it
    name, _, rest = BENCHMARKS.get(spec, spec).partition(":")
    config, _, own_split = rest.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=own_split or split).to_list()
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"'{spec}': neither a {LOCAL_SUFFIXES} file, nor one of "
                         f"{', '.join(BENCHMARKS)}, nor a hub data set in reach ({reason})"
                         ) from error


def reference_answer(value) -> str:
    """What belongs in the box, from what real files hold; "" if there is nothing.

    `... #### 1,234` (GSM8K) -> "1234"; a solution -> the content of its last box; 27.0 or "27.0"
    (AMC) -> "27"; "$x$, $y$" -> "x, y"; ["$2$", "$3$"] (OlympiadBench) -> "2, 3".
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(reference_answer, value)))
    if value is None or value != value or isinstance(value, (dict, bytes)):
        return ""  # NaN, the only value that differs from itself, is a missing one
    if isinstance(value, float):
        value = np.format_float_positional(value, trim="-")  # not 1e+16
    text = str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if (boxed := extract_boxed(text)) is not None:
        return boxed
    text = re.sub(r"(?<!\\)\$", "", text).strip()  # dollars around math, not \$
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def encode_prompt(tokenizer, problem: Problem) -> list[int]:
    """Token ids of the prompt, by the tokenizer's chat template or, without one, PLAIN_TEMPLATE."""
    question = f"{problem.question}\n{INSTRUCTION}"
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        encoded = tokenizer.apply_chat_template(messages, chat_template=template,
                                                add_generation_prompt=True)
        if encoded["input_ids"]:
            return encoded["input_ids"]
        reason = "the prompt is empty"
    except Exception as error:  # a template is a program: it can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"--model: its chat template fails ({reason}); mend it in the model's folder, "
                     "or delete it there: base models do without one")


def extract_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None if there is none or it never closes.

    Boxes with nothing but "and", "or", commas and spaces between them are one: "2, 3".
    """
    contents = []
    for part in reversed(text.split("\\boxed{")[1:]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", part, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)  # `\{`, a printed brace, does not nest
            if depth == 0:
                break
        if depth or (contents and not BETWEEN_BOXES.fullmatch(part, token.end())):
            break
        contents.insert(0, part[: token.start()].strip())
    return ", ".join(dict.fromkeys(contents)) if contents else None


class Grader(AbstractContextManager):
    """Scores responses in processes that can be killed. To be used as a context manager.

    Model output can hang any algebra system (`9^{9^{9^{9}}}`) in code that no exception
    interrupts. A worker is this file run as a script. The kernel ends it when an answer takes more
    than `deadline` seconds; whatever ends it, only that answer is lost. It shares no thread, lock
    or GPU with the trainer or other workers, and ends with the trainer.
    """

    def __init__(self, workers: int | None = None, deadline: float = 10.0):
        """workers: by default this rank's share of the machine's cores."""
        share = max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.threads = ThreadPoolExecutor(workers or share)  # each waits for one worker
        self.deadline, self.idle = deadline, []  # workers are started when they are needed

    def __call__(self, responses: list[str], answers: list[str]) -> list[tuple[float, bool]]:
        """(score, failed) of each response: 1.0 if its last box is equivalent to the answer.

        failed: it overran the deadline or its worker died, and scores 0.0; no other answer is lost.
        Raises RunError if no worker can be started.
        """
        pairs = [(extract_boxed(r), answer) for r, answer in zip(responses, answers, strict=True)]
        grades = {(boxed, answer): (float(boxed == answer), False) for boxed, answer in pairs}
        unequal = [(boxed, answer) for boxed, answer in grades if boxed and boxed != answer]
        grades |= zip(unequal, self.threads.map(self._grade, unequal))
        return [grades[pair] for pair in pairs]

    def _grade(self, pair: tuple[str, str]) -> tuple[float, bool]:
        worker = self._idle_worker()
        try:
            print(json.dumps(pair), file=worker.stdin, flush=True)
        except BrokenPipeError:  # killed while it was idle
            return self._grade(pair)
        if not connection.wait([worker.stdout], timeout=2 * self.deadline):
            worker.kill()  # the kernel should have ended it: it was stopped
        if not (reply := worker.stdout.readline()):
            return 0.0, True  # it has died
        self.idle.append(worker)
        return tuple(json.loads(reply))

    def _idle_worker(self) -> Popen:
        with suppress(IndexError):
            return self.idle.pop()
        command = [sys.executable, os.path.abspath(__file__), str(self.deadline)]
        with suppress(OSError):  # said below. A session of its own: Ctrl-C is for the trainer
            worker = Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)
            if worker.stdout.readline():
                return worker
        raise RunError("the grader cannot be started, so no response can be graded: out of memory?")

    def __exit__(self, *exception) -> None:
        self.threads.shutdown(cancel_futures=True)
        for worker in self.idle:
            worker.kill()
            worker.communicate()


def equivalent(boxed: str, answer: str) -> bool:
    """Math-Verify's judgement of a boxed response. May hang or exhaust memory: see Grader.

    Only its LaTeX reader is used: the reader for plain expressions ends in Python's `eval`.
    """
    from math_verify import LatexExtractionConfig, parse, verify  # needed by the workers only
    def read(text: str) -> list:
        # Math-Verify reads neither LaTeX's spaces nor a full stop or line break at the end.
        text = re.sub(r"(?<!\\)\\(?:!\s*|[,;: ])|~|(?<=[\d}])\.$|\\+$", "", text)
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
    return verify(read(answer), read(boxed), timeout_seconds=None)  # the Grader has a deadline


def work(deadline: float) -> None:
    """A worker: a line with a pair (boxed, answer) in, a line with its (score, failed) out."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # or it warns of odd answers
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    equivalent("1", "2")  # imports Math-Verify
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, deadline)  # then the kernel ends this process
        grade = 0.0, True
        with suppress(MemoryError, RecursionError):
            grade = float(equivalent(*json.loads(line))), False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(grade), file=replies, flush=True)


if __name__ == "__main__":
    work(deadline=float(sys.argv[1]))
