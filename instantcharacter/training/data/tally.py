"""Counts bad samples, and ends a training that has too many."""

from __future__ import annotations

import logging

from .samples import BadSample

logger = logging.getLogger(__name__)

ALLOWED = 0.01
"""Largest fraction of samples that may be bad."""
LISTED = 20
"""Bad samples that the error lists."""


class Tally:
    """The number of samples read, and the bad ones among them.

    Attributes:
        seen: samples so far.
        bad: each bad sample's name and error.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.bad: list[str] = []

    def count(self, error: BadSample | None = None) -> None:
        """Count one more sample, bad if there is an error.

        Raises:
            ValueError: more than one in a hundred are bad; lists them.
        """
        self.seen += 1
        if error is None:
            return
        if str(error) not in self.bad:
            logger.warning("skipped %s", error)
        self.bad.append(str(error))
        if len(self.bad) > ALLOWED * max(self.seen, 100):
            listed = "\n".join(self.bad[:LISTED])
            raise ValueError(f"{len(self.bad)} of {self.seen} samples are bad; mend or remove them:\n{listed}")
