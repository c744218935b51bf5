"""Jobs: a picture for each line of a file. Every bad line is found before anything is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch

from ..character.image import cut_out
from ..files.errors import reason
from ..files.fingerprint import content_digest
from ..files.pictures import open_mask, open_picture
from ..flux.lora import read_lora
from ..flux.schedule import as_list
from ..model.character import Character, summary
from ..model.conditioning import mask_to_tokens
from ..model.strength import Scale, scales_of
from . import values
from .rows import SEPARATOR, BadLine, Row, read_rows


@dataclass(frozen=True)
class Source:
    """A file of a job. Files of the same content are equal."""

    digest: str
    path: Path = field(compare=False, repr=False)


class Reference(NamedTuple):
    """A picture of a character, and the mask that cuts it out."""

    picture: Source
    mask: Source | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What lines have in common that can be generated at once.

    Attributes:
        size: width and height in pixels.
        steps: denoising steps.
        guidance: FLUX's distilled guidance.
        true_cfg: scale of classifier-free guidance by a negative prompt; 1 for none.
        reference, character: the characters by pictures, and those from files, which follow.
        scale: the strength of each character.
        region: where in the picture each character may be; None for everywhere.
        lora: LoRAs and their weights.
    """

    size: tuple[int, int]
    steps: int
    guidance: float
    true_cfg: float
    reference: tuple[Reference, ...]
    character: tuple[Source, ...]
    scale: tuple[Scale, ...]
    region: tuple[Source | None, ...]
    lora: tuple[tuple[Source, float], ...]


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        line: where it is in the file, from 1.
        output: its name in the output folder.
        prompt: its text.
        negative_prompt: what it is not to show; None without classifier-free guidance.
        seed: of its noise.
        settings: the rest.
    """

    line: int
    output: str
    prompt: str
    negative_prompt: str | None
    seed: int
    settings: Settings

    @property
    def digest(self) -> str:
        """Identifies what the picture is made of, files by their content."""
        return content_digest(repr((self.prompt, self.negative_prompt, self.seed, self.settings)))


DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("reference", "character", "mask", "region", "lora"), ()),
        **{"scale": (0.9,), "scale_double": (1.0,), "scale_single": (1.0,), "size": (1024, 1024), "steps": 28},
        **{"guidance": 3.5, "seed": 0, "negative_prompt": None, "true_cfg": 1.0},
    }
)
"""What counts where a line has no value."""
CHARACTERS = ("reference", "character")


def read_jobs(path: str | Path, defaults: Mapping[str, Any] = DEFAULTS) -> tuple[list[Job], list[BadLine]]:
    """The jobs of a file's good lines, and all bad lines. Every file that a line names is opened.

    Args:
        path: a ``.jsonl`` or ``.csv`` file, see :func:`~.rows.read_rows`; files in it are relative to its folder.
        defaults: values for lines that have none, by the names in :data:`DEFAULTS`. The seed of a line is this
            seed, and one more for each line before it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no such file of jobs, or one without lines.
    """
    path = Path(path)
    parser, outputs = _Parser(path.parent, {**DEFAULTS, **defaults}), dict[str, int]()
    jobs: list[Job] = []
    bad: list[BadLine] = []
    number = 0
    for number, row in enumerate(read_rows(path), 1):
        if isinstance(row, BadLine):
            bad.append(row)
            continue
        try:
            job = parser.job(number, *row)
            first = outputs.setdefault(normalize("NFC", job.output.casefold()), job.line)
            if first != job.line:
                raise ValueError(f"{job.output} is the output of line {first}, too: name another")
            jobs.append(job)
        except (ValueError, OSError) as error:
            bad.append(BadLine(row[0], reason(error)))
    if not number:
        raise ValueError(f"{path} has no lines: write one for each picture")
    return jobs, bad


def foreign_characters(jobs: Iterable[Job], fingerprint: str) -> list[BadLine]:
    """The lines with a character that another adapter made.

    Args:
        jobs: of :func:`read_jobs`.
        fingerprint: of the adapter, see :meth:`~instantcharacter.CharacterAdapter.fingerprint`.
    """
    paths = {source.path for job in jobs for source in job.settings.character}
    made_by = {path: found.fingerprint for path in paths if (found := summary(path))}
    return [
        BadLine(job.line, f"{source.path} was made by adapter {made_by.get(source.path)}, this one is {fingerprint}")
        for job in jobs
        for source in job.settings.character
        if made_by.get(source.path) != fingerprint
    ]


def unequal_shares(jobs: Iterable[Job], processes: int) -> list[BadLine]:
    """The lines with a size of whose image tokens the processes that generate each picture cannot have as many."""
    return [
        BadLine(job.line, f"{width}x{height}: {processes} processes cannot share its {tokens} image tokens equally")
        for job in jobs
        for width, height in [job.settings.size]
        if (tokens := (width // 16) * (height // 16)) % processes
    ]


class _Parser:
    """Reads rows, and opens each file that they name once.

    Args:
        folder: of the file, from which paths are relative.
        defaults: by name.
    """

    def __init__(self, folder: Path, defaults: Mapping[str, Any]) -> None:
        self._folder, self._defaults = folder, defaults
        self._checked: dict[tuple[object, ...], Source] = {}

    def job(self, number: int, line: int, row: Row) -> Job:
        """The job of a row.

        Args:
            number: of the row, from 1.
            line: where it is in the file.
            row: values by field.

        Raises:
            ValueError, OSError: the row is bad.
        """
        if unknown := row.keys() - FIELDS.keys():
            raise ValueError(f"unknown field {', '.join(sorted(unknown))}: expected some of {', '.join(FIELDS)}")
        read = {name: self._value(name, value) for name, value in row.items() if value is not None}
        if "prompt" not in read:
            raise ValueError("no prompt: write what the picture shows")
        every = {**self._defaults, **{name: () for name in (*CHARACTERS, "mask") if read.keys() & CHARACTERS}, **read}
        if every["negative_prompt"] is not None and every["true_cfg"] <= 1:
            raise ValueError(f"negative_prompt does nothing at true_cfg {every['true_cfg']:g}: give true_cfg above 1")
        negative = (every["negative_prompt"] or "") if every["true_cfg"] > 1 else None
        seed = read.get("seed", ((every["seed"] or 0) + number - 1) % (values.SEED[1] + 1))
        output = read.get("output", f"{number:04d}.png")
        return Job(line, output, read["prompt"], negative, seed, self._settings(every))

    def _settings(self, every: Mapping[str, Any]) -> Settings:
        count = sum(len(every[name]) for name in CHARACTERS)
        if not count:
            raise ValueError("nobody to draw: give reference or character")
        regions = _one_each("region", every["region"], count, f"{count} characters")
        masks = _one_each("mask", every["mask"], len(every["reference"]), f"{len(every['reference'])} references")
        loras = tuple((self._source(path, read_lora), weight) for path, weight in every["lora"])
        if len({source for source, _ in loras}) < len(loras):
            raise ValueError("a LoRA twice in lora: give it once, with the weight that it is to have")
        return Settings(
            size=every["size"],
            steps=every["steps"],
            guidance=every["guidance"],
            true_cfg=every["true_cfg"],
            reference=tuple(map(self._reference, every["reference"], masks)),
            character=tuple(self._source(path, Character.load) for path in every["character"]),
            scale=tuple(scales_of(count, every["scale"], every["scale_double"], every["scale_single"])),
            region=tuple(self._source(region, _check_region) if region else None for region in regions),
            lora=loras,
        )

    def _reference(self, picture: Path, mask: Path | None) -> Reference:
        source = self._source(picture, open_picture)
        cut = self._source(mask, lambda path: cut_out(picture, path), picture) if mask else None
        return Reference(source, cut)

    def _source(self, path: Path, check: Callable[[Path], object], *beside: Path) -> Source:
        """A file that a check opens; it raises ``ValueError`` or ``OSError`` for one that is unfit."""
        key = (path, *beside) if beside else (path, check)
        if key not in self._checked:
            check(path)
            self._checked[key] = Source(content_digest(path), path)
        return self._checked[key]

    def _value(self, name: str, value: Any) -> Any:
        """A field's value, parsed; a relative path is from the file's folder."""
        if name not in LISTS:
            return _parse(name, value)
        if isinstance(value, str):
            value = [part.strip() or None for part in value.split(SEPARATOR)]
        parsed = [None if part is None else _parse(name, part) for part in as_list(value)]
        if name not in ("mask", "region") and None in parsed:
            raise ValueError(f"{name} has an empty value in its list: leave it out")
        return tuple(map(self._from_folder, parsed))

    def _from_folder(self, value: Any) -> Any:
        match value:
            case Path():
                return self._folder / value
            case (Path(), float()):
                return self._folder / value[0], value[1]
        return value


def output_name(text: str) -> str:
    """The name of a PNG in the output folder or in a folder in it; one that every operating system takes."""
    *folders, name = text.split("/")
    parts = (*folders, name.removesuffix(".png"))
    if name.endswith(".png") and not any(folder.endswith(".png") for folder in folders) and all(map(_is_name, parts)):
        return text
    raise ValueError(f"{text}: expected a name in the output folder that ends in .png, such as fox.png or one/fox.png")


def _is_name(part: str) -> bool:
    forbidden = any(letter in '<>:"\\|?*' or ord(letter) < 32 for letter in part)
    return bool(part) and not forbidden and part[0] != "." and part[-1] not in ". " and len(part.encode()) <= 180


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write what the picture shows")
    return text


LISTS = ("reference", "character", "mask", "region", "scale", "lora")
"""The fields that take several values."""
FIELDS: Mapping[str, Callable[[str], Any]] = {
    "prompt": _prompt,
    "reference": Path,
    "character": Path,
    "mask": Path,
    "region": Path,
    "scale": values.scale,
    "seed": values.whole_number(*values.SEED),
    "size": values.size,
    "steps": values.whole_number(1, 1000),
    "guidance": values.number(0, 100),
    "negative_prompt": str,
    "true_cfg": values.number(1, 100),
    "lora": values.lora,
    "output": output_name,
}
"""The fields of a line, and what reads their texts."""
TEXTS = ("prompt", "negative_prompt", "reference", "character", "mask", "region", "lora", "output")


def _parse(name: str, value: Any) -> Any:
    """A value, which is read as the text that it is on the command line."""
    if isinstance(value, bool) or not isinstance(value, (str,) if name in TEXTS else (str, int, float)):
        kind = "a text" if name in TEXTS else "a number or a text"
        raise ValueError(f"{name} is {str(value)[:80]}; expected {kind}")
    if "\0" in str(value):
        raise ValueError(f"{name} has a zero byte: write a text")
    try:
        return FIELDS[name](str(value))
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error


def _one_each(name: str, paths: tuple[Path | None, ...], count: int, expected: str) -> tuple[Path | None, ...]:
    if len(paths) not in (0, count):
        raise ValueError(f"{len(paths)} {name} for {expected}: give one each, which may be null or empty, or none")
    return paths or (None,) * count


def _check_region(path: Path) -> None:
    mask_to_tokens(torch.from_numpy(np.asarray(open_mask(path), dtype=np.float32) / 255), 1, 1)
