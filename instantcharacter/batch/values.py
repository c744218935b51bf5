"""Values as people write them, on the command line and in the lines of a job: each parser reads a text.

A parser raises ``ValueError`` with what was found and what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..model.strength import STRONGEST, Scale, Strength

Number = TypeVar("Number", int, float)
SEED = 0, 2**64 - 1
"""The least and the greatest seed."""
LONGEST = 16384
"""Pixels of a picture's side at most, as in ComfyUI."""


def prompt(text: str) -> str:
    """A text of whole letters; bytes that are not UTF-8 come as halves of letters."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text[:99]!r}: expected a text in UTF-8")
    return text


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers between two bounds, both allowed."""
    return _between(float, "a number", low, high)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers between two bounds, both allowed."""
    return _between(int, "a whole number", low, high)


def scale(text: str) -> Scale:
    """A strength from one number, or one that changes from START:MIDDLE:END."""
    values = text.split(":")
    if len(values) == 1:
        return number(-STRONGEST, STRONGEST)(text)
    if len(values) != 3:
        raise ValueError(f"{text[:99]!r}: expected one number, or START:MIDDLE:END, such as 1.2:0.9:0.6")
    return Strength(*map(number(0, STRONGEST), values))


def size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT, or from one number for a square."""
    sides = re.fullmatch(r"([0-9]{2,5})(?:x([0-9]{2,5}))?", text.lower())
    width, height = (int(side) for side in (sides[1], sides[2] or sides[1])) if sides else (0, 0)
    if width % 16 or height % 16 or not (0 < width <= LONGEST and 0 < height <= LONGEST):
        raise ValueError(f"{text[:99]!r}: expected WIDTHxHEIGHT in multiples of 16 up to {LONGEST}, such as 1024x768")
    return width, height


def lora(text: str) -> tuple[Path, float]:
    """Path and weight from FILE or FILE:WEIGHT. A colon before anything but a weight belongs to the file's name."""
    path, colon, weight = text.rpartition(":")
    try:
        float(weight)
    except ValueError:
        colon = ""
    return (Path(path), number(-10, 10)(weight)) if colon else (Path(text), 1.0)


def _between(kind: type[Number], name: str, low: float, high: float) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # false for NaN, too
            raise ValueError(f"{text[:99]!r}: expected {name}, {low} to {high}")
        return value

    return parse
