"""Files that change while they are in use: cut off, replaced, or gone, before they are read or after."""

from __future__ import annotations

import faulthandler
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import recorded

from instantcharacter import Character, CharacterAdapter
from instantcharacter.files.pictures import open_picture

SHARES = [0.0, 0.0005, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999]
NAMES = {"character": "a.safetensors", "adapter": "a.safetensors", "released": "a.bin", "picture": "a.png"}


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    """A file of the kind."""
    path = tmp_path / NAMES[kind]
    if kind == "character":
        Character(torch.ones(1, 50, 96), "0" * 32, Image.new("RGB", (8, 8))).save(path)
    elif kind == "picture":
        Image.effect_noise((60, 60), 80).convert("RGB").save(path)
    else:
        recorded.adapter().save(path)
        path.with_suffix(".json").unlink(missing_ok=True)
    return path


def read(kind: str, path: Path) -> Callable[[], list[Any]]:
    """Reads a file; returns a function for what is used of it later."""
    if kind == "picture":
        image = open_picture(path)
        return lambda: [image.tobytes()]
    if kind == "character":
        character = Character.load(path)
        return lambda: character.fused.flatten().tolist()
    adapter = (
        CharacterAdapter.from_file(path) if kind == "adapter" else CharacterAdapter.from_file(path, recorded.sizes())
    )
    return lambda: [float(weight.detach().sum()) for weight in adapter.parameters()]


@pytest.mark.parametrize("kind", ["character", "adapter", "picture"])
@pytest.mark.parametrize("share", SHARES)
def test_cut_off_before_it_is_read(path, kind, share):
    if kind == "picture":
        share = min(share, 0.9)  # beyond that, all of the pixels may be there
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(ValueError, match=path.name):
        read(kind, path)


@pytest.mark.parametrize("kind", ["character", "adapter", "picture"])
@pytest.mark.parametrize("change", ["deleted", "renamed over", "a folder in its place", "written anew by another"])
def test_changed_after_it_was_read(path, kind, change, tmp_path):
    before = read(kind, path)()
    use = read(kind, path)
    other = tmp_path / "other"
    other.write_bytes(b"x" * path.stat().st_size)
    if change == "renamed over":
        other.replace(path)
    else:
        path.unlink()
        if change == "a folder in its place":
            path.mkdir()
        elif change == "written anew by another":
            shutil.copy(other, path)
    assert use() == before


@pytest.mark.parametrize("kind", ["character", "picture"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("change", ["cut off", "overwritten"])
def test_changed_in_place_after_it_was_read(path, kind, share, change):
    """What is small is read whole: a memory-mapped file that is cut off ends the process (``SIGBUS``)."""
    before = read(kind, path)()
    child = os.fork()
    if not child:
        faulthandler.disable()
        same = False
        try:
            use, size = read(kind, path), path.stat().st_size
            if change == "cut off":
                os.truncate(path, int(share * size))
            else:
                with path.open("rb+") as file:
                    file.seek(int(share * size))
                    file.write(b"\xff" * (size - int(share * size)))
            same = use() == before
        finally:
            os._exit(0 if same else 3)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kind", ["character", "adapter", "picture"])
@pytest.mark.parametrize("change", ["deleted", "a folder in its place", "a loop", "no permission"])
def test_gone_before_it_is_read(path, kind, change, monkeypatch):
    path.unlink()
    if change == "a folder in its place":
        path.mkdir()
    elif change == "a loop":
        path.symlink_to(path)
    with pytest.raises((OSError, ValueError), match=path.name):
        read(kind, path)
