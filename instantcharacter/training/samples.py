"""Samples: a picture, what is to be said of it, and the picture that shows its character."""

from __future__ import annotations

import json
import logging
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from .config import Source

logger = logging.getLogger(__name__)

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
        if str(error) not in self.bad:
            logger.warning("skipped %s", error)
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
    """An image folder's rows; a line that is no sample becomes a row that says why."""
    numbered = enumerate(_lines(folder / METADATA), 1)
    rows = [_row(folder, line, f"{METADATA} line {number}") for number, line in numbered if line.strip()]
    if not rows:
        raise ValueError(f"{folder / METADATA} is empty")
    return rows


def _lines(path: Path) -> list[str]:
    """A file's lines as JSON Lines has them, in UTF-8, 16 or 32, with a byte order mark or without.

    ``str.splitlines`` would also split at characters that JSON has within a text, such as U+2028.
    """
    data = path.read_bytes()
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise ValueError(f"{path} is not in {encoding} at line {line} ({error.reason}): save it in UTF-8") from error


def _row(folder: Path, line: str, name: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"name": name, "why": f", the line is not JSON ({error})"}
    row = told if isinstance(told, dict) else {}
    if not isinstance(row.get("file_name"), str):
        return {"name": name, "why": ", the line has no file_name"}
    pictures = {"image": folder / row["file_name"]}
    if isinstance(row.get(REFERENCE), str):
        pictures[REFERENCE] = folder / row[REFERENCE]
    return {"text": row.get("text"), **pictures}


def _sample(row: dict[str, Any], source: Source) -> Sample:
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
    picture, reference = (_on_disk(part) if isinstance(part, Path) else part for part in (picture, reference))
    return Sample(name, picture, text.strip(), reference)


def _on_disk(picture: Path) -> Path:
    """A file as the disk has it, where its name was written on another system.

    Its folders may be parted by ``\\``, its letters be in other cases or in the other Unicode form (macOS takes accents
    off their letters). A name that the disk has is left alone; so is one that nothing there is like.

    Raises:
        BadSample: several are like it.
    """
    try:
        if picture.exists() or picture == picture.parent:
            return picture
        if (parted := Path(str(picture).replace("\\", "/"))) != picture:
            return _on_disk(parted)
        folder = _on_disk(picture.parent)
        alike = _names(folder, folder.stat().st_mtime_ns).get(_plain(picture.name), []) if folder.is_dir() else []
    except OSError:  # a folder that we may not look into: reading the picture will say so
        return picture
    if len(alike) > 1:
        raise BadSample(f"{picture} is not there, and may be any of {', '.join(path.name for path in sorted(alike))}")
    return alike[0] if alike else picture


@lru_cache(maxsize=16)
def _names(folder: Path, changed: int) -> dict[str, list[Path]]:
    """What is in a folder, by plain name; when it was last ``changed`` keeps an old answer from being given."""
    names: dict[str, list[Path]] = {}
    for path in folder.iterdir():
        names.setdefault(_plain(path.name), []).append(path)
    return names


def _plain(name: str) -> str:
    """The same for names that differ in case or Unicode form alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _first(row: dict[str, Any], names: Iterable[str]) -> Any:
    """The first of these that a row has; an undecoded picture of ``datasets`` as its bytes or its file."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, dict):
        return value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    return value
