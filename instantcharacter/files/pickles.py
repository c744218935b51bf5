"""Reading of ``torch.save`` files: tensors, numbers, texts and containers. Nothing that a file names is ever called.

A pickle is a program for a stack. Here its instructions act on data alone: the name of a function stays a name, and of
the calls only those that torch writes for plain tensors and dictionaries have a meaning. So the reading is as safe with
any version of torch. The file is a zip of the program and of an entry for each tensor's bytes, which are memory-mapped:
an entry has to be stored as it is, and to be as long as its tensors say.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import first_line, quoted

LONGEST = 2 << 20
"""Bytes of a program, and of a zip's directory, at most: 7,000 tensors, which take two seconds to read."""
DTYPES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
} | {str(dtype): dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
"""Names in a program → dtypes: of a storage, or of a tensor in one of bytes."""
BYTES = "torch.storage.UntypedStorage"
PLAIN, PLAIN_IN_BYTES, PARAMETER = (f"torch._utils._rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter"))
DICTIONARY, SIZE = "collections.OrderedDict", "torch.Size"
NAMES = {*DTYPES, BYTES, PLAIN, PLAIN_IN_BYTES, PARAMETER, DICTIONARY, SIZE}
"""The names that a program may hold."""


class Unsafe(ValueError):
    """A program that asks for more than tensors and containers."""


@dataclass(frozen=True)
class _Name:
    """A name in a program, of a function, a class or a dtype."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of tensors, and the dtype of their numbers, None for bytes."""

    content: torch.UntypedStorage
    dtype: torch.dtype | None


def load(path: Path) -> Any:
    """The content of a ``torch.save`` file; its tensors are memory-mapped, on the CPU, without gradients.

    Raises:
        Unsafe: the file would have functions called, or holds tensors that are not plain.
        ValueError: the file is no zip of torch's, cut off, compressed, or contradicts itself; without the path.
    """
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            return _Program(path, file, archive).run()
    except Unsafe:
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(first_line(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its content is damaged: {first_line(error)}") from error


class _BoundedFile(io.FileIO):
    """A file of which at most :data:`LONGEST` bytes are read at once, whatever a zip's directory states."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST:
            raise ValueError(f"a part is {size} bytes long, more than {LONGEST}")
        return super().read(size)


class _Program:
    """The program of a file, and the entries that it refers to."""

    def __init__(self, path: Path, file: io.FileIO, archive: zipfile.ZipFile) -> None:
        self._file, self._archive = file, archive
        self._entries = {info.filename: info for info in archive.infolist()}
        self._root = next(iter(self._entries), "").partition("/")[0]
        self._length = path.stat().st_size
        self._content = torch.UntypedStorage.from_file(str(path), False, self._length)
        self._storages: dict[str, _Storage] = {}
        self._tensor_bytes = 0
        self._stack: list[Any] = []
        self._stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        if packed := [name for name, info in self._entries.items() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"it was zipped again, with compression ({quoted(packed[0])}): take it as torch wrote it")
        if f"{self._root}/byteorder" in self._entries and self._read("byteorder") != b"little":
            raise ValueError("it was written on a machine of another byte order")
        for opcode, argument, _ in pickletools.genops(self._read("data.pkl")):
            if opcode.name in CONSTANTS:
                self._stack.append(CONSTANTS[opcode.name])
            elif opcode.name in LITERALS:
                self._stack.append(argument)
            elif opcode.name in INSTRUCTIONS:
                INSTRUCTIONS[opcode.name](self, argument)
            elif opcode.name != "STOP":
                raise Unsafe(f"the pickle instruction {opcode.name}")
        return self._stack.pop()

    def _read(self, name: str) -> bytes:
        info = self._entries[f"{self._root}/{name}"]
        if info.flag_bits & 1 or info.file_size > LONGEST or info.header_offset < 0:
            raise ValueError(f"{name} is encrypted, longer than {LONGEST} bytes, or before the file")
        return self._archive.read(info)

    # Instructions

    def _nothing(self, _: Any) -> None:
        pass

    def _mark(self, _: Any) -> None:
        self._stacks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        """What lies above the last mark, which is removed."""
        items, self._stack = self._stack, self._stacks.pop()
        return items

    def _empty(self, kind: type) -> None:
        self._stack.append(kind())

    def _tuple(self, length: int | None) -> None:
        items = self._marked() if length is None else [self._stack.pop() for _ in range(length)][::-1]
        self._stack.append(tuple(items))

    def _remember(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _recall(self, place: int) -> None:
        """Put what was remembered on the stack: no container of containers, which could hold itself, or many others."""
        value = self._memo[place]
        if isinstance(value, (dict, list)) or (isinstance(value, tuple) and not all(map(_is_scalar, value))):
            raise ValueError("a container in two places")
        if isinstance(value, Tensor):
            self._count(value.nbytes)
        self._stack.append(value)

    def _count(self, length: int) -> None:
        """Count bytes of a tensor; all tensors are of the file, give or take a few that share theirs."""
        self._tensor_bytes += length
        if self._tensor_bytes > 2 * self._length:
            raise ValueError("its tensors repeat the same bytes, and are larger than the file")

    def _append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise ValueError("items of what is no list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        keys = items[::2]
        if not isinstance(self._stack[-1], dict) or not all(type(key) in (str, int) for key in keys):
            raise ValueError("items of what is no dictionary, or keys that are neither text nor number")
        self._stack[-1].update(zip(keys, items[1::2], strict=True))

    def _name(self, text: str) -> None:
        name = ".".join(text.split(" "))
        if name not in NAMES:
            raise Unsafe(name)
        self._stack.append(_Name(name))

    def _name_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "no name")

    def _build(self, _: Any) -> None:
        """Attributes of an object, such as those of a state dict, are dropped."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise Unsafe("the attributes of what is no dictionary")

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        plain = self._plain
        build: dict[str, Callable[..., Any]]
        build = {DICTIONARY: dict, SIZE: tuple, PLAIN: plain, PLAIN_IN_BYTES: plain, PARAMETER: _first}
        if not isinstance(function, _Name) or function.text not in build or not isinstance(arguments, tuple):
            raise Unsafe(f"a call of {function.text if isinstance(function, _Name) else type(function).__name__}")
        if function.text == DICTIONARY and arguments:
            raise ValueError("a dictionary with arguments")
        self._stack.append(build[function.text](*arguments))

    def _storage(self, _: Any) -> None:
        kind, name, key, _location, length = self._stack.pop()
        if kind != "storage" or not isinstance(key, str):
            raise ValueError(f"a reference to {quoted(kind)}")
        if key not in self._storages:
            dtype = None if name.text == BYTES else DTYPES[name.text]
            self._storages[key] = _Storage(self._bytes(key, length * (dtype.itemsize if dtype else 1)), dtype)
        self._stack.append(self._storages[key])

    def _bytes(self, key: str, length: int) -> torch.UntypedStorage:
        """The bytes of an entry, memory-mapped."""
        info = self._entries[f"{self._root}/data/{key}"]
        if info.file_size != length or info.flag_bits & 1 or info.header_offset < 0:
            raise ValueError(f"data/{quoted(key)} has {info.file_size} bytes, its tensors have {length}")
        self._file.seek(info.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", self._file.read(30))
        start = info.header_offset + 30 + name + extra
        if signature != b"PK\3\4" or start + length > self._length:
            raise ValueError(f"data/{quoted(key)} reaches beyond the file")
        content = self._content[start : start + length]
        return content.clone() if start % 8 else content

    def _plain(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        _requires_grad: bool,
        _hooks: dict,
        *rest: Any,
    ) -> Tensor:
        """A plain tensor in a storage; of one of bytes, its dtype comes first in ``rest``."""
        dtype = storage.dtype or DTYPES[rest[0].text]
        if any(rest if storage.dtype else rest[1:]):
            raise ValueError("a conjugated or negated tensor")
        items = storage.content.nbytes() // dtype.itemsize
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"a tensor of size {quoted(size)} and stride {quoted(stride)}")
        count = 1
        for extent in size:
            count *= extent
        if count > items or offset + sum((n - 1) * step for n, step in zip(size, stride)) >= max(items, 1):
            raise ValueError(f"a tensor of size {quoted(size)} in a storage of {items} numbers")
        self._count(count * dtype.itemsize)
        return torch.empty(0, dtype=dtype).set_(storage.content, offset, size, stride)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, bytes, int, float, _Name))


def _first(tensor: Any, *_: Any) -> Any:
    return tensor


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
}
INSTRUCTIONS: dict[str, Callable[[_Program, Any], None]] = {
    "PROTO": _Program._nothing,
    "FRAME": _Program._nothing,
    "MARK": _Program._mark,
    "EMPTY_DICT": lambda program, _: program._empty(dict),
    "EMPTY_LIST": lambda program, _: program._empty(list),
    "EMPTY_TUPLE": lambda program, _: program._empty(tuple),
    "TUPLE": lambda program, _: program._tuple(None),
    "TUPLE1": lambda program, _: program._tuple(1),
    "TUPLE2": lambda program, _: program._tuple(2),
    "TUPLE3": lambda program, _: program._tuple(3),
    "BINPUT": _Program._remember,
    "LONG_BINPUT": _Program._remember,
    "MEMOIZE": _Program._remember,
    "BINGET": _Program._recall,
    "LONG_BINGET": _Program._recall,
    "APPEND": lambda program, _: program._append([program._stack.pop()]),
    "APPENDS": lambda program, _: program._append(program._marked()),
    "SETITEM": lambda program, _: program._set([program._stack.pop(), program._stack.pop()][::-1]),
    "SETITEMS": lambda program, _: program._set(program._marked()),
    "GLOBAL": _Program._name,
    "INST": _Program._name,
    "STACK_GLOBAL": _Program._name_on_stack,
    "REDUCE": _Program._call,
    "BUILD": _Program._build,
    "BINPERSID": _Program._storage,
}
"""The instructions that torch writes, and those by which others name code."""
