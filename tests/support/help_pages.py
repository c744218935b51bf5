"""The nodes' help pages, and the pictures that they name."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "web/docs"
PAGES = sorted(FOLDER.rglob("*.md"))


def pictures(text: str) -> list[str]:
    """Paths of the pictures in a page or a part of it.

    They are relative to :data:`FOLDER`, also in a page of a folder in it: ComfyUI's page puts ``docs/`` before each.
    """
    return re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
