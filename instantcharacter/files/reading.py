"""Reading of files without running code in them. Errors name the file, what was found, and what was expected."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor, nn

from . import pickles
from .errors import escaped, first_few, first_line, quoted

WEIGHT_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
"""The dtypes of weights."""
LARGEST_WEIGHT = 1e9
"""The largest number of features and weights; the squares of much larger ones are infinite in float32."""
LONGEST_JSON = 4 << 20
"""Bytes of a JSON file at most; those of models have a tenth of it."""
LONGEST_HEADER = 8 << 20
"""Bytes of a safetensors header at most: 100,000 tensors, which take 2 s and 110 MB to read."""


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


def read_whole(path: str | Path, expected: str) -> dict[str, Tensor]:
    """The tensors of a small safetensors file, in memory: it may change or vanish afterwards.

    Errors are those of :func:`read_safetensors`.
    """
    _check_header(path, expected)
    try:
        return load_bytes(Path(path).read_bytes())
    except UNREADABLE as error:
        raise _no_safetensors(path, error, expected) from error


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
        raise unexpected(path, "is cut off or not a checkpoint that torch wrote", expected)
    try:
        return pickles.load(Path(path))
    except pickles.Unsafe as error:
        problem = f"cannot be read as tensors alone: it asks to run {quoted(str(error))}, which is not done"
        raise unexpected(path, problem, expected) from error
    except ValueError as error:
        raise unexpected(path, f"cannot be read ({first_line(error)})", expected) from error


def check_weights(weights: Mapping[str, Any], path: str | Path, expected: str) -> None:
    """Raise ``ValueError`` unless values from a file are tensors of floating-point numbers, of one number at least."""
    if other := [key for key, weight in weights.items() if not isinstance(weight, Tensor)]:
        raise unexpected(path, f"holds values that are not a tensor: {first_few(other)}", expected)
    if unusable := [key for key, weight in weights.items() if weight.dtype not in WEIGHT_DTYPES or not weight.numel()]:
        found = first_few(f"{quoted(key)} ({weights[key].dtype})" for key in unusable)
        raise unexpected(path, f"has weights that are empty or no floating-point numbers: {found}", expected)


@torch.no_grad()
def check_finite(values: Tensor, found: str, advice: str) -> None:
    """Raise ``ValueError`` for NaN, infinities, and numbers with infinite squares: they end in black pictures.

    It takes a tenth of a second for each GB on a CPU, and no memory.

    Args:
        values: the tensor.
        found: what it is, for the error: "fox.safetensors has fused features".
        advice: what to do, for the error.
    """
    if not values.numel():
        return
    low, high = torch.aminmax(values.float() if values.itemsize == 1 else values)
    if not (low.item() >= -LARGEST_WEIGHT and high.item() <= LARGEST_WEIGHT):
        raise ValueError(f"{found} from {low.item():g} to {high.item():g}; expected finite numbers: {advice}")


def check_module(module: nn.Module, found: str, advice: str) -> None:
    """:func:`check_finite` for a module's parameters: attention on a CPU takes NaN in them for zeros, in silence."""
    for name, parameter in module.named_parameters():
        check_finite(parameter, f"{found} ({name})", advice)


def unexpected(path: str | Path, problem: str, expected: str) -> ValueError:
    """The error of a file that is not what was expected.

    Args:
        path: the file.
        problem: what was found, a predicate: "is cut off".
        expected: description of the expected file.
    """
    return ValueError(f"{escaped(path)} {problem}. Expected {expected}.")


def file_states(path: str | Path) -> tuple[tuple[str, int, int], ...]:
    """The path, size and modification time of a file, or of each file in a folder: they change when it does."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return tuple((str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)


def check_file(path: str | Path, expected: str) -> None:
    """Raise ``FileNotFoundError`` or ``ValueError`` unless ``path`` is a file that is not empty."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {escaped(path)}. Expected {expected}.")
    if not Path(path).stat().st_size:
        raise unexpected(path, "is empty", expected)


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
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {escaped(path)}: fetch its folder again")
    if (length := Path(path).stat().st_size) > LONGEST_JSON:
        raise ValueError(f"{escaped(path)} has {length} bytes; a model's JSON has {LONGEST_JSON} at most")
    try:
        return parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{escaped(path)} {error}: fetch it again") from error


def parse_json(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text.

    Raises:
        ValueError: it is no JSON in UTF-8, too deep, or no object; the message is a predicate, without the file.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"is a JSON {type(content).__name__}, not an object")
    return content


def refuse_code(folder: str | Path) -> None:
    """Raise ``ValueError`` if a model's folder names Python code of its own (``auto_map``) to run."""
    for path in sorted(Path(folder).glob("*config.json")):
        if code := read_json(path).get("auto_map"):
            raise ValueError(
                f"{escaped(path)} names code of its own ({quoted(code)}), which is not run: take the model as released"
            )


UNREADABLE = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
"""Errors of safetensors, and of torch for what its header states."""


def _no_safetensors(path: str | Path, error: Exception, expected: str) -> ValueError:
    return unexpected(path, f"is cut off or not a safetensors file ({first_line(error)})", expected)


def _check_header(path: str | Path, expected: str) -> None:
    """Raise as :func:`check_file` does, and for a header that takes too long to read."""
    check_file(path, expected)
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if LONGEST_HEADER < length <= Path(path).stat().st_size:  # a longer one is another kind of file
        raise unexpected(path, f"has a header of {length} bytes, more than {LONGEST_HEADER}", expected)


@contextmanager
def _opened(path: str | Path, expected: str) -> Iterator[Any]:
    """A safetensors file, memory-mapped."""
    _check_header(path, expected)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except UNREADABLE as error:
        raise _no_safetensors(path, error, expected) from error
