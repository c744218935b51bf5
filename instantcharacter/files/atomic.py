"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

SILENCE = 3600.0
"""Seconds without a change, by the disk's own clock, after which a partial file belongs to a process that is gone."""

TRIES = 100
"""How often another writer may end just as this one begins, in a row, before that is an error."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to ``path`` once the block ends without an error.

    Whatever interrupts the writing, even a power cut, ``path`` is the file that was there before or the new one, whole.
    Threads, processes and hosts may write one path at a time: the last to end wins. Each writes into a folder of its
    own in ``.NAME.part``; what killed processes left there goes with the next write of that name.

    Raises:
        OSError: the disk is full or read-only; it names ``path``.
    """
    path = Path(path)
    try:
        with _own_folder(path) as folder:
            partial = folder / "partial"  # without the ending of ``path``, by which others would find it
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)  # safetensors makes its files private
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
    except OSError as error:
        if error.errno and (error.filename is None or f".{path.name}.part" in Path(os.fsdecode(error.filename)).parts):
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def check_writable(path: str | Path) -> None:
    """Raise ``OSError`` unless :func:`atomic_write` can make its temporary file; no file is touched."""
    with _own_folder(Path(path)):
        pass


def clear_leftovers(folder: str | Path) -> None:
    """Remove what killed processes left in a folder and below it, once nothing has changed for :data:`SILENCE`."""
    for parent, names, _ in os.walk(folder):  # passes by what writers remove meanwhile
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                with suppress(OSError):  # a writer has it, or had it until now
                    _clear_leftovers(Path(parent, name), time.time())
                    Path(parent, name).rmdir()


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


@contextmanager
def _own_folder(path: Path) -> Iterator[Path]:
    """A new folder in ``.NAME.part`` beside ``path``; both go afterwards, the latter if no other writer has it."""
    shared = path.with_name(f".{path.name}.part")
    folder = shared / uuid4().hex
    for tries_left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True)
            break
        except (FileNotFoundError, FileExistsError):  # another writer removed ``shared`` after it was made or met
            if not tries_left:
                raise
    try:
        _clear_leftovers(shared, folder.stat().st_mtime)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            shared.rmdir()


def _clear_leftovers(shared: Path, now: float) -> None:
    """Remove the folders in which nothing has changed for :data:`SILENCE`."""
    for folder in shared.iterdir():
        with suppress(OSError):  # its writer ended
            if now - max(part.stat().st_mtime for part in (folder, *folder.iterdir())) > SILENCE:
                shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the new name, where the system can: Windows and some network disks cannot."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
