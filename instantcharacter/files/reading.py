"""Reading of files, memory-mapped and without running code in them; errors name the fault and the expected file."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import first_line


def read_safetensors(path: str | Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata.

    Args:
        path: the file.
        expected: description of the expected file, for the error.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, cut off, or of another kind.
    """
    with _opened(path, expected) as file:
        keys = file.keys()
        return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}


def read_header(path: str | Path, expected: str) -> tuple[set[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its metadata; errors as those of :func:`read_safetensors`."""
    with _opened(path, expected) as file:
        return set(file.keys()), file.metadata() or {}


def read_pickle(path: str | Path, expected: str) -> Any:
    """The tensors and containers of a ``torch.save`` file, memory-mapped; code in it is not run.

    Args:
        path: the file.
        expected: description of the expected file, for the error.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, cut off, of another kind, or holds more than tensors.
    """
    check_file(path, expected)
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut off or not a checkpoint that torch wrote. Expected {expected}.")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone ({first_line(error)}). Expected {expected}."
        ) from error


def file_states(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """The path, size and modification time of a file, or of each file in a folder: they change when it does."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


def check_file(path: str | Path, expected: str) -> None:
    """Raise ``FileNotFoundError`` or ``ValueError`` unless ``path`` is a file that is not empty."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}. Expected {expected}.")
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty. Expected {expected}.")


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file in UTF-8, 16 or 32, with or without a byte order mark; its lines end in ``\\n``.

    Args:
        path: the file.
        errors: as for ``bytes.decode``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has bytes of another encoding, if ``errors`` is ``"strict"``.
    """
    data = path.read_bytes()
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(f"{path} is not in {encoding} at line {line} ({error.reason}): save it in UTF-8") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is cut off, or holds no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a JSON {type(content).__name__}, not an object: fetch it again")
    return content


def refuse_code(folder: str | Path) -> None:
    """Raise ``ValueError`` if a model's folder names Python code of its own (``auto_map``) to run."""
    for path in sorted(Path(folder).glob("*config.json")):
        if code := read_json(path).get("auto_map"):
            raise ValueError(f"{path} names code of its own ({code}), which is not run: take the model as released")


@contextmanager
def _opened(path: str | Path, expected: str) -> Iterator[Any]:
    """A safetensors file, memory-mapped."""
    check_file(path, expected)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or not a safetensors file ({error}). Expected {expected}.") from error
