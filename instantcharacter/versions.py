"""The newest diffusers and transformers that the tests were run with; newer ones may work, and are warned of."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module

logger = logging.getLogger(__name__)

TESTED = {"diffusers": "0.42.1", "transformers": "5.23.0"}


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
