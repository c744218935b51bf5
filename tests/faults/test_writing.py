"""Writing that is killed, or that the disk refuses: what was there stays whole, and the next writing is right."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import recorded
from support.full_disk import full_disk

from instantcharacter import Character
from instantcharacter.files.atomic import atomic_write
from instantcharacter.files.writing import write_pickle

KINDS = {
    "character": "a.safetensors",
    "adapter": "a.safetensors",
    "released": "a.bin",
    "state": "state.pt",
    "picture": "a.png",
}
SIZE = {"character": 500_000, "adapter": 500_000, "released": 500_000, "state": 100_000, "picture": 20_000}
"""A number of bytes within each file, most of the way."""


def kinds() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def writers() -> dict[str, Callable[[Path, int], Any]]:
    """Functions that write a file of each kind, its content by number."""
    adapters = [recorded.adapter(), recorded.adapter()]
    with torch.no_grad():
        next(adapters[1].parameters()).add_(1)
    noise = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 1, 1458, 96, generator=noise)
    pictures = [Image.effect_noise((200, 200), 50 + number).convert("RGB") for number in range(2)]
    return {
        "character": lambda path, number: Character(fused[number : number + 1, 0], "0" * 32).save(path),
        "adapter": lambda path, number: adapters[number].save(path),
        "released": lambda path, number: adapters[number].save(path),
        "state": lambda path, number: write_pickle(path, {"step": number, "weights": fused[number, 0, :300].clone()}),
        "picture": lambda path, number: write_picture(path, pictures[number]),
    }


def write_picture(path: Path, picture: Image.Image) -> None:
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG")


@pytest.fixture
def there(tmp_path: Path, writers: dict[str, Callable[[Path, int], Any]], kind: str) -> Callable[[int], None]:
    """A file of the kind is there; returns a function that writes another over it."""
    path = tmp_path / KINDS[kind]
    writers[kind](path, 0)
    return lambda number: writers[kind](path, number)


@contextmanager
def unharmed(folder: Path, kind: str, write: Callable[[int], None]) -> Any:
    """The file is the one from before, byte for byte; the next writing is right and leaves nothing else."""
    path = folder / KINDS[kind]
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before
    for part in folder.rglob("*"):
        os.utime(part, (time.time() - 7200,) * 2, follow_symlinks=False)
    write(1)
    changed = path.read_bytes()
    assert changed != before
    assert [part.name for part in folder.iterdir()] == [path.name]
    write(0)
    if kind != "picture":
        assert len(path.read_bytes()) == len(before)


def killed(write: Callable[[], None]) -> int:
    """The signal that ended a process that wrote, 0 if none did."""
    child = os.fork()
    if not child:
        try:
            write()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@kinds()
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_killed_at_a_byte(tmp_path, there, kind, share):
    """The system kills a process at the first byte beyond the limit on its files (``SIGXFSZ``)."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * SIZE[kind]),) * 2)
        there(1)

    with unharmed(tmp_path, kind, there):
        assert killed(write) == signal.SIGXFSZ


@kinds()
@pytest.mark.parametrize("call", ["mkdir", "open", "chmod", "fsync", "replace"])
def test_killed_at_a_call_of_the_system(tmp_path, there, kind, call):
    """By ``kill -9``, before the file has its name."""

    def write() -> None:
        setattr(os, call, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        there(1)

    if call == "open":  # by the folder's synchronization alone, after the renaming
        assert killed(write) == signal.SIGKILL
        assert (tmp_path / KINDS[kind]).stat().st_size
        return
    with unharmed(tmp_path, kind, there):
        assert killed(write) == signal.SIGKILL


@kinds()
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_full_disk(tmp_path, there, kind, share):
    path = tmp_path / KINDS[kind]
    with unharmed(tmp_path, kind, there):
        with pytest.raises(OSError) as raised, full_disk(int(share * SIZE[kind])):
            there(1)
        assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
        assert [part.name for part in tmp_path.iterdir()] == [path.name]


@kinds()
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["mkdir", "chmod", "fsync", "replace"])
def test_system_refuses(tmp_path, there, kind, call, number, monkeypatch):
    """As on a read-only, full or broken disk."""
    path = tmp_path / KINDS[kind]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with unharmed(tmp_path, kind, there):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuse)
            with pytest.raises(OSError) as raised:
                there(1)
        assert (raised.value.errno, raised.value.filename) == (number, str(path))
        assert [part.name for part in tmp_path.iterdir()] == [path.name]
