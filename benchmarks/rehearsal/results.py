"""Results of a rehearsal: lines, and a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Result:
    """A prompt's; ``seconds`` is None for one that was not run, ``gpu`` and ``host`` are GiB."""

    part: str
    prompt: str
    seconds: float | None = None
    gpu: float = 0.0
    host: float = 0.0
    failure: str = ""
    pictures: list[str] = field(default_factory=list)


def line(result: Result) -> str:
    return f"{result.part:10s} {result.prompt:36s} {cell(result):28s} {result.failure or ' '.join(result.pictures)}"


def cell(result: Result) -> str:
    if result.seconds is None:
        return "–"
    if result.failure:
        return f"**failed** after {result.seconds:.1f} s"
    return f"{result.seconds:.1f} s; {result.gpu:.1f}, {result.host:.1f} GiB"


def report(results: list[Result], output: Path) -> None:
    """Keeps the results beside those of earlier runs, and prints the table of all and what failed in this one."""
    file = output / "results.json"
    earlier = [Result(**result) for result in json.loads(file.read_text())] if file.exists() else []
    latest = {(result.part, result.prompt): result for result in (*earlier, *results)}
    file.write_text(json.dumps([asdict(result) for result in latest.values()], indent=1))
    failed = [result for result in results if result.failure]
    print(f"\n{table(latest.values())}\n")
    for result in failed:
        print(f"{result.part}, {result.prompt}: {result.failure}")
    pictures = sum(len(result.pictures) for result in results)
    print(f"{len(results)} prompts, {pictures} pictures, {len(failed)} failed or not run; logs in {output}", flush=True)


def table(results: Iterable[Result]) -> str:
    """Markdown: a row for each prompt, a column for each part."""
    cells = {(result.prompt, result.part): cell(result) for result in results}
    parts, prompts = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
    rows = [[prompt, *(cells.get((prompt, part), "") for part in parts)] for prompt in prompts]
    head = ["from the queue to the file; the GPU's and the host's memory", *parts]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
