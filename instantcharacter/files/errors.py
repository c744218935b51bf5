"""What errors say of other libraries and of files: short, on one line, and printable."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

LONGEST = 300
"""Characters of a quotation from a file."""
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def reason(error: BaseException) -> str:
    """What an error says, in one line that can be printed: of the operating system's, its reason and its file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return printable(f"{error.strerror}: {os.fsdecode(error.filename)}")
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or the name of its class; without colours."""
    lines = (escaped(line).strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def escaped(text: str | Path) -> str:
    """A text without colours, control characters, and halves of characters, which cannot be encoded."""
    return printable(COLOURS.sub("", str(text)))


def printable(text: str) -> str:
    """A text in which control characters and halves of characters are written as Python writes them."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def quoted(value: object) -> str:
    """The beginning of a value from a file, for a message: a text as it is, another one as Python writes it."""
    text = value if isinstance(value, str) else SHORT.repr(value)
    return escaped(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")


def first_few(names: Iterable[object]) -> str:
    """The first three of some names, for a message."""
    listed = list(names)
    return ", ".join(quoted(name) for name in listed[:3]) + (", …" if len(listed) > 3 else "")
