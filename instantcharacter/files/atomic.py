"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it is renamed to ``path`` once the block ends without an error.

    Whatever interrupts the writing, even a power cut, ``path`` is the file that was there before or the new one, whole.
    Threads, processes and hosts may write one path at a time: the last to end wins.

    Raises:
        OSError: the disk is full or read-only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.part")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors makes its files private
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(path: str | Path, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """Raise ``OSError`` if ``path`` is anything but a file of this kind, an empty file, or a free name.

    Args:
        path: a file that is about to be written.
        kind: what may be replaced, for the error.
        is_kind: whether a file is of that kind.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and (not path.is_file() or (path.stat().st_size and not is_kind(path))):
        raise FileExistsError(f"{path} is there already and is not {kind}: delete it, or choose another name")
