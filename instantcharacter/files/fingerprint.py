"""Identifies files and models by their content: outputs belong to one set of weights and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import hf_hub_download

COUNTED = {".json", ".safetensors", ".bin", ".txt", ".model"}
"""Endings of the files of models and tokenizers."""
WHOLE = 64 * 2**20
"""Largest file, in bytes, that is hashed as a whole; of a larger one, samples are."""
SAMPLES, SAMPLE = 1024, 4096
"""Number and bytes of the samples. In a T5-XXL of one file they are 9 MB apart; its matrices have 33 MB."""


def fingerprint(source: str | Path, *parts: str) -> str:
    """32 hexadecimal digits of a model's content, or the revision of a hub model.

    Content, not modification times: a copy or another machine's download has the same weights and other times. A change
    that keeps a large file's size and misses all of its samples is not noticed. A model that is found neither on disk
    nor on the hub is identified by its name; loading it raises the error.

    Args:
        source: a folder, hub id, or one file.
        parts: the subfolders that count; all files if there are none.
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


def content_digest(value: Path | bytes | str) -> str:
    """32 hexadecimal digits of a file's content, of bytes or of a text."""
    digest = hashlib.blake2b(digest_size=16)
    if not isinstance(value, Path):
        digest.update(value.encode() if isinstance(value, str) else value)
        return digest.hexdigest()
    with value.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(path: Path, parts: tuple[str, ...]) -> list[Path]:
    """One file and the ``config.json`` beside it, or the counted files of the folders."""
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
    """A hub model's commit, which is in the path of each downloaded file."""
    try:
        return Path(hf_hub_download(repo, config)).parent.name
    except (OSError, ValueError):
        return repo
