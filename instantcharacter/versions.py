"""The version of the pack, and the newest diffusers and transformers that its tests ran with."""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

logger = logging.getLogger(__name__)

TESTED = {"diffusers": "0.42.1", "transformers": "5.23.0"}
"""The newest versions that the tests ran with, by package."""


def pack_version() -> str:
    """The version in ``pyproject.toml``, which stands beside the package unless pip copied the package elsewhere."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^name = "comfyui-instantcharacter"\n(?:.*\n)*?version = "(.*)"$', text, re.MULTILINE)
    return found[1] if found else metadata.version("comfyui-instantcharacter")


@cache
def warn_if_newer(package: str) -> None:
    """Log a warning, once, if an installed package is newer than its version in :data:`TESTED`."""
    from packaging.version import Version

    found = import_module(package).__version__
    if Version(found) > Version(TESTED[package]):
        logger.warning(
            "%s %s is newer than %s, the newest that InstantCharacter was tested with. If it fails or pictures are "
            "wrong, try `pip install %s==%s`.", package, found, TESTED[package], package, TESTED[package],
        )  # fmt: skip
