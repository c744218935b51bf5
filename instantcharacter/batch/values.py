"""Values as people write them, on the command line and in the lines of a job: each parser reads a text.

A parser raises ``ValueError`` with what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..model.strength import Scale, Strength

SEED = 0, 2**64 - 1
"""The least and the greatest seed."""
LONGEST = 16384
"""The longest side of a picture in pixels."""


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers between two bounds, both allowed."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # false for NaN, too
            raise ValueError(f"{text}: expected {low} to {high}")
        return value

    return parse


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers between two bounds, both allowed."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise ValueError(f"{text}: expected a whole number from {low} to {high}") from error
        if not low <= value <= high:
            raise ValueError(f"{text}: expected {low} to {high}")
        return value

    return parse


def scale(text: str) -> Scale:
    """A strength from one number, or one that changes from START:MIDDLE:END."""
    values = text.split(":")
    if len(values) == 1:
        return number(-10, 10)(text)
    if len(values) != 3:
        raise ValueError(f"{text}: expected one number, or START:MIDDLE:END, such as 1.2:0.9:0.6")
    return Strength(*map(number(0, 10), values))


def size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT, or from one number for a square."""
    sides = text.lower().split("x") if "x" in text.lower() else [text, text]
    if len(sides) != 2 or not all(side.isdecimal() and int(side[:9]) in range(16, LONGEST + 1, 16) for side in sides):
        raise ValueError(f"{text}: expected WIDTHxHEIGHT in multiples of 16, at most {LONGEST}, such as 1024x768")
    return int(sides[0]), int(sides[1])


def lora(text: str) -> tuple[Path, float]:
    """Path and weight from FILE or FILE:WEIGHT. A colon before anything but a weight belongs to the file's name."""
    path, colon, weight = text.rpartition(":")
    try:
        float(weight if colon else "no weight")
    except ValueError:
        return Path(text), 1.0
    return Path(path), number(-10, 10)(weight)
