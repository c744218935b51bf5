"""Writing of tensors, whole or not at all; what fails is an ``OSError`` with the file's path."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .atomic import atomic_write
from .errors import first_line


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: the disk is full or read-only; a file that was there before is unchanged.
    """
    with atomic_write(path) as partial, _os_errors(Path(path)):
        save_file(dict(tensors), partial, dict(metadata) if metadata else None)


def write_pickle(path: str | Path, content: Any) -> None:
    """Write a ``torch.save`` file, whole or not at all; errors as those of :func:`write_safetensors`."""
    with atomic_write(path) as partial, _os_errors(Path(path)), partial.open("wb") as file:
        torch.save(content, file)  # to a path torch would hide the system's error


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn the libraries' errors of writing into ``OSError`` with the system's number, where they tell it."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        number = _system_error(error)
        raise OSError(number or errno.EIO, os.strerror(number) if number else first_line(error), str(path)) from error


def _system_error(error: BaseException | None) -> int | None:
    """The number of the system's error that an error is about, or was raised after."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if found := re.search(r"os error (\d+)|Os \{ code: (\d+)", str(error)):
            return int(found[1] or found[2])
        error = error.__context__
    return None
