"""What is read and written: rows in files of others and of ours, and JSON that is there whole."""

import json
from pathlib import Path

from run import InputError


# --- rows ------------------------------------------------------------------------------------
def read_rows(path: Path) -> list:
    """The rows of a local .jsonl, .json or .parquet file; InputError names the file and line.

    A .json file holds a list or an object; or JSON lines, if its first line is {...}.
    """
    try:
        refuse_pipe(path)
        content = path.read_bytes()
        if path.suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and JSON files do without it
            return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: {reason.splitlines()[0].lower()}") from error
    first = text.lstrip().partition("\n")[0].rstrip()
    if path.suffix == ".json" and not (first.startswith("{") and first.endswith("}")):
        rows = _parse_json(text, path, first_line=1) if text.strip() else []
        return rows if isinstance(rows, list) else [rows]
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_json(line, path, first_line=i) for i, line in lines if line.strip()]


def _parse_json(text: str, path: Path, first_line: int):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also 5,000 digits, or a thousand brackets
        line, reason = first_line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", error)
        raise InputError(f"{path}: line {line} is not readable JSON ({reason})") from error


def append_rows(path: Path, rows: list[dict]) -> int:
    """Append JSON lines to a file; returns its length in bytes."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        return file.tell()


def refuse_pipe(path: Path) -> None:
    """InputError for a pipe or a device: it may never end, and one rank alone can read it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: is a pipe or a device; save what it holds in a file")


# --- one object ------------------------------------------------------------------------------
def write_json(path: Path, content: dict) -> None:
    """Write a file beside its place and rename it: it is there whole, or as it was before."""
    aside = path.with_suffix(".partial")
    text = json.dumps(content, indent=1, allow_nan=False, default=lambda array: array.tolist())
    aside.write_text(text)
    aside.rename(path)


def read_json(path: Path, key: str | None = None) -> dict:
    """What write_json wrote, or its part `key`; InputError if something else wrote over it."""
    try:
        content = json.loads(path.read_text())
        return dict(content[key] if key else content)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is damaged; restore it, or choose another --out") from error
