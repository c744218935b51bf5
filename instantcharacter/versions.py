"""The version of this package, and the newest versions of its libraries that it was tested with."""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import import_module, metadata
from pathlib import Path

logger = logging.getLogger(__name__)

TESTED = {"diffusers": "0.42.1", "transformers": "5.23.0"}
"""The newest versions that the tests ran with."""


NAME = "comfyui-instantcharacter"
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def package_version() -> str:
    """The version in the ``pyproject.toml`` beside the package, as in a checkout, or else in its metadata."""
    text = PYPROJECT.read_text(encoding="utf-8") if PYPROJECT.is_file() else ""
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    if f'name = "{NAME}"' in text and version:
        return version[1]
    return metadata.version(NAME)


@cache
def warn_if_newer(package: str) -> None:
    """Log a warning, once, if an installed package is newer than the one in :data:`TESTED`."""
    from packaging.version import Version

    found = import_module(package).__version__
    if Version(found) > Version(TESTED[package]):
        logger.warning(
            "%s %s is newer than %s, the newest that InstantCharacter was tested with. If it fails or pictures are "
            "wrong, try `pip install %s==%s`.", package, found, TESTED[package], package, TESTED[package],
        )  # fmt: skip
