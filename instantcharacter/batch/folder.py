"""The output folder of a job: its pictures, what made them, and what is missing.

A picture is there or not, never half; it carries the digest of its job. ``job.json`` has the settings that all pictures
share. Each process appends to a log of its own in ``.cache``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from ..files.atomic import atomic_write
from ..files.pictures import PNG_SETTINGS, save_png
from ..files.reading import read_json
from ..model.strength import scale_setting
from .jobs import Job


class OutputFolder:
    """The output folder of a job.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = path / ".cache"

    def open(self, settings: Mapping[str, Any]) -> int | None:
        """Begin a job in this folder, or go on with it; returns the size of its batches, None if it is not chosen yet.

        Args:
            settings: what all pictures share.

        Raises:
            ValueError: the folder has pictures of other settings.
            OSError: it cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._job.exists():
            self._write_job(settings, None)
            return None
        written = read_json(self._job)
        begun_with = written.get("settings", {})
        for name in sorted({*settings, *begun_with}):
            if settings.get(name) != begun_with.get(name):
                raise ValueError(
                    f"{self.path} is of another job: {name} was {begun_with.get(name)}, and is {settings.get(name)}. "
                    "Take another --output, or the settings that it began with."
                )
        return written.get("batch_size")

    def choose_batch_size(self, settings: Mapping[str, Any], size: int) -> int:
        """Write the size of the job's batches, which it has from now on."""
        self._write_job(settings, size)
        return size

    def present(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs whose pictures are there."""
        paths = {job: self.path / job.output for job in jobs}
        listed = {folder: names_in(folder) for folder in {path.parent for path in paths.values()}}
        return [job for job, path in paths.items() if path.name in listed[path.parent]]

    def check_pictures(self, jobs: Iterable[Job]) -> None:
        """Raise ``ValueError`` if a picture is there that another line made, or nobody here."""
        there, is_ours = self.present(jobs), self._job.exists()
        wrong = [job for job in there if not is_ours or _digest(self.path / job.output) != job.digest]
        if wrong:
            listed = ", ".join(f"{job.output} (line {job.line})" for job in wrong[:5])
            raise ValueError(
                f"{self.path} has {len(wrong)} pictures that these lines did not make: {listed}. Take another "
                "--output, or delete or rename them and they are generated anew."
            )

    def save(self, job: Job, image: Image.Image, seconds: float, shared: Mapping[str, Any]) -> None:
        """Write a picture, and how long it took.

        Args:
            job: what it shows.
            image: the picture.
            seconds: how long it took.
            shared: settings of all pictures that it is to name.
        """
        (self.path / job.output).parent.mkdir(parents=True, exist_ok=True)
        self._append({"output": job.output, "seconds": round(seconds, 3)})
        save_png(image, self.path / job.output, job.prompt, {**describe(job), **shared, "job": job.digest})

    def save_error(self, job: Job, error: str) -> None:
        """Write down that a picture could not be generated."""
        self._append({"output": job.output, "error": error})

    def entries(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What is known of each picture that is there or has failed, in the order of the lines."""
        logged = self._read_logs()
        there = {job.output for job in self.present(jobs)}
        entries = []
        for job in jobs:
            entry = logged.get(job.output, {})
            if job.output in there:
                entry = {"seconds": entry.get("seconds")}
            if entry:
                entries.append({"line": job.line, "output": job.output, **describe(job), **entry})
        return entries

    def write_list(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Write ``pictures.jsonl``."""
        with atomic_write(self.path / "pictures.jsonl") as partial:
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            partial.write_text("".join(lines), encoding="utf-8")

    @property
    def _job(self) -> Path:
        return self.path / "job.json"

    @cached_property
    def _log(self) -> Path:
        """This process's log."""
        self.cache.mkdir(parents=True, exist_ok=True)
        return self.cache / f"{time.time_ns()}-{uuid4().hex[:8]}.jsonl"

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def _read_logs(self) -> dict[str, dict[str, Any]]:
        """The last entry of each output, by the time when its process began."""
        found = {}
        for log in sorted(self.cache.glob("*.jsonl")):
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("}\n"):  # a killed process may leave half a line
                    entry = json.loads(line)
                    found[entry.pop("output")] = entry
        return found

    def _write_job(self, settings: Mapping[str, Any], batch_size: int | None) -> None:
        with atomic_write(self._job) as partial:
            content = {"settings": settings, "batch_size": batch_size}
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def describe(job: Job) -> dict[str, Any]:
    """A job's settings as its picture carries them: file names in place of the user's paths."""
    settings = job.settings
    described: dict[str, Any] = {
        "prompt": job.prompt,
        "characters": [source.path.name for source in (*(r.picture for r in settings.reference), *settings.character)],
        "scale": [scale_setting(scale) for scale in settings.scale],
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": "x".join(map(str, settings.size)),
        "seed": job.seed,
        "lora": [f"{source.path.name}:{weight}" for source, weight in settings.lora],
    }
    if any(settings.region):
        described["region"] = [region and region.path.name for region in settings.region]
    if job.negative_prompt is not None:
        described |= {"negative_prompt": job.negative_prompt, "true_cfg": settings.true_cfg}
    return described


def names_in(folder: Path) -> set[str]:
    """The names in a folder, none if it is not there.

    A listing has the files that other machines have written, where asking for one name may get an older answer.
    """
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _digest(path: Path) -> str | None:
    """The digest of the job that made a picture; None for another file."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[PNG_SETTINGS])["job"]
    except (OSError, KeyError, ValueError, TypeError, SyntaxError):
        return None
