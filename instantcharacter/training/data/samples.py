"""Samples: a picture, its caption, and the picture that shows its character."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from ..config import Source
from .image_folder import AmbiguousName, find_on_disk
from .sources import Row, open_source

Encoded: TypeAlias = "Path | bytes"
"""A picture that is not decoded yet: a file, or a file's content."""

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp", "image")
TEXTS = ("text", "txt", "caption")
REFERENCE = "reference"


class BadSample(ValueError):
    """A sample that the training skips, and why."""


@dataclass(frozen=True)
class Sample:
    """One sample, not decoded.

    Attributes:
        name: source and file, for error messages.
        picture: the target.
        text: the target's caption.
        reference: a picture of the character; the target itself in an unpaired source.
    """

    name: str
    picture: Encoded
    text: str
    reference: Encoded


class Samples:
    """Samples of several sources without end, mixed by their shares; the order follows from the seed.

    Raises:
        FileNotFoundError: a source is missing.
        ValueError: a source is empty.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._sources = sources
        self._rows = [open_source(source) for source in sources]
        self._seed = seed

    def from_position(self, position: int) -> Iterator[Sample | BadSample]:
        """All samples but the first ``position``; a row that is no sample comes as its error."""
        shares = [source.share for source in self._sources]
        rng = random.Random(f"{self._seed} sources")
        chosen = (rng.choices(range(len(shares)), shares)[0] for _ in count())
        taken = [0] * len(shares)
        for _ in range(position):
            taken[next(chosen)] += 1
        starts = enumerate(zip(self._rows, taken))
        rows = [source.from_position(f"{self._seed} {i}", start) for i, (source, start) in starts]
        for i in chosen:
            row = next(rows[i])
            try:
                yield _to_sample(row, self._sources[i])
            except BadSample as error:
                yield error


def _to_sample(row: Row, source: Source) -> Sample:
    picture = _first(row, (name for name in row if name.split(".")[-1] in PICTURE_ENDINGS and REFERENCE not in name))
    text = _first(row, TEXTS)
    reference = _first(row, (name for name in row if name.startswith(REFERENCE))) if source.pairs else picture
    name = f"{source.path}: {picture if isinstance(picture, Path) else row.get('__key__', row['name'])}"
    if picture is None:
        raise BadSample(f"{name}: no picture{row.get('why', '')}")
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"{name}: no text")
    if not text.isascii() and any(unicodedata.category(letter) == "Cs" for letter in text):
        raise BadSample(f"{name}: half a letter in the text (a lone surrogate, such as \\ud83d)")
    if reference is None:
        raise BadSample(f"{name}: no reference, in a source of pairs")
    try:
        files = [find_on_disk(part) if isinstance(part, Path) else part for part in (picture, reference)]
    except AmbiguousName as error:
        raise BadSample(str(error)) from error
    return Sample(name, files[0], text.strip(), files[1])


def _first(row: Row, names: Iterable[str]) -> Any:
    """The first of these columns that has a value; an undecoded picture of ``datasets`` as bytes or file."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, dict):
        return value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value
