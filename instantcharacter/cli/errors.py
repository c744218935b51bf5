"""Errors as a single line for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files.errors import reason


def one_line(error: Exception) -> str:
    """The first line of an error's message, printable, and for a full GPU which options take less memory."""
    message = reason(error)
    if "out of memory" in message:
        return f"{message} Try --vram with less, --offload sequential, or a smaller --size."
    return message


@contextmanager
def hub_errors(*sources: str) -> Iterator[None]:
    """Context manager: names the sources that are no local paths in an ``OSError`` of the hub's client.

    Args:
        sources: paths and hub ids that the block loads.
    """
    remote = [source for source in sources if not Path(source).exists()]
    try:
        yield
    except OSError as error:
        if not remote:
            raise
        raise OSError(f"{' or '.join(remote)} could not be had: {one_line(error)}") from error
