"""Checks that a tag, ``pyproject.toml`` and ``CHANGELOG.md`` name one version.

python .ci/check_version.py v1.2.3
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tomllib


def problems(tag: str, root: Path) -> list[str]:
    """The reasons not to release this tag.

    Args:
        tag: such as ``v1.2.3``.
        root: the folder of ``pyproject.toml`` and ``CHANGELOG.md``.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](.*)\n((?:(?!## |\[).*\n)*)", changelog, re.MULTILINE)
    released = [(name, date.removeprefix(" - ")) for name, date, _ in sections if name != "Unreleased"]
    found = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        found.append(f"the tag is {tag}, not of the form v1.2.3")
    if tag != f"v{project}":
        found.append(f"the tag is {tag}, and pyproject.toml has version {project}")
    if not released or released[0][0] != project:
        found.append(f"pyproject.toml has version {project}, and CHANGELOG.md begins with {released[:1]}")
    elif not re.fullmatch(r"\d{4}-\d{2}-\d{2}", released[0][1]):
        found.append(f"CHANGELOG.md has no date for {project}: write ## [{project}] - YYYY-MM-DD")
    if any(text.strip() for name, _, text in sections if name == "Unreleased"):
        found.append(f"CHANGELOG.md has entries under Unreleased: move them to {project}, or release another version")
    return found


if __name__ == "__main__":
    for problem in (found := problems(sys.argv[1], Path(__file__).parents[1])):
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(found))
