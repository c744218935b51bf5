"""Draws ``character.png``, ``owl.png`` and ``icon.png``: ``python assets/draw_character.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = (640, 832)
FINE = 4
"""Drawing scale: reducing the picture smooths its edges."""

FUR, CREAM, INK, SCARF, STRIPE = "#e8762c", "#fff1dc", "#2b2540", "#1f9e8f", "#f6c945"
FEATHERS, WING, TIE = "#6f63c5", "#4d419c", "#d8405f"
Box = tuple[float, float, float, float]


def draw_character() -> Image.Image:
    """A fox with a striped scarf and a pilot's goggles, on a transparent background, RGBA 640×832."""
    return _painted(_tail, _body, _scarf, _head, _goggles)


def draw_owl() -> Image.Image:
    """An owl with a bow tie, as the fox."""
    return _painted(_owl_body, _owl_face, _bow_tie)


def draw_icon() -> Image.Image:
    """The fox's head, 400×400."""
    return _painted(_head, _goggles).crop((80, 20, 560, 500)).resize((400, 400), Image.Resampling.LANCZOS)


def _painted(*parts: Callable[[_Pen], None]) -> Image.Image:
    image = Image.new("RGBA", (SIZE[0] * FINE, SIZE[1] * FINE))
    pen = _Pen(ImageDraw.Draw(image))
    for part in parts:
        part(pen)
    return image.resize(SIZE, Image.Resampling.LANCZOS)


class _Pen:
    """Draws in the picture's own pixels, with an outline."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self.draw = draw

    def oval(self, box: Box, fill: str, outline: bool = True) -> None:
        self.draw.ellipse(_fine(box), fill, INK if outline else None, 7 * FINE if outline else 0)

    def shape(self, points: list[tuple[float, float]], fill: str) -> None:
        fine = [(x * FINE, y * FINE) for x, y in points]
        self.draw.polygon(fine, fill)
        self.draw.line([*fine, *fine[:2]], INK, 7 * FINE, joint="curve")

    def line(self, points: list[tuple[float, float]], width: float, fill: str = INK) -> None:
        self.draw.line([(x * FINE, y * FINE) for x, y in points], fill, round(width * FINE), joint="curve")

    def rounded(self, box: Box, radius: float, fill: str) -> None:
        self.draw.rounded_rectangle(_fine(box), radius * FINE, fill, INK, 7 * FINE)


def _fine(box: Box) -> tuple[float, ...]:
    return tuple(value * FINE for value in box)


def _tail(pen: _Pen) -> None:
    pen.oval((400, 470, 620, 760), FUR)
    pen.oval((500, 420, 628, 580), CREAM)


def _body(pen: _Pen) -> None:
    pen.oval((180, 430, 460, 780), FUR)
    pen.oval((240, 520, 400, 770), CREAM)
    for left in (185, 335):
        pen.rounded((left, 735, left + 120, 805), 34, INK)
    for box in ((140, 520, 230, 700), (410, 520, 500, 700)):
        pen.oval(box, FUR)


def _scarf(pen: _Pen) -> None:
    pen.shape([(375, 505), (450, 490), (480, 660), (400, 675)], SCARF)
    pen.line([(389, 590), (465, 575)], 22, STRIPE)
    pen.line([(396, 640), (473, 625)], 22, STRIPE)
    pen.rounded((190, 450, 450, 530), 40, SCARF)
    for x in (250, 320, 390):
        pen.line([(x, 456), (x, 524)], 20, STRIPE)


def _head(pen: _Pen) -> None:
    pen.shape([(130, 230), (140, 40), (300, 170)], FUR)
    pen.shape([(510, 230), (500, 40), (340, 170)], FUR)
    pen.shape([(165, 190), (168, 95), (245, 170)], CREAM)
    pen.shape([(475, 190), (472, 95), (395, 170)], CREAM)
    pen.oval((100, 130, 540, 480), FUR)
    pen.oval((215, 310, 425, 478), CREAM)
    for left in (190, 385):
        pen.oval((left, 275, left + 65, 360), INK, outline=False)
        pen.oval((left + 34, 288, left + 56, 312), "white", outline=False)
    pen.shape([(285, 345), (355, 345), (320, 385)], INK)
    pen.line([(320, 385), (320, 415)], 8)
    pen.draw.arc(_fine((265, 370, 321, 430)), 20, 120, INK, 8 * FINE)
    pen.draw.arc(_fine((319, 370, 375, 430)), 60, 160, INK, 8 * FINE)


def _goggles(pen: _Pen) -> None:
    pen.line([(108, 260), (200, 205), (440, 205), (532, 260)], 26)
    for left in (190, 330):
        pen.oval((left, 145, left + 120, 265), STRIPE)
        pen.oval((left + 20, 165, left + 100, 245), "#9fd8ef")
        pen.line([(left + 42, 215), (left + 68, 185)], 10, "white")


def _owl_body(pen: _Pen) -> None:
    for left in (225, 345):
        pen.rounded((left, 740, left + 80, 800), 26, STRIPE)
    for points in ([(150, 230), (140, 60), (280, 150)], [(490, 230), (500, 60), (360, 150)]):
        pen.shape(points, WING)
    pen.oval((110, 110, 530, 770), FEATHERS)
    pen.oval((200, 440, 440, 760), CREAM)
    for row, y in enumerate((540, 600, 660)):
        for x in range(250 + 20 * (row % 2), 400, 50):
            pen.draw.arc(_fine((x, y, x + 40, y + 40)), 10, 170, WING, 8 * FINE)
    for box in ((75, 400, 185, 680), (455, 400, 565, 680)):
        pen.oval(box, WING)


def _owl_face(pen: _Pen) -> None:
    for left in (155, 325):
        pen.oval((left, 190, left + 160, 350), CREAM)
        pen.oval((left + 30, 220, left + 130, 320), STRIPE)
        pen.oval((left + 52, 240, left + 108, 300), INK, outline=False)
        pen.oval((left + 80, 248, left + 100, 268), "white", outline=False)
    pen.shape([(290, 330), (350, 330), (320, 400)], FUR)


def _bow_tie(pen: _Pen) -> None:
    pen.shape([(320, 450), (220, 400), (220, 500)], TIE)
    pen.shape([(320, 450), (420, 400), (420, 500)], TIE)
    pen.oval((292, 422, 348, 478), TIE)


if __name__ == "__main__":
    for name, draw in (("character", draw_character), ("owl", draw_owl), ("icon", draw_icon)):
        draw().save(Path(__file__).with_name(f"{name}.png"), optimize=True)
