"""A canvas for shapes in fractions of its side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image, ImageDraw

SIDE = 256
"""Pixels of a picture's side."""
FINE = 2
"""Pixels of the canvas per pixel of the picture: reducing it smooths the edges."""

Colour: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

OUTLINE: Colour = (40, 34, 46)
WHITE: Colour = (255, 255, 255)


class Canvas:
    """A canvas whose coordinates are fractions of its side from the top left.

    Args:
        outlined: draw shapes with a dark outline.
        clear: begin transparent (RGBA), not white (RGB).
    """

    def __init__(self, outlined: bool, clear: bool = False) -> None:
        self.side = SIDE * FINE
        self.image = Image.new("RGBA" if clear else "RGB", (self.side, self.side), (0, 0, 0, 0) if clear else WHITE)
        self._pen = ImageDraw.Draw(self.image)
        self._line = {"outline": OUTLINE, "width": 2 * FINE} if outlined else {}
        self.outlined = outlined

    def oval(self, centre: Point, radii: Point, colour: Colour) -> None:
        (x, y), (rx, ry) = centre, radii
        self._pen.ellipse(self._pixels((x - rx, y - ry), (x + rx, y + ry)), fill=colour, **self._line)

    def box(self, low: Point, high: Point, colour: Colour, corner: float = 0.0) -> None:
        self._pen.rounded_rectangle(self._pixels(low, high), corner * self.side, fill=colour, **self._line)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        pixels = self._pixels(*points)
        self._pen.polygon(pixels, fill=colour)
        if self.outlined:
            self._pen.line([*pixels, pixels[0]], fill=OUTLINE, width=2 * FINE, joint="curve")

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        if self.outlined:
            self._stroke(points, width + 0.012, OUTLINE)
        self._stroke(points, width, colour)

    def paste(self, figure: Image.Image, scale: float, centre: Point) -> None:
        """Paste a transparent picture, ``scale`` times the canvas in size, around ``centre``."""
        size = round(self.side * scale)
        at = [round(coordinate * self.side - size / 2) for coordinate in centre]
        small = figure.resize((size, size), Image.Resampling.BILINEAR)
        self.image.paste(small, (at[0], at[1]), small)

    def _stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        self._pen.line(self._pixels(*points), fill=colour, width=round(width * self.side), joint="curve")
        for x, y in points:
            r = width / 2
            self._pen.ellipse(self._pixels((x - r, y - r), (x + r, y + r)), fill=colour)

    def _pixels(self, *points: Point) -> list[tuple[float, float]]:
        return [(x * self.side, y * self.side) for x, y in points]
