"""The workflow files: those that ship, and the earlier pack's, which must still run. Each is there twice, as the graph
that the page opens and, in ``api``, as the prompt that the queue takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

PACK = Path(__file__).parents[2]
SHIPPED = PACK / "workflows"
EARLIER = PACK / "tests/workflows"
GRAPHS = [*sorted(SHIPPED.glob("*.json")), *sorted(EARLIER.glob("*.json"))]
PROMPTS = [*sorted(SHIPPED.glob("api/*.json")), *sorted(EARLIER.glob("api/*.json"))]
NOTE = "MarkdownNote"
"""A node of the page alone; no prompt has it."""


def name(path: Path) -> str:
    """A workflow's name: its file's, without the number that sorts it in the template browser."""
    return re.sub(r"^\d\d_", "", path.stem)


def graph(workflow: str) -> dict:
    """The graph of a name."""
    return read(_only(GRAPHS, workflow))


def prompt(workflow: str) -> dict:
    """The prompt of a name."""
    return read(_only(PROMPTS, workflow))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def note(path: Path) -> list[str]:
    """The note of a workflow, in English and in Chinese; a line stands between."""
    (node,) = [node for node in read(path)["nodes"] if node["type"] == NOTE]
    (text,) = node["widgets_values"]
    return text.split("\n\n---\n\n")


def _only(files: list[Path], workflow: str) -> Path:
    (path,) = [path for path in files if name(path) == workflow]
    return path
