"""Draws a character in a pose."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageChops

from .canvas import OUTLINE, WHITE, Canvas, Colour, Point
from .traits import Traits


@dataclass(frozen=True)
class Pose:
    """How a figure stands.

    Attributes:
        arms: degrees of each, 0 straight down, larger angles outwards and up.
        legs: likewise.
        tilt: degrees of the whole figure.
        lift: height above the ground, in picture sides.
        eyes_closed: whether it sleeps.
        prop: ``"balloon"``, ``"book"``, ``"ring"`` or ``""``.
    """

    arms: tuple[float, float]
    legs: tuple[float, float]
    tilt: float = 0.0
    lift: float = 0.0
    eyes_closed: bool = False
    prop: str = ""


STANDING = Pose((35, 35), (5, 5))
POSES: dict[str, Pose] = {
    "wave": Pose((30, 150), (5, 5)),
    "jump": Pose((125, 125), (55, 55), lift=0.16),
    "sit": Pose((40, 40), (85, 85), lift=-0.05),
    "sleep": Pose((20, 20), (8, 8), tilt=82, lift=-0.1, eyes_closed=True),
    "run": Pose((75, 75), (60, -30), tilt=-14, lift=0.03),
    "balloon": Pose((25, 140), (5, 5), prop="balloon"),
    "read": Pose((55, 55), (5, 5), prop="book"),
    "swim": Pose((95, 95), (25, -5), tilt=55, lift=0.04, prop="ring"),
}
"""A pose for each action."""


def draw_figure(traits: Traits, pose: Pose, outlined: bool, mirrored: bool) -> Image.Image:
    """The character in the middle of a transparent RGBA picture of ``SIDE * FINE`` pixels a side."""
    canvas = Canvas(outlined, clear=True)
    colour, second, hat = _colours(traits)
    half = 0.13 * (0.85 + 0.3 * traits.width) * {"round": 1.15, "tall": 0.85}.get(traits.shape, 1.0)
    high = {"round": 0.15, "tall": 0.2}.get(traits.shape, 0.17)
    top, bottom = 0.5 - high, 0.5 + high
    for side, angle in zip((-1, 1), pose.legs):
        hip = (0.5 + side * half * 0.5, bottom - 0.03)
        canvas.stroke([hip, _along(hip, side * angle, 0.11)], 0.055, colour)
    _ears(canvas, traits, half, top, colour, second)
    _body(canvas, traits, half, high, colour, second)
    if pose.prop == "ring":
        canvas.oval((0.5, 0.58), (half * 1.5, 0.06), (236, 74, 74))
        canvas.oval((0.5, 0.565), (half * 0.9, 0.03), colour)
    hands = []
    for side, angle in zip((-1, 1), pose.arms):
        shoulder = (0.5 + side * half * 0.85, 0.53)
        hands.append(_along(shoulder, side * angle, 0.13))
        canvas.stroke([shoulder, hands[-1]], 0.045, colour)
    _face(canvas, traits, half, top, pose.eyes_closed)
    _hat(canvas, traits, half, top, hat)
    if pose.prop == "balloon":
        x, y = hands[1]
        canvas.stroke([(x, y), (x + 0.03, y - 0.12)], 0.006, OUTLINE)
        canvas.oval((x + 0.03, y - 0.17), (0.055, 0.068), (226, 58, 72))
    if pose.prop == "book":
        canvas.polygon([(0.38, 0.6), (0.5, 0.63), (0.5, 0.72), (0.38, 0.69)], (250, 246, 232))
        canvas.polygon([(0.62, 0.6), (0.5, 0.63), (0.5, 0.72), (0.62, 0.69)], (232, 226, 206))
    image = canvas.image.rotate(-pose.tilt, Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _colours(traits: Traits) -> tuple[Colour, Colour, Colour]:
    """Colours of the body, of its pattern, and of the hat."""
    body = _colour(traits.hue, 0.45 + 0.45 * (1 - traits.paleness), 0.92)
    second = _colour(traits.hue + 0.25 + 0.5 * traits.second_hue, 0.5, 0.98)
    return body, second, _colour(traits.hat_hue, 0.8, 0.75)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue


def _along(start: Point, angle: float, length: float) -> Point:
    """The point at a distance from ``start``; 0 degrees are straight down."""
    radians = math.radians(angle)
    return start[0] + length * math.sin(radians), start[1] + length * math.cos(radians)


def _body(canvas: Canvas, traits: Traits, half: float, high: float, colour: Colour, second: Colour) -> None:
    _outline_of_body(canvas, traits.shape, half, high, colour)
    if traits.pattern == "plain":
        return
    marks = Canvas(outlined=False, clear=True)
    if traits.pattern == "belly":
        marks.oval((0.5, 0.5 + high * 0.5), (half * 0.62, high * 0.42), second)
    elif traits.pattern == "stripes":
        for i in range(3):
            y = 0.5 + high * (0.22 + 0.28 * i)
            marks.box((0, y), (1, y + high * 0.13), second)
    else:
        for x, y in ((-0.55, 0.3), (0.1, 0.42), (0.6, 0.2), (-0.25, 0.75), (0.4, 0.72)):
            marks.oval((0.5 + half * x, 0.5 + high * y), (0.027, 0.027), second)
    within = Canvas(outlined=False, clear=True)
    _outline_of_body(within, traits.shape, half - 0.005, high - 0.005, colour)
    mask = ImageChops.multiply(marks.image.getchannel("A"), within.image.getchannel("A"))
    canvas.image.paste(marks.image, (0, 0), mask)


def _outline_of_body(canvas: Canvas, shape: str, half: float, high: float, colour: Colour) -> None:
    top, bottom = 0.5 - high, 0.5 + high
    if shape == "square":
        canvas.box((0.5 - half, top), (0.5 + half, bottom), colour, corner=0.035)
    elif shape == "pear":
        turns = [math.tau * i / 48 for i in range(48)]
        wide = [0.95 - 0.35 * math.cos(turn) for turn in turns]
        canvas.polygon(
            [(0.5 + half * w * math.sin(turn), 0.5 - high * math.cos(turn)) for turn, w in zip(turns, wide)], colour
        )
    else:
        canvas.oval((0.5, 0.5), (half, high), colour)


def _ears(canvas: Canvas, traits: Traits, half: float, top: float, colour: Colour, second: Colour) -> None:
    out = half * (0.45 if traits.shape == "pear" else 0.62)
    for side in (-1, 1):
        x, y = 0.5 + side * out, top + 0.04
        if traits.ears == "pointed":
            canvas.polygon([(x - 0.045, y + 0.03), (x + side * 0.03, y - 0.09), (x + 0.045, y + 0.03)], colour)
        elif traits.ears == "round":
            canvas.oval((x + side * 0.015, y - 0.02), (0.048, 0.048), colour)
            canvas.oval((x + side * 0.015, y - 0.02), (0.026, 0.026), second)
        elif traits.ears == "long":
            canvas.oval((x, y - 0.08), (0.03, 0.1), colour)
            canvas.oval((x, y - 0.08), (0.014, 0.07), second)
        else:
            canvas.stroke([(x, y), (x + side * 0.035, y - 0.035), (x + side * 0.03, y - 0.085)], 0.025, (240, 232, 205))


def _face(canvas: Canvas, traits: Traits, half: float, top: float, closed: bool) -> None:
    y, apart = top + 0.11, half * 0.38
    eyes = [0.5] if traits.eyes == "one" else [0.5 - apart, 0.5 + apart]
    for x in eyes:
        r = 0.038 if traits.eyes == "one" else 0.028
        if closed:
            canvas.stroke([(x - r, y), (x, y + 0.012), (x + r, y)], 0.008, OUTLINE)
        elif traits.eyes == "dots":
            canvas.oval((x, y), (0.014, 0.017), OUTLINE)
        else:
            canvas.oval((x, y), (r, r), WHITE)
            canvas.oval((x, y + 0.004), (r * 0.5, r * 0.5), OUTLINE)
            if traits.eyes == "sleepy":
                canvas.box((x - r, y - r), (x + r, y - r * 0.1), _colours(traits)[0])
    canvas.stroke([(0.475, y + 0.05), (0.5, y + 0.062), (0.525, y + 0.05)], 0.008, OUTLINE)


def _hat(canvas: Canvas, traits: Traits, half: float, top: float, colour: Colour) -> None:
    w, y = min(half, 0.13) * 0.75, top + 0.035
    if traits.hat == "cap":
        canvas.polygon([*_arc((0.5, y), w, 0.085, 180)], colour)
        canvas.box((0.5, y - 0.012), (0.5 + w * 1.7, y + 0.008), colour, corner=0.008)
    elif traits.hat == "top hat":
        canvas.box((0.5 - w * 0.7, y - 0.13), (0.5 + w * 0.7, y), colour)
        canvas.box((0.5 - w * 1.25, y - 0.012), (0.5 + w * 1.25, y + 0.008), colour, corner=0.008)
    elif traits.hat == "party hat":
        canvas.polygon([(0.5 - w * 0.7, y), (0.5, y - 0.17), (0.5 + w * 0.7, y)], colour)
        canvas.oval((0.5, y - 0.17), (0.02, 0.02), (255, 226, 90))
    elif traits.hat == "crown":
        teeth = [(0.5 + w * x, y - h) for x, h in ((-0.9, 0.09), (-0.45, 0.04), (0, 0.1), (0.45, 0.04), (0.9, 0.09))]
        canvas.polygon([(0.5 - w * 0.8, y), *teeth, (0.5 + w * 0.8, y)], (246, 200, 62))
        canvas.oval((0.5, y - 0.025), (0.014, 0.014), colour)


def _arc(centre: Point, rx: float, ry: float, degrees: float) -> Iterator[Point]:
    """An upper arc's points."""
    for i in range(25):
        turn = math.radians(180 + degrees * i / 24)
        yield centre[0] + rx * math.cos(turn), centre[1] + ry * math.sin(turn)
