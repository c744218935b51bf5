"""An image folder: pictures, and a ``metadata.jsonl`` with a line for each."""

from __future__ import annotations

import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...files.reading import read_text

METADATA = "metadata.jsonl"


class AmbiguousName(ValueError):
    """A file name that several files on disk match."""


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an image folder, one for each line of its ``metadata.jsonl``.

    A row has ``image`` and maybe ``text`` and ``reference``; one of an unusable line has ``name`` and ``why``.

    Raises:
        ValueError: the file has no lines, or is not in UTF-8, 16 or 32.
    """
    numbered = enumerate(_lines(folder / METADATA), 1)
    rows = [_row(folder, line, f"{METADATA} line {number}") for number, line in numbered if line.strip()]
    if not rows:
        raise ValueError(f"{folder / METADATA} is empty")
    return rows


def find_on_disk(picture: Path) -> Path:
    """The file that a name from another operating system means.

    Tolerates ``\\`` between folders, other letter case, and the other Unicode form (macOS decomposes accents). A name
    that exists is returned as it is, and so is one that nothing on disk resembles.

    Raises:
        AmbiguousName: several files match.
    """
    try:
        if picture.exists() or picture == picture.parent:
            return picture
        if (parted := Path(str(picture).replace("\\", "/"))) != picture:
            return find_on_disk(parted)
        folder = find_on_disk(picture.parent)
        matches = (
            _by_folded_name(folder, folder.stat().st_mtime_ns).get(_fold(picture.name), []) if folder.is_dir() else []
        )
    except OSError:  # a folder without permission: reading the picture raises the error
        return picture
    if len(matches) > 1:
        names = ", ".join(path.name for path in sorted(matches))
        raise AmbiguousName(f"{picture} is not there, and may be any of {names}")
    return matches[0] if matches else picture


def _lines(path: Path) -> list[str]:
    """Lines of a JSON Lines file; ``str.splitlines`` would also split at characters that strings may hold (U+2028)."""
    return read_text(path).split("\n")


def _row(folder: Path, line: str, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"name": name, "why": f", the line is not JSON ({error})"}
    row = parsed if isinstance(parsed, dict) else {}
    if not isinstance(row.get("file_name"), str):
        return {"name": name, "why": ", the line has no file_name"}
    pictures = {"image": folder / row["file_name"]}
    if isinstance(row.get("reference"), str):
        pictures["reference"] = folder / row["reference"]
    return {"text": row.get("text"), **pictures}


@lru_cache(maxsize=16)
def _by_folded_name(folder: Path, modified: int) -> dict[str, list[Path]]:
    """A folder's files by folded name; ``modified``, its modification time, invalidates the cache."""
    names: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        names.setdefault(_fold(path.name), []).append(path)
    return names


def _fold(name: str) -> str:
    """The same string for names that differ only in case or Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
