"""Which one-line errors do the tests not notice? Breaks copies of the repository, and prints the breaks that survive.

    python tests/mutants.py                                                        # 100 of all modules; two hours
    python tests/mutants.py --count 5 --modules model --tests tests/test_model.py  # fewer modules, other tests

A mutant is one change to one module: a comparison turned into another, a number one larger, a condition negated, or a
statement dropped. They are drawn by --seed from all that the modules have. A survivor is a line that needs a test, or a
change that makes no difference to results: telling them apart needs a reader.
"""

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
ORDER = ["allocator", "predictor", "wording", "formulas", "equality", "answers", "run", "files", "data", "grader", "metrics",
         "losses", "pretrained", "model", "batches", "sampler", "folder", "checkpoint", "eval", "gvm", "raft", "grpo"]  # imports run one way
SWAPPED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
           ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}


def mutants_of(text: bytes) -> list[tuple[int, int, bytes]]:
    """All mutants of a module: (first byte, byte after the last, what stands there instead)."""
    starts, found = [0], []
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def source(node: ast.AST) -> str:
        return text[slice(*span(node))].decode()

    for node in ast.walk(ast.parse(text)):
        new = None
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            new = f"({source(node.left)}) {SWAPPED[type(node.ops[0])]} ({source(node.comparators[0])})"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            new = repr(node.value + 1)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and not isinstance(node.value, ast.Constant):
            new = "pass"
        if new:
            found.append((*span(node), new.encode()))
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            found.append((*span(node.test), f"not ({source(node.test)})".encode()))
    return found


def default_tests(module: str) -> list[str]:
    """pytest's arguments: tests that import a module, or one that does, directly or not; and those of faults.

    What is marked slow is left out.
    """
    importers = [module]
    for name in ORDER[ORDER.index(module) + 1 :]:
        lines = (ROOT / f"{name}.py").read_text().splitlines()
        if any(line.startswith((f"import {one}", f"from {one} ")) for one in importers for line in lines):
            importers.append(name)
    uses = re.compile(rf"^(?:from|import) (?:{'|'.join(importers)})\b", re.MULTILINE)
    files = [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py")) if uses.search(path.read_text())]
    return sorted({*files, "tests/test_faults.py"})


def survives(folder: Path, tests: list[str], limit: float) -> bool:
    """Whether the tests are green in a copy of the repository; running out of time is not."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        return process.wait(timeout=limit) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the grader's workers
        process.wait()
        return False


def try_mutant(mutant: tuple | None, args: argparse.Namespace) -> str | None:
    """Break a copy and test it: "file:line: before -> after" if the mutant survives. None: an unbroken copy."""
    module, start, end, new = mutant or ("allocator", 0, 0, b"")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "runs"))
        text = (path := copy / f"{module}.py").read_bytes()
        path.write_bytes(text[:start] + new + text[end:])
        if not survives(copy, args.tests or default_tests(module), args.limit):
            return None
    line, before = text[:start].count(b"\n") + 1, " ".join(text[start:end].decode().split())
    return f"{module}.py:{line}: {before} -> {new.decode()}"


def main() -> None:
    """Draw mutants, try them, print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--tests", type=shlex.split, help="for pytest; default: fast ones of the module and above")
    parser.add_argument("--limit", type=float, default=900, help="seconds for the tests of one mutant")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested at once")
    args = parser.parse_args()
    if try_mutant(None, args) is None:
        sys.exit("the tests are not green without a mutant, or take longer than --limit")
    mutants = [(name, *mutant) for name in args.modules for mutant in mutants_of((ROOT / f"{name}.py").read_bytes())]
    drawn = random.Random(args.seed).sample(mutants, min(args.count, len(mutants)))
    survivors = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in tqdm(pool.map(partial(try_mutant, args=args), drawn), total=len(drawn)):
            if result:
                survivors += 1
                print(result, flush=True)
    print(f"{len(drawn)} of {len(mutants)} mutants tried: {len(drawn) - survivors} killed, {survivors} survived")


if __name__ == "__main__":
    main()
