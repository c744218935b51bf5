"""Types of the command line's values: each reads a text, or raises what argparse prints."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from ..files.catalog import FILES
from ..model.strength import Scale, Strength


def file_name(text: str) -> str:
    """A name of a model file, see :data:`instantcharacter.files.catalog.FILES`."""
    if text not in FILES:
        raise ArgumentTypeError(f"{text}: expected one of {', '.join(FILES)}")
    return text


def number(low: float, high: float) -> Callable[[str], float]:
    """A type for numbers between two bounds, both allowed."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # false for NaN, too
            raise ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value

    return parse


def scale(text: str) -> Scale:
    """A strength from one number, or one that changes from START:MIDDLE:END."""
    values = text.split(":")
    if len(values) == 1:
        return number(-10, 10)(text)
    if len(values) != 3:
        raise ArgumentTypeError(f"{text}: expected one number, or START:MIDDLE:END, such as 1.2:0.9:0.6")
    return Strength(*map(number(0, 10), values))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for whole numbers between two bounds, both allowed."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text}: expected {low} to {high}")
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT, or from one number for a square."""
    sides = text.lower().split("x") if "x" in text.lower() else [text, text]
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ArgumentTypeError(f"{text}: expected WIDTHxHEIGHT in multiples of 16, such as 1024x768")
    return int(sides[0]), int(sides[1])


def lora(text: str) -> tuple[Path, float]:
    """Path and weight from FILE or FILE:WEIGHT. A colon before anything but a weight belongs to the file's name."""
    path, colon, weight = text.rpartition(":")
    try:
        return (Path(path), number(-10, 10)(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def axis(text: str) -> tuple[str, tuple[float, ...]]:
    """A setting and its values from NAME=VALUES, see :func:`~instantcharacter.flux.sweep.parse_values`."""
    from ..flux.sweep import parse_values

    name, _, values = text.partition("=")
    try:
        return name, parse_values(name, values)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
