"""Samples: a picture, what is to be said of it, and the picture that shows its character."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from .config import Source

Encoded: TypeAlias = "Path | bytes"
"""A picture as it comes: a file, or what would be in one."""

METADATA = "metadata.jsonl"
PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "image")
TEXTS = ("text", "txt", "caption")
REFERENCE = "reference"
REMEMBERED = 20
"""Bad samples that are named when there are too many."""


class BadSample(ValueError):
    """A sample that cannot be learned from, and why."""


@dataclass(frozen=True)
class Sample:
    """One sample; nothing of it is decoded.

    Attributes:
        name: to find it by.
        picture: what is to be drawn.
        text: what is said of it.
        reference: shows the character; the picture itself in an unpaired source.
    """

    name: str
    picture: Encoded
    text: str
    reference: Encoded


class Samples:
    """Samples of several sources, mixed by their shares, without end, the same for the same seed.

    Args:
        sources: where they come from.
        seed: of their order.

    Raises:
        FileNotFoundError: a source that is not there.
        ValueError: a source with nothing in it.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._sources = sources
        self._rows = [_rows(source) for source in sources]
        self._seed = seed

    def from_position(self, position: int) -> Iterator[Sample | BadSample]:
        """All samples but the first ``position``; one that is bad already comes as its error."""
        shares = [source.share for source in self._sources]
        rng = random.Random(f"{self._seed} sources")
        chosen = (rng.choices(range(len(shares)), shares)[0] for _ in count())
        done = [0] * len(shares)
        for _ in range(position):
            done[next(chosen)] += 1
        orders = [rows.ordered(f"{self._seed} {i}", start) for i, (rows, start) in enumerate(zip(self._rows, done))]
        for i in chosen:
            row = next(orders[i])
            try:
                yield _sample(row, self._sources[i])
            except BadSample as error:
                yield error


class Tally:
    """Counts bad samples, and says when there are too many.

    Attributes:
        allowed: fraction of samples.
    """

    allowed = 0.01

    def __init__(self) -> None:
        self.seen = 0
        self.bad: list[str] = []

    def count(self, error: BadSample | None = None) -> None:
        """One more sample, bad if there is an error.

        Raises:
            ValueError: more than one in a hundred are bad; names them.
        """
        self.seen += 1
        if error is None:
            return
        self.bad.append(str(error))
        if len(self.bad) > self.allowed * max(self.seen, 100):
            named = "\n".join(self.bad[:REMEMBERED])
            raise ValueError(f"{len(self.bad)} of {self.seen} samples are bad; mend or remove them:\n{named}")


class _Listed:
    """Rows that can be had in any order; each epoch has its own."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def ordered(self, seed: str, start: int) -> Iterator[dict[str, Any]]:
        for position in count(start):
            epoch, i = divmod(position, len(self._rows))
            if i == 0 or position == start:
                order = random.Random(f"{seed} {epoch}").sample(range(len(self._rows)), len(self._rows))
            yield {"name": order[i], **self._rows[order[i]]}


class _Streamed:
    """Rows in the order in which they come, again and again."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def ordered(self, seed: str, start: int) -> Iterator[dict[str, Any]]:
        while True:
            seen = 0
            for seen, row in enumerate(self._rows, 1):
                if start:
                    start -= 1
                else:
                    yield {"name": seen - 1, **row}
            if not seen:
                raise ValueError("a streamed source came without samples")


def _rows(source: Source) -> _Listed | _Streamed:
    if (Path(source.path) / METADATA).is_file():
        return _Listed(_folder(Path(source.path)))
    if Path(source.path).is_dir() and not any(Path(source.path).rglob("*.parquet")):
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
    return _Streamed(loaded) if source.stream else _Listed(loaded)


def _folder(folder: Path) -> list[dict[str, Any]]:
    """An image folder's rows; a line that is not JSON becomes a row that says so."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append({"text": row.get("text"), "image": folder / row["file_name"]})
            if REFERENCE in row:
                rows[-1][REFERENCE] = folder / row[REFERENCE]
        except (ValueError, KeyError, TypeError, AttributeError):
            rows.append({"name": f"{METADATA} line {number}", "text": None})
    if not rows:
        raise ValueError(f"{folder / METADATA} is empty")
    return rows


def _sample(row: dict[str, Any], source: Source) -> Sample:
    picture = _first(row, (name for name in row if name.split(".")[-1] in PICTURE_ENDINGS and REFERENCE not in name))
    text = _first(row, TEXTS)
    reference = _first(row, (name for name in row if name.startswith(REFERENCE))) if source.pairs else picture
    name = f"{source.path}: {picture if isinstance(picture, Path) else row.get('__key__', row['name'])}"
    if picture is None:
        raise BadSample(f"{name}: no picture")
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"{name}: no text")
    if reference is None:
        raise BadSample(f"{name}: no reference, in a source of pairs")
    return Sample(name, picture, text.strip(), reference)


def _first(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The first of these that a row has; an undecoded picture of ``datasets`` as its bytes or its file."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, dict):
        return value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value
