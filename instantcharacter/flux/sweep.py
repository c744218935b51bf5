"""Every combination of some settings, and the page on which their pictures are compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Axes: TypeAlias = Mapping[str, Sequence[float]]
"""The values of each setting that a sweep crosses, by the setting's name."""
BOUNDS: dict[str, tuple[type[float] | type[int], float, float]] = {
    "scale": (float, -10, 10),
    "guidance": (float, 0, 100),
    "seed": (int, 0, 2**64 - 1),
}
"""Type, least and greatest value of the settings that can be crossed."""
GAP = 12
"""Pixels between pictures."""
MOST_PIXELS = 2**27
"""Of all pictures on a page, 128 of 1024×1024; ComfyUI takes 12 bytes for each pixel."""


def parse_values(name: str, text: str) -> tuple[float, ...]:
    """The values of a setting from a text that separates them by commas, such as ``0.6, 0.9``.

    Args:
        name: one of :data:`BOUNDS`.
        text: at least one value.

    Raises:
        ValueError: another name, or a value that is no number or out of its bounds.
    """
    if name not in BOUNDS:
        raise ValueError(f"{name!r} cannot be crossed; expected one of {', '.join(BOUNDS)}")
    kind, low, high = BOUNDS[name]
    try:
        values = tuple(kind(value) for value in text.split(","))
    except ValueError as error:
        kinds = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{name} is {text!r}; expected {kinds} separated by commas, such as 1,2") from error
    for value in values:
        if not low <= value <= high:  # false for NaN, too
            raise ValueError(f"{name} is {value}; expected {low} to {high}")
    return values


def check_page(axes: Axes, size: tuple[int, int]) -> None:
    """Raise ``ValueError`` for more pictures than a page has room for, see :data:`MOST_PIXELS`."""
    count, (width, height) = math.prod(map(len, axes.values())), size
    if count * width * height > MOST_PIXELS:
        raise ValueError(
            f"{count} pictures of {width}×{height}; expected at most {MOST_PIXELS // (width * height)} of this size on "
            "a page: take fewer values, or a smaller size"
        )


def cross(axes: Axes) -> list[dict[str, float]]:
    """Every combination of the values; those of the last axis change first."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def describe(settings: Mapping[str, float]) -> str:
    """Settings as a label, such as ``scale 0.9, seed 3``."""
    return ", ".join(f"{name} {value:{'' if isinstance(value, int) else 'g'}}" for name, value in settings.items())


def labelled_page(axes: Axes, size: tuple[int, int]) -> tuple[Image.Image, list[tuple[int, int]]]:
    """A white page with labels, and the places on it for the pictures of :func:`cross`.

    The last axis with several values has the columns, each combination of the others a row. Values that all pictures
    have are above them.

    Args:
        axes: the settings.
        size: width and height of each picture in pixels.

    Returns:
        The page, RGB, and the top left corner of each picture.

    Raises:
        ValueError: the pictures are more than a page has room for.
    """
    check_page(axes, size)
    common = {name: values[0] for name, values in axes.items() if len(values) == 1}
    varied = [name for name in axes if name not in common]
    rows, columns = (cross({name: axes[name] for name in names}) for names in (varied[:-1], varied[-1:]))
    font = ImageFont.load_default(max(14, size[0] // 24))
    line = round(1.5 * font.getbbox("Ag")[3])

    def label_width(settings: Mapping[str, float]) -> int:
        return round(font.getlength(describe(settings))) + GAP

    width, height = max(size[0] + GAP, *map(label_width, columns)), size[1] + line
    left, top = GAP, 2 * line
    right = left + max(len(columns) * width, *map(label_width, (common, *rows)))
    page = Image.new("RGB", (right, top + len(rows) * height + GAP), "white")
    labels = [((left, 0), common)]
    labels += [((left + i * width, line), column) for i, column in enumerate(columns)]
    labels += [((left, top + i * height), row) for i, row in enumerate(rows)]
    pen = ImageDraw.Draw(page)
    for (x, y), settings in labels:
        pen.text((x, y + line // 4), describe(settings), "#222222", font)
    return page, [(left + i * width, top + j * height + line) for j in range(len(rows)) for i in range(len(columns))]
