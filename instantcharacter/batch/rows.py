"""The rows of a job's file, as they are written: JSON Lines or CSV, with the number of the line where each begins."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..files.errors import first_line
from ..files.reading import read_text

SEPARATOR = "|"
"""Between several values in a cell of a CSV file."""

Row: TypeAlias = dict[str, Any]


class BadLine(NamedTuple):
    """A line that no picture can be generated of, and why."""

    line: int
    fault: str


def read_rows(path: Path) -> Iterator[tuple[int, Row] | BadLine]:
    """The rows of a ``.jsonl`` or ``.csv`` file in UTF-8, 16 or 32; blank lines are no rows.

    Values of a CSV file are texts, and those of empty cells are left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file with another ending, or a CSV file without a header.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise ValueError(f"{path}: expected a .jsonl file with a JSON object a line, or a .csv file with a header")
    text = read_text(path, "surrogateescape")
    for found in _json_rows(text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text):
        if not isinstance(found, BadLine) and _has_surrogates(found[1]):
            yield BadLine(found[0], "bytes that are no UTF-8: save the file in UTF-8")
        else:
            yield found


def _json_rows(text: str) -> Iterator[tuple[int, Row] | BadLine]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            yield BadLine(number, f"not JSON ({first_line(error)})")
            continue
        yield (number, row) if isinstance(row, dict) else BadLine(number, f"a JSON {type(row).__name__}, not an object")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object whose names are unique."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a name twice in one object")
    return row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Row] | BadLine]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLine(line, f"not CSV ({error})")
            continue
        if names is None and cells:
            names = _header(path, cells)
        elif names and cells and len(cells) != len(names):
            yield BadLine(
                line, f"{len(cells)} cells; expected {len(names)}, as the header has (quote a text with commas)"
            )
        elif names and any(cells):
            yield line, {name: cell for name, cell in zip(names, cells) if cell}


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "prompt" not in names or len(set(names)) < len(names):
        raise ValueError(
            f"{path} begins with {', '.join(cells)[:200]!r}; expected a header: names of columns between commas, each "
            "once, prompt among them"
        )
    return names


def _has_surrogates(value: Any) -> bool:
    """Whether a text in a row holds bytes that could not be decoded, or half a character."""
    if isinstance(value, str):
        return any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return any(map(_has_surrogates, (*value, *value.values())))
    return isinstance(value, list) and any(map(_has_surrogates, value))
