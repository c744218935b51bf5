"""Draws the scenes; positions and sizes of their parts come from the generator."""

from __future__ import annotations

import random
from collections.abc import Callable

from .canvas import WHITE, Canvas


def _beach(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (150, 216, 246))
    canvas.oval((rng.uniform(0.12, 0.88), 0.13), (0.07, 0.07), (255, 231, 120))
    canvas.box((-0.1, 0.42), (1.1, 0.7), (48, 142, 200))
    canvas.box((-0.1, 0.6), (1.1, 1.1), (242, 218, 158))


def _forest(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (196, 228, 190))
    canvas.box((-0.1, 0.68), (1.1, 1.1), (104, 148, 78))
    for i in range(5):
        x = 0.02 + 0.24 * i + rng.uniform(-0.05, 0.05)
        y = rng.uniform(0.3, 0.4)
        canvas.box((x - 0.022, y), (x + 0.022, 0.74), (112, 80, 54))
        canvas.oval((x, y), (0.1, rng.uniform(0.13, 0.19)), (62, rng.randrange(112, 142), 72))


def _city(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (28, 32, 68))
    for i in range(6):
        x, high = 0.17 * i - 0.01, rng.uniform(0.15, 0.42)
        canvas.box((x, high), (x + 0.15, 0.85), (54, 58, 98))
        for row in range(5):
            for column in range(2):
                if rng.random() < 0.6:
                    low = (x + 0.03 + 0.06 * column, high + 0.04 + 0.08 * row)
                    canvas.box(low, (low[0] + 0.03, low[1] + 0.04), (255, 214, 110))
    canvas.box((-0.1, 0.78), (1.1, 1.1), (74, 74, 86))


def _snow(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (196, 212, 232))
    for x in (0.15, 0.55, 0.95):
        x += rng.uniform(-0.1, 0.1)
        canvas.polygon([(x - 0.3, 0.7), (x, rng.uniform(0.2, 0.35)), (x + 0.3, 0.7)], (150, 168, 196))
    canvas.box((-0.1, 0.66), (1.1, 1.1), (246, 249, 253))
    for _ in range(40):
        canvas.oval((rng.random(), rng.random()), (0.007, 0.007), WHITE)


def _desert(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (252, 206, 142))
    canvas.oval((rng.uniform(0.1, 0.9), 0.2), (0.09, 0.09), (250, 122, 74))
    canvas.box((-0.1, 0.62), (1.1, 1.1), (222, 164, 96))
    for x in (rng.uniform(0.05, 0.22), rng.uniform(0.78, 0.95)):
        canvas.stroke([(x, 0.72), (x, 0.44)], 0.05, (74, 138, 84))
        canvas.stroke([(x, 0.6), (x + 0.07, 0.58), (x + 0.07, 0.5)], 0.03, (74, 138, 84))


def _reef(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (22, 96, 150))
    canvas.box((-0.1, 0.84), (1.1, 1.1), (196, 178, 128))
    for _ in range(7):
        x, high = rng.random(), rng.uniform(0.5, 0.7)
        canvas.stroke([(x, 0.9), (x + 0.02, (0.9 + high) / 2), (x - 0.01, high)], 0.022, (42, 158, 112))
    for _ in range(12):
        r = rng.uniform(0.008, 0.02)
        canvas.oval((rng.random(), rng.uniform(0.05, 0.7)), (r, r), (150, 206, 232))


def _moon(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (10, 10, 24))
    for _ in range(45):
        canvas.oval((rng.random(), rng.uniform(0, 0.7)), (0.004, 0.004), WHITE)
    canvas.oval((rng.uniform(0.15, 0.85), 0.17), (0.085, 0.085), (82, 140, 216))
    canvas.oval((0.5, 1.35), (1.0, 0.65), (172, 172, 178))
    for _ in range(5):
        canvas.oval((rng.random(), rng.uniform(0.82, 0.97)), (0.05, 0.016), (138, 138, 146))


def _room(canvas: Canvas, rng: random.Random) -> None:
    canvas.box((0, 0), (1, 1), (236, 214, 196))
    canvas.box((-0.1, 0.72), (1.1, 1.1), (158, 104, 72))
    x = rng.uniform(0.08, 0.62)
    canvas.box((x, 0.12), (x + 0.28, 0.42), (250, 250, 250))
    canvas.box((x + 0.02, 0.14), (x + 0.26, 0.4), (160, 214, 244))
    canvas.box((x + 0.132, 0.14), (x + 0.148, 0.4), (250, 250, 250))
    canvas.oval((0.5, 0.86), (0.36, 0.07), (188, 72, 84))


DRAW_SCENE: dict[str, Callable[[Canvas, random.Random], None]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "snow": _snow,
    "desert": _desert,
    "reef": _reef,
    "moon": _moon,
    "room": _room,
}
"""A function for each scene."""
