"""Which weights a model has, told by what is in its files: what was computed with others is not taken for theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download

COUNTED = {".json", ".safetensors", ".bin", ".txt", ".model"}
"""The files that models and tokenizers are made of."""
WHOLE = 64 * 2**20
"""Bytes of a file that are all looked at; of a larger one, samples."""
SAMPLES, SAMPLE = 1024, 4096
"""How many those are, and the bytes of each. In a T5-XXL of one file they are 9 MB apart; its matrices have 33 MB."""


def fingerprint(source: str | Path, *parts: str) -> str:
    """32 hexadecimal digits for the contents of a model; of one on the hub, its revision.

    Contents, not times: a copy, a checkout or another machine's download has other times and the same weights, and what
    was computed with them took hours. A change that leaves every matrix of a large file as it is, and its size, goes
    unnoticed. A model that is nowhere is known by its name: whoever loads it says so.

    Args:
        source: a folder, hub id, or one file.
        parts: the folders in it that count, if not the whole.
    """
    path = Path(source)
    if not path.exists():
        return _revision(str(source), "model_index.json" if parts else "config.json")
    digest = hashlib.blake2b(digest_size=16)
    for file in _files(path, parts):
        size = file.stat().st_size
        digest.update(f"{file.parent.name if parts else ''}/{file.name} {size}\n".encode())
        for sample in _samples(file, size):
            digest.update(sample)
    return digest.hexdigest()


def _files(path: Path, parts: tuple[str, ...]) -> list[Path]:
    """A file and the config that may be beside it, or what counts in the folders."""
    if path.is_file():
        return [path, *(beside for beside in [path.parent / "config.json"] if beside.is_file())]
    folders = [path / part for part in parts if (path / part).is_dir()] if parts else [path]
    files = (file for folder in folders for file in sorted(folder.iterdir()))
    return [file for file in files if file.suffix in COUNTED and file.is_file()]


def _samples(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as opened:
        if size <= WHOLE:
            yield opened.read()
            return
        for i in range(SAMPLES):
            opened.seek(i * (size - SAMPLE) // (SAMPLES - 1))
            yield opened.read(SAMPLE)


def _revision(repo: str, config: str) -> str:
    """A hub model's commit, which the path of any of its files has in it."""
    try:
        return Path(hf_hub_download(repo, config)).parent.name
    except (OSError, ValueError):
        return repo
