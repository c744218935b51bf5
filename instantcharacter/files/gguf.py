"""The header of a GGUF file, checked against the file before the package ``gguf`` reads it.

The package believes what a header states: it walks through an array of any length, and copies each tensor's bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""The kinds of values → bytes of one; :data:`TEXT` and :data:`ARRAY` are the others."""
TEXT, ARRAY = 8, 9
TENSORS = {
    **{0: (1, 4), 1: (1, 2), 30: (1, 2)},
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 23: (256, 136)},
}
"""The kinds of tensors → elements in a block, and its bytes. diffusers reads no others."""
MOST = 1 << 20
"""The most values, items of arrays and tensors in a header, and the most bytes of a text."""


def check_header(path: Path) -> None:
    """Check that a header ends, and that its tensors fill no more than the file.

    Args:
        path: the file.

    Raises:
        ValueError: the header is damaged; the message is without the path.
    """
    with path.open("rb") as file:
        try:
            _Header(file, path.stat().st_size).check()
        except (struct.error, LookupError, UnicodeDecodeError) as error:
            raise ValueError(f"its header is cut off or damaged, at byte {file.tell()}") from error


class _Header:
    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length, self._items = file, length, 0

    def check(self) -> None:
        magic, version, tensors, values = self._read("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}; expected GGUF 2 or 3")
        self._count(tensors + values)
        for _ in range(values):
            self._text()
            self._value(*self._read("<I"))
        total = 0
        for _ in range(tensors):
            self._text()
            (rank,) = self._read("<I")
            if not 1 <= rank <= 4:
                raise ValueError(f"a tensor has {rank} dimensions")
            *sizes, kind, offset = self._read(f"<{rank}QIQ")
            elements = 1
            for size in sizes:
                elements *= size
            items, length = TENSORS.get(kind, (8, 1))
            total += (used := elements // items * length)
            if not elements or max(total, offset + used) > self._length:
                raise ValueError(f"a tensor of {sizes} is empty, or reaches beyond the file")

    def _read(self, layout: str) -> tuple:
        return struct.unpack(layout, self._file.read(struct.calcsize(layout)))

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MOST:
            raise ValueError(f"its header states {self._items} items; expected {MOST} at most")

    def _text(self) -> str:
        (length,) = self._read("<Q")
        if length > MOST:
            raise ValueError(f"its header states a text of {length} bytes")
        return self._file.read(length).decode()

    def _value(self, kind: int) -> None:
        if kind == TEXT:
            self._text()
        elif kind != ARRAY:
            self._skip(NUMBERS[kind])
        else:
            kind, items = self._read("<IQ")
            self._count(items)
            if kind in NUMBERS:
                self._skip(items * NUMBERS[kind])
            elif kind == TEXT:
                for _ in range(items):
                    self._text()
            else:
                raise ValueError(f"its header has an array of kind {kind}")

    def _skip(self, length: int) -> None:
        if self._file.seek(length, 1) > self._length:
            raise ValueError("its header reaches beyond the file")
