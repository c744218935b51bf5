"""Which weights are views of a memory-mapped file, and so cost no memory of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


def copied(tensors: Iterable[Tensor], *files: Path) -> list[Tensor]:
    """The tensors whose data do not lie in one of these files, mapped into memory."""
    names = {str(file.resolve()) for file in files}
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *fields = line.split(maxsplit=5)
        if fields[-1] in names:
            ranges.append([int(address, 16) for address in addresses.split("-")])
    return [t for t in tensors if t.numel() and not any(first <= t.data_ptr() < last for first, last in ranges)]
