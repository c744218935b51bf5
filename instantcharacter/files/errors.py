"""Errors of libraries, quoted in ours."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """What an error says, in one line: of the operating system's, its reason and its file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return " ".join(f"{error.strerror}: {error.filename}".splitlines())
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message that is not blank, or the name of its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
