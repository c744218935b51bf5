"""Files that are whole or not there: safe writing, and reading that says what is wrong with a file."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes that name once the block ends without an error.

    Whatever interrupts the writing, a file that was there before stays as it was, and no half file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors leaves files that nobody else may read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(path: str | Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """Raise ``OSError`` if something is at ``path`` that is neither of this kind nor an empty file.

    Args:
        path: a file that is about to be written.
        kind: what may be replaced, for the error.
        is_kind: tells whether a file is of that kind.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and (not path.is_file() or (path.stat().st_size and not is_kind(path))):
        raise FileExistsError(f"{path} is there already and is not {kind}: delete it, or choose another name")


def read_safetensors(path: str | Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    Args:
        path: the file.
        expected: what it should be, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, or of another kind.
    """
    check_file(path, expected)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or not a safetensors file ({error}). Expected {expected}.") from error


def read_pickle(path: str | Path, expected: str) -> Any:
    """What a checkpoint holds that ``torch.save`` wrote, memory-mapped: tensors and containers, nothing in it is run.

    Args:
        path: the file.
        expected: what it should be, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, of another kind, or holds more than tensors.
    """
    check_file(path, expected)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut off or not a checkpoint that torch wrote. Expected {expected}.")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as tensors alone ({reason}). Expected {expected}.") from error


def file_states(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """What tells whether a file, or any in a folder, is still the same: its path, size and time of change."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


def check_file(path: str | Path, expected: str) -> None:
    """Raise ``FileNotFoundError`` or ``ValueError`` unless ``path`` is a file with something in it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}. Expected {expected}.")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty. Expected {expected}.")


def read_json(path: str | Path) -> dict[str, Any]:
    """What a JSON file says, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, or of another kind.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not an object: fetch it again")
    return content


def refuse_code(folder: str | Path) -> None:
    """Raise ``ValueError`` if a model's folder names Python of its own that is to be run in place of a library's."""
    for path in sorted(Path(folder).glob("*config.json")):
        if code := read_json(path).get("auto_map"):
            raise ValueError(f"{path} names code of its own ({code}), which is not run: take the model as released")
