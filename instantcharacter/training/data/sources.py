"""Rows of a source, shuffled or streamed: image folders, WebDataset shards, datasets of the hub."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ..config import Source
from .image_folder import METADATA, read_rows

Row = dict[str, Any]


class Rows(Protocol):
    """Rows without end."""

    def from_position(self, seed: str, position: int) -> Iterator[Row]:
        """All rows but the first ``position``; each has a ``name``."""


class ShuffledRows:
    """Rows in random access, in another order each epoch."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def from_position(self, seed: str, position: int) -> Iterator[Row]:
        order: list[int] = []
        for at in count(position):
            epoch, i = divmod(at, len(self._rows))
            if i == 0 or not order:
                order = random.Random(f"{seed} {epoch}").sample(range(len(self._rows)), len(self._rows))
            yield {"name": order[i], **self._rows[order[i]]}


class StreamedRows:
    """Rows in their own order, from the first again after the last."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def from_position(self, seed: str, position: int) -> Iterator[Row]:
        while True:
            number = 0
            for number, row in enumerate(self._rows, 1):
                if position:
                    position -= 1
                else:
                    yield {"name": number - 1, **row}
            if not number:
                raise ValueError("a streamed source came without samples")


def open_source(source: Source) -> Rows:
    """The rows of a source.

    Raises:
        FileNotFoundError: the folder has neither a ``metadata.jsonl`` nor parquet files.
        ValueError: an image folder without rows.
    """
    path = Path(source.path)
    if (path / METADATA).is_file():
        return ShuffledRows(read_rows(path))
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise FileNotFoundError(
            f"{source.path} has no {METADATA}: a line for each picture, "
            '{"file_name": "a.png", "text": "…"}, and "reference" for pairs'
        )
    import datasets

    if source.path.endswith(".tar"):
        loaded = datasets.load_dataset("webdataset", data_files=source.path, split="train", streaming=source.stream)
    else:
        loaded = datasets.load_dataset(source.path, split="train", streaming=source.stream)
    for name, feature in (loaded.features or {}).items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return StreamedRows(loaded) if source.stream else ShuffledRows(loaded)
