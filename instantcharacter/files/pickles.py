"""Reading of ``torch.save`` files: tensors, numbers, texts and containers, memory-mapped; no code in them is run.

torch's own restricted reader does it. Before, the file's program is checked without running it: its names, its
instructions, and its length. Afterwards its tensors are checked: that reader takes packed bytes for numbers, and reads
beyond an entry that is too short.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from .errors import first_line, quoted

SAFE_TORCH = Version("2.6")
"""Files can have older versions run code, CVE-2025-32434."""
LONGEST = 2 << 20
"""Bytes of a program, and of a zip's directory, at most: 7,000 tensors, which take two seconds to read."""
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {
    *(f"torch {kind}Storage" for kind in STORAGES),
    *(f"torch float8_{kind}" for kind in ("e4m3fn", "e5m2")),
    *("torch.storage UntypedStorage", "torch Size", "collections OrderedDict"),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")),
}
"""The names of modules and what is in them that a program may hold: those of plain tensors and dictionaries."""
CALLS = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
"""Instructions that call or name what the program computed; torch writes none of them."""
REPEATED = {"BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "REDUCE"}
"""Instructions whose results may be in several places: texts, names and tensors. Comparing containers in containers,
each in two places, never ends."""


class Unsafe(ValueError):
    """A program that asks for more than tensors and containers; the message is what it asks for."""


def load(path: Path) -> Any:
    """The content of a ``torch.save`` file; its tensors are memory-mapped, on the CPU.

    Raises:
        Unsafe: the file would have functions called.
        ValueError: the file is no zip of torch's, cut off, compressed, or contradicts itself; without the path.
    """
    if Version(torch.__version__) < SAFE_TORCH:
        raise ValueError(f"torch {torch.__version__} might run code in it: update torch to {SAFE_TORCH} or newer")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _stored_entries(archive)
            _check_program(_program(archive))
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(first_line(error)) from error
    except pickle.UnpicklingError as error:  # its message is advice to load without the restriction
        raise ValueError("its program is damaged") from error
    except (RuntimeError, LookupError, TypeError, AttributeError, OverflowError, EOFError, struct.error) as error:
        raise ValueError(f"its content is damaged: {first_line(error)}") from error
    _check_tensors(list(_tensors(content)), Counter(entries), path.stat().st_size)
    return content


def _stored_entries(archive: zipfile.ZipFile) -> list[int]:
    """The lengths of a file's entries, none of which is compressed."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            name = quoted(info.filename)
            raise ValueError(f"it was zipped again, with compression ({name}): take it as torch wrote it")
    return [info.file_size for info in archive.infolist()]


def _program(archive: zipfile.ZipFile) -> bytes:
    """The pickle, without what follows its end."""
    programs = [info for info in archive.infolist() if Path(info.filename).name == "data.pkl"]
    if len(programs) != 1 or programs[0].file_size > LONGEST:
        raise ValueError(f"its program is missing, there twice, or longer than {LONGEST} bytes")
    return archive.read(programs[0])


def _check_program(program: bytes) -> None:
    """Check the names and instructions of a pickle, which is not run."""
    remembered: dict[Any, str] = {}
    before = ""
    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name in CALLS:
            raise Unsafe(f"the pickle instruction {opcode.name}")
        if opcode.name == "GLOBAL" and argument not in NAMES:
            raise Unsafe(argument.replace(" ", "."))
        if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            remembered[len(remembered) if argument is None else argument] = before
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and remembered.get(argument) not in REPEATED:
            raise ValueError("it has a container in two places")
        elif opcode.name != "MEMOIZE":
            before = opcode.name


def _tensors(content: Any) -> Iterator[Tensor]:
    """The tensors in containers, however deep."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value


def _check_tensors(tensors: list[Tensor], entries: Counter[int], length: int) -> None:
    """Check that tensors are as long as the entries of their file, which is ``length`` bytes long."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if short := [*(Counter(storages.values()) - entries - Counter({0: len(storages)}))]:
        raise ValueError(f"a tensor has {short[0]} bytes, and no part of the file has as many")
    repeated = any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in tensors)
    if repeated or sum(tensor.nbytes for tensor in tensors) > 2 * length:
        raise ValueError("its tensors repeat the same bytes, and are larger than the file")
