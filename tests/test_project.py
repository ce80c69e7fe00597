"""The house: short modules, imports one way, nothing where it does not belong."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = ["allocator", "data", "eval", "gvm", "raft", "grpo"]
MODULES = sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_are_short_and_imports_run_one_way(path):
    text = path.read_text()
    assert path.stem in ORDER and len(text.splitlines()) < 300
    allowed = set(ORDER[: ORDER.index(path.stem)]) - ({"allocator"} if path.stem == "data" else set())
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not (set(names) & set(ORDER)) - allowed, f"{path.name} imports {names}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 66, f"{node.name} does not fit a screen"
            assert node.name.startswith("_") or node.col_offset or ast.get_docstring(node), f"{node.name} says nothing"


def test_only_what_belongs_lies_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    top = {name.split("/")[0] for name in listed}
    assert top <= {f"{name}.py" for name in ORDER} | {"tests", "requirements.txt", "README.md", ".ci", ".gitignore",
                                                      "LICENSE", "figures"}


@pytest.mark.parametrize("script", ["gvm.py", "raft.py"])
def test_every_flag_has_a_help_text(script):
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--allocator" in shown or script == "gvm.py"
    readme = (ROOT / "README.md").read_text()
    assert f"{script.removesuffix('.py')}.py" in readme and shown.count("(default:") > 15
