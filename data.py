"""Problems and samples: loading what real files hold, and the one prompt template.

    problems = load_problems("train.jsonl")           # or a hub data set: "openai/gsm8k:main"
    prompt_ids = encode_prompt(tokenizer, problems[0])
"""

import argparse
import re
import reprlib
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from answers import extract_boxed, reference_answer, solution_answer
from files import read_rows
from run import InputError, print0

TOY = Path(__file__).resolve().parent / "tests" / "toy"  # the model and problems used by default

# The question is in the first of these columns that the data has, and so is the answer.
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
TRAINING, EVALUATION, ORDER = 0, 1, 2  # what random numbers are for: a part of their seed
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # "\\ud800" in JSON, which cannot be encoded

# The prompt, as published. Templates that tell the date get this one, the default of Llama 3's: by
# today's, a run that goes on tomorrow would have other prompts.
PROMPT_DATE = date(2024, 7, 26)
SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
PLAIN_TEMPLATE = (  # for base models, whose tokenizer has no chat template
    "{{ bos_token }}{{ messages[0]['content'] }}\n\n"
    "Problem: {{ messages[1]['content'] }}\n\nSolution:"
)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What is trained on."""
    add = parser.add_argument_group("problems").add_argument
    add("--data", default=str(TOY / "train.jsonl"),
        help="a .jsonl, .json or .parquet file, or a hub data set name[:config]; or several: a,b")
    add("--split", default="train", help="split of --data, if it is a hub data set that names none")


@dataclass(frozen=True)
class Problem:
    """One problem of a data set. `id` is its row, from 0; samples, seeds and groups refer to it."""

    id: int
    question: str
    answer: str  # the reference, reduced to what belongs in the box: "18", "\\frac{1}{2}"
    prompt_ids: list[int] | None = None  # filled in by load_prompts


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
    sampler_logprobs: np.ndarray | None = None  # by the sampler, if asked
    old_logprobs: np.ndarray | None = None  # by the policy before the step's updates
    ref_logprobs: np.ndarray | None = None  # by the reference of the KL penalty

    head_grad_norm: float = 0.0  # of the gradient of -ln pi with respect to the output head
    advantage: float = 0.0  # A_j of losses.py
    loss_weight: float = 0.0  # w_j of losses.py

    @property
    def total_tokens(self) -> int:
        """The length of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


def sample_rows(samples: list[Sample], problems: list[Problem]) -> list[dict]:
    """What is kept of each sample, as a JSON object."""
    references = {problem.id: problem.answer for problem in problems}
    return [{
        "problem": s.problem, "index": s.index, "response": s.text, "tokens": len(s.response_ids),
        "answer": extract_boxed(s.text), "reference": references[s.problem], "score": s.reward,
        "grader_failed": s.grader_failed, "finish_reason": "stop" if s.finished else "length",
    } for s in samples]


# --- loading ---------------------------------------------------------------------------------
def load_problems(spec: str, split: str = "train", limit: int | None = None) -> list[Problem]:
    """Problems of a benchmark (by name), a local file, or a hub data set name[:config[:split]].

    split: for hub data sets that name none. limit: keep the first rows only. Raises InputError
    naming the file, the row (from 1) and the columns found.
    """
    problems, faults = _readable_rows(spec, split, limit)
    if faults:
        raise InputError(f"{spec}: {faults[0]}")
    return problems


def _readable_rows(spec: str, split: str, limit: int | None) -> tuple[list[Problem], list[str]]:
    """Problems, whose ids are their rows from 0; and what is wrong with each of the other rows."""
    rows = read_rows(Path(spec)) if spec.endswith(LOCAL_SUFFIXES) else _read_hub(spec, split)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{spec}: must hold rows, each an object with a question and an answer")
    found = dict.fromkeys(name for row in rows for name in row)  # in order of appearance
    for wanted in (QUESTION_COLUMNS, ANSWER_COLUMNS):
        if not any(name in found for name in wanted):
            columns = reprlib.repr(list(found))
            raise InputError(f"{spec}: has columns {columns}; needs one of {wanted}")
    question_column = next(name for name in QUESTION_COLUMNS if name in found)
    answer_column = next(name for name in ANSWER_COLUMNS if name in found)
    reduce = solution_answer if answer_column == "solution" else reference_answer
    problems, faults = [], []
    for i, row in enumerate(rows[:limit]):
        texts = {question_column: row.get(question_column),
                 answer_column: reduce(row.get(answer_column))}
        unreadable = [name for name, text in texts.items() if not isinstance(text, str)
                      or not text.strip() or HALF_CHARACTER.search(text)]
        if unreadable:
            columns = reprlib.repr(list(row))
            reason = f"has nothing readable in '{unreadable[0]}'; its columns: {columns}"
            faults.append(f"row {i + 1} {reason}")
        else:
            problems.append(Problem(i, texts[question_column].strip(), texts[answer_column]))
    return problems, faults


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


# --- prompts ---------------------------------------------------------------------------------
def encode_prompt(tokenizer, problem: Problem) -> list[int]:
    """Token ids of the prompt, by the tokenizer's chat template or, without one, PLAIN_TEMPLATE.
    To a template, every day is PROMPT_DATE."""
    question = f"{problem.question}\n{INSTRUCTION}"
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True,
            strftime_now=PROMPT_DATE.strftime)  # in place of transformers' own, by the clock
        if encoded["input_ids"]:
            return encoded["input_ids"]
        reason = "the prompt is empty"
    except Exception as error:  # a template is a program: it can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"--model: its chat template fails ({reason}); mend it in the model's folder, "
                     "or delete it there: base models do without one")


def load_prompts(spec: str, split: str, tokenizer, args, limit=None, *,
                 training: bool) -> list[Problem]:
    """The problems of data sets, encoded, whose ids are rows of them all; says what is dropped.

    Prompts over --max-prompt-tokens are dropped; and, in training, rows without a question or an
    answer, up to half of a data set. In an evaluation, which would be another one without it, such
    a row is an InputError.
    """
    problems, rows, most = [], 0, args.max_prompt_tokens
    for part in spec.split(","):
        found, faults = _readable_rows(part, split, limit)
        total = len(found) + len(faults)
        allowed = total / 2 if training else 0
        if len(faults) > allowed:
            half = "; up to half would be dropped" if training else ""
            raise InputError(f"{part}: {faults[0]}; {len(faults)} of {total} rows: mend them{half}")
        if faults:
            print0(f"{part}: dropped {len(faults)} of {total} rows, as {faults[0]}")
        problems += [replace(problem, id=rows + problem.id) for problem in found]
        rows += total
    problems = [replace(p, prompt_ids=encode_prompt(tokenizer, p)) for p in problems]
    fitting = [problem for problem in problems if len(problem.prompt_ids) <= most]
    if not fitting:
        raise InputError(f"{spec}: every prompt is longer than --max-prompt-tokens {most}")
    if len(fitting) < len(problems):
        print0(f"{spec}: dropped {len(problems) - len(fitting)} of {len(problems)} prompts, "
               "over --max-prompt-tokens")
    return fitting


def check_prompts(model, problems: list[Problem]) -> None:
    """InputError for a question with a special token that the model does not know."""
    vocabulary = model.get_input_embeddings().num_embeddings
    for problem in problems:
        if max(problem.prompt_ids) >= vocabulary:
            raise InputError(f"--model: knows no token {max(problem.prompt_ids)}, which is in the "
                             f"question '{problem.question[:60]}'; leave it out")


# --- which problems a step gets ----------------------------------------------------------------
def prompts_looked_at(args) -> int:
    """How many prompts a step takes from the data; predictions leave some without samples."""
    return args.candidates_per_step or args.prompts_per_step


def problems_of_step(problems: list[Problem], step: int, args) -> list[Problem]:
    """The problems of step 1, 2, ...: a function of --seed and the step alone. Each epoch goes once
    through a new order of all problems; those too few for a step are left."""
    m = prompts_looked_at(args)
    epoch, position = divmod(step - 1, len(problems) // m)
    order = np.random.default_rng((args.seed, ORDER, epoch)).permutation(len(problems))
    return [problems[i] for i in order[position * m : (position + 1) * m]]
