"""Types of the command line's values: each reads a text, or raises what argparse prints."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from ..batch import values
from ..files.catalog import FILES

Value = TypeVar("Value")


def file_name(text: str) -> str:
    """A name of a model file, see :data:`instantcharacter.files.catalog.FILES`."""
    if text not in FILES:
        raise ArgumentTypeError(f"{text}: expected one of {', '.join(FILES)}")
    return text


def argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """A type of argparse that prints the message of a parser's ``ValueError``."""

    def parse_argument(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error

    return parse_argument


def prompt(text: str) -> str:
    """A text of whole letters; bytes that are not UTF-8 come as halves of letters."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ArgumentTypeError(f"{text[:99]!r}: expected a text in UTF-8")
    return text


def number(low: float, high: float) -> Callable[[str], float]:
    """A type for numbers between two bounds, both allowed."""
    return argument(values.number(low, high))


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for whole numbers between two bounds, both allowed."""
    return argument(values.whole_number(low, high))


scale = argument(values.scale)
size = argument(values.size)
lora = argument(values.lora)


def axis(text: str) -> tuple[str, tuple[float, ...]]:
    """A setting and its values from NAME=VALUES, see :func:`~instantcharacter.flux.sweep.parse_values`."""
    from ..flux.sweep import parse_values

    name, _, crossed = text.partition("=")
    return name, argument(lambda listed: parse_values(name, listed))(crossed)
