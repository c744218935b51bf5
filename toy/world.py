"""The toy world: cartoon characters that do things in scenes, drawn by code from a seed.

A character is some discrete and some continuous traits. A picture is a character, an action, a scene, a style, and a
seed for all that varies beside them: where it stands, how large, which way it looks, what else is there. The caption
names action, scene and style, and never the character's looks: those are what an adapter has to bring.

:func:`sheet` shows all of it: ``python toy/world.py output/world.png``.
"""

from __future__ import annotations

import colorsys
import math
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 256
"""Pixels of a picture."""
FINE = 2
"""Drawn this much larger, then made smaller: edges are smooth."""
HELD_OUT = 8
"""One in so many combinations of discrete traits is for testing, in no picture to learn from."""

Colour = tuple[int, int, int]
Point = tuple[float, float]

SHAPES = ("round", "tall", "square", "pear")
EARS = ("pointed", "round", "long", "horns")
HATS = ("none", "cap", "top hat", "party hat", "crown")
EYES = ("dots", "wide", "sleepy", "one")
PATTERNS = ("plain", "belly", "stripes", "spots")
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "purple", "magenta", "pink")
OUTLINE: Colour = (40, 34, 46)
WHITE: Colour = (255, 255, 255)


@dataclass(frozen=True)
class Look:
    """A character's traits; hues and sizes from 0 to 1."""

    shape: str
    ears: str
    hat: str
    eyes: str
    pattern: str
    hue: float
    paleness: float
    second_hue: float
    hat_hue: float
    width: float

    @property
    def held_out(self) -> bool:
        """Whether its discrete traits come together in no picture to learn from."""
        return zlib.crc32(repr(astuple(self)[:5]).encode()) % HELD_OUT == 0

    def describe(self) -> str:
        """The traits in words, as people write beside pictures in the web; no caption has them."""
        pattern = "" if self.pattern == "plain" else f"{_hue_word(self.hue + 0.25 + 0.5 * self.second_hue)} "
        hat = "no hat" if self.hat == "none" else f"a {_hue_word(self.hat_hue)} {self.hat}"
        pale = "pale " if self.paleness > 0.5 else ""
        eyes = "one eye" if self.eyes == "one" else f"{self.eyes} eyes"
        body = f"a {self.shape} {pale}{_hue_word(self.hue)} character"
        return f"{body}, {pattern}{self.pattern}, with {self.ears} ears, {hat} and {eyes}"


MONSTER = Look("pear", "horns", "party hat", "one", "belly", 0.47, 0.2, 0.55, 0.95, 0.6)
"""The demo's, ``assets/monster.png``; for testing."""


def random_look(rng: random.Random, held_out: bool) -> Look:
    """A character to learn from, or one for testing."""
    while True:
        traits = (rng.choice(choices) for choices in (SHAPES, EARS, HATS, EYES, PATTERNS))
        look = Look(*traits, *(rng.random() for _ in range(5)))
        if look.held_out == held_out:
            return look


@dataclass(frozen=True)
class Pose:
    """How an action looks: angles in degrees, 0 straight down, larger ones outwards and up; what is in the hand."""

    arms: tuple[float, float]
    legs: tuple[float, float]
    tilt: float = 0.0
    lift: float = 0.0
    eyes_closed: bool = False
    prop: str = ""


ACTIONS: dict[str, tuple[Pose, tuple[str, ...]]] = {
    "wave": (Pose((30, 150), (5, 5)), ("waving", "that waves")),
    "jump": (Pose((125, 125), (55, 55), lift=0.16), ("jumping", "that jumps into the air")),
    "sit": (Pose((40, 40), (85, 85), lift=-0.05), ("sitting on the ground", "that sits down")),
    "sleep": (Pose((20, 20), (8, 8), tilt=82, lift=-0.1, eyes_closed=True), ("sleeping", "lying asleep")),
    "run": (Pose((75, 75), (60, -30), tilt=-14, lift=0.03), ("running", "that runs")),
    "balloon": (Pose((25, 140), (5, 5), prop="balloon"), ("with a balloon", "holding a balloon")),
    "read": (Pose((55, 55), (5, 5), prop="book"), ("reading a book", "with an open book")),
    "swim": (Pose((95, 95), (25, -5), tilt=55, lift=0.04, prop="ring"), ("in a swim ring", "floating in a swim ring")),
}
SCENES: dict[str, tuple[str, ...]] = {
    "beach": ("on a beach", "by the sea"),
    "forest": ("in a forest", "among trees"),
    "city": ("in a city at night", "before lit windows at night"),
    "snow": ("in the snow", "in a snowy land"),
    "desert": ("in a desert", "among cacti in the sand"),
    "reef": ("under water", "at the bottom of the sea"),
    "moon": ("on the moon", "in space, on the moon"),
    "room": ("in a room", "at home, in a room"),
}
STYLES: dict[str, tuple[str, ...]] = {
    "flat": ("a picture of", "a flat drawing of"),
    "comic": ("a comic of", "a comic drawing with outlines of"),
    "watercolour": ("a watercolour of", "a soft watercolour painting of"),
}
PLACES = {1: ([(0.35, 0.65)], [(1.0, 1.25)]), 2: ([(0.23, 0.3), (0.7, 0.77)], [(0.8, 0.95)] * 2)}
"""Where one character or each of two may stand, and how large."""
LORA_STYLE = "pixel"
"""In no picture that the base model learns from: a style LoRA's."""
LORA_WORDS = "pixel art of"


@dataclass(frozen=True)
class Shot:
    """All that decides a picture."""

    look: Look
    action: str
    scene: str
    style: str
    seed: int
    companion: Look | None = None
    """Who does the same to the right of it, if anybody does."""

    def caption(self) -> str:
        """What is in the picture but for who it is; the same thing is said in several ways."""
        rng = random.Random(self.seed)
        style = LORA_WORDS if self.style == LORA_STYLE else rng.choice(STYLES[self.style])
        doing, where = rng.choice(ACTIONS[self.action][1]), rng.choice(SCENES[self.scene])
        if self.companion:
            return f"{style} two characters {ACTIONS[self.action][1][0]} {where}"
        return f"{style} a character {doing} {where}"

    def alt_text(self) -> str:
        """The caption, and who it is: what a vision encoder learns from."""
        return self.caption().replace("a character", self.encode_images.describe())

    def draw(self) -> Image.Image:
        """RGB, :data:`SIDE` × :data:`SIDE`."""
        rng, (pose, _) = random.Random(self.seed), ACTIONS[self.action]
        page = Page(outlined=self.style == "comic")
        PAINTED[self.scene](page, rng)
        looks = [self.encode_images] if self.companion is None else [self.encode_images, self.companion]
        for look, (low, high), (smallest, largest) in zip(looks, *PLACES[len(looks)]):
            scale, x = rng.uniform(smallest, largest), rng.uniform(low, high)
            figure = _figure(look, pose, page.outlined, mirrored=rng.random() < 0.5)
            page.paste(figure, scale, (x, rng.uniform(0.56, 0.64) - pose.lift))
        return _in_style(page.image, self.style)


def random_shot(rng: random.Random, look: Look, style: str | None = None) -> Shot:
    """The character at anything, anywhere."""
    return Shot(
        look, rng.choice([*ACTIONS]), rng.choice([*SCENES]), style or rng.choice([*STYLES]), rng.randrange(2**31)
    )


def draw_reference(look: Look) -> Image.Image:
    """The character on white, doing nothing: what a user would give."""
    page = Page(outlined=False)
    page.box((0, 0), (1, 1), WHITE)
    page.paste(_figure(look, Pose((35, 35), (5, 5)), False, False), 1.35, (0.5, 0.53))
    return _in_style(page.image, "flat")


class Page:
    """Something to draw on, in fractions of its side from the top left; ``outlined`` shapes have a dark line."""

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
        """Put a transparent picture of this size here."""
        size = round(self.side * scale)
        at = [round(place * self.side - size / 2) for place in centre]
        small = figure.resize((size, size), Image.Resampling.BILINEAR)
        self.image.paste(small, (at[0], at[1]), small)

    def _stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        self._pen.line(self._pixels(*points), fill=colour, width=round(width * self.side), joint="curve")
        for x, y in points:
            r = width / 2
            self._pen.ellipse(self._pixels((x - r, y - r), (x + r, y + r)), fill=colour)

    def _pixels(self, *points: Point) -> list[tuple[float, float]]:
        return [(x * self.side, y * self.side) for x, y in points]


def _figure(look: Look, pose: Pose, outlined: bool, mirrored: bool) -> Image.Image:
    """The character in the middle of a transparent picture."""
    page = Page(outlined, clear=True)
    colour, second, hat = _colours(look)
    half = 0.13 * (0.85 + 0.3 * look.width) * {"round": 1.15, "tall": 0.85}.get(look.shape, 1.0)
    high = {"round": 0.15, "tall": 0.2}.get(look.shape, 0.17)
    top, bottom = 0.5 - high, 0.5 + high
    for side, angle in zip((-1, 1), pose.legs):
        hip = (0.5 + side * half * 0.5, bottom - 0.03)
        page.stroke([hip, _along(hip, side * angle, 0.11)], 0.055, colour)
    _ears(page, look, half, top, colour, second)
    _body(page, look, half, high, colour, second)
    if pose.prop == "ring":
        page.oval((0.5, 0.58), (half * 1.5, 0.06), (236, 74, 74))
        page.oval((0.5, 0.565), (half * 0.9, 0.03), colour)
    hands = []
    for side, angle in zip((-1, 1), pose.arms):
        shoulder = (0.5 + side * half * 0.85, 0.53)
        hands.append(_along(shoulder, side * angle, 0.13))
        page.stroke([shoulder, hands[-1]], 0.045, colour)
    _face(page, look, half, top, pose.eyes_closed)
    _hat(page, look, half, top, hat)
    if pose.prop == "balloon":
        x, y = hands[1]
        page.stroke([(x, y), (x + 0.03, y - 0.12)], 0.006, OUTLINE)
        page.oval((x + 0.03, y - 0.17), (0.055, 0.068), (226, 58, 72))
    if pose.prop == "book":
        page.polygon([(0.38, 0.6), (0.5, 0.63), (0.5, 0.72), (0.38, 0.69)], (250, 246, 232))
        page.polygon([(0.62, 0.6), (0.5, 0.63), (0.5, 0.72), (0.62, 0.69)], (232, 226, 206))
    image = page.image.rotate(-pose.tilt, Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def _hue_word(hue: float) -> str:
    return HUES[round(hue * len(HUES)) % len(HUES)]


def _colours(look: Look) -> tuple[Colour, Colour, Colour]:
    """Of the body, of what is on it, and of the hat."""
    body = _colour(look.hue, 0.45 + 0.45 * (1 - look.paleness), 0.92)
    second = _colour(look.hue + 0.25 + 0.5 * look.second_hue, 0.5, 0.98)
    return body, second, _colour(look.hat_hue, 0.8, 0.75)


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))
    return red, green, blue


def _along(start: Point, angle: float, length: float) -> Point:
    """A point from another one on; 0 degrees are straight down."""
    radians = math.radians(angle)
    return start[0] + length * math.sin(radians), start[1] + length * math.cos(radians)


def _body(page: Page, look: Look, half: float, high: float, colour: Colour, second: Colour) -> None:
    _outline_of_body(page, look.shape, half, high, colour)
    if look.pattern == "plain":
        return
    marks = Page(outlined=False, clear=True)
    if look.pattern == "belly":
        marks.oval((0.5, 0.5 + high * 0.5), (half * 0.62, high * 0.42), second)
    elif look.pattern == "stripes":
        for i in range(3):
            y = 0.5 + high * (0.22 + 0.28 * i)
            marks.box((0, y), (1, y + high * 0.13), second)
    else:
        for x, y in ((-0.55, 0.3), (0.1, 0.42), (0.6, 0.2), (-0.25, 0.75), (0.4, 0.72)):
            marks.oval((0.5 + half * x, 0.5 + high * y), (0.027, 0.027), second)
    within = Page(outlined=False, clear=True)
    _outline_of_body(within, look.shape, half - 0.005, high - 0.005, colour)
    mask = ImageChops.multiply(marks.image.getchannel("A"), within.image.getchannel("A"))
    page.image.paste(marks.image, (0, 0), mask)


def _outline_of_body(page: Page, shape: str, half: float, high: float, colour: Colour) -> None:
    top, bottom = 0.5 - high, 0.5 + high
    if shape == "square":
        page.box((0.5 - half, top), (0.5 + half, bottom), colour, corner=0.035)
    elif shape == "pear":
        turns = [math.tau * i / 48 for i in range(48)]
        wide = [0.95 - 0.35 * math.cos(turn) for turn in turns]
        page.polygon(
            [(0.5 + half * w * math.sin(turn), 0.5 - high * math.cos(turn)) for turn, w in zip(turns, wide)], colour
        )
    else:
        page.oval((0.5, 0.5), (half, high), colour)


def _ears(page: Page, look: Look, half: float, top: float, colour: Colour, second: Colour) -> None:
    out = half * (0.45 if look.shape == "pear" else 0.62)
    for side in (-1, 1):
        x, y = 0.5 + side * out, top + 0.04
        if look.ears == "pointed":
            page.polygon([(x - 0.045, y + 0.03), (x + side * 0.03, y - 0.09), (x + 0.045, y + 0.03)], colour)
        elif look.ears == "round":
            page.oval((x + side * 0.015, y - 0.02), (0.048, 0.048), colour)
            page.oval((x + side * 0.015, y - 0.02), (0.026, 0.026), second)
        elif look.ears == "long":
            page.oval((x, y - 0.08), (0.03, 0.1), colour)
            page.oval((x, y - 0.08), (0.014, 0.07), second)
        else:
            page.stroke([(x, y), (x + side * 0.035, y - 0.035), (x + side * 0.03, y - 0.085)], 0.025, (240, 232, 205))


def _face(page: Page, look: Look, half: float, top: float, closed: bool) -> None:
    y, apart = top + 0.11, half * 0.38
    eyes = [0.5] if look.eyes == "one" else [0.5 - apart, 0.5 + apart]
    for x in eyes:
        r = 0.038 if look.eyes == "one" else 0.028
        if closed:
            page.stroke([(x - r, y), (x, y + 0.012), (x + r, y)], 0.008, OUTLINE)
        elif look.eyes == "dots":
            page.oval((x, y), (0.014, 0.017), OUTLINE)
        else:
            page.oval((x, y), (r, r), WHITE)
            page.oval((x, y + 0.004), (r * 0.5, r * 0.5), OUTLINE)
            if look.eyes == "sleepy":
                page.box((x - r, y - r), (x + r, y - r * 0.1), _colours(look)[0])
    page.stroke([(0.475, y + 0.05), (0.5, y + 0.062), (0.525, y + 0.05)], 0.008, OUTLINE)


def _hat(page: Page, look: Look, half: float, top: float, colour: Colour) -> None:
    w, y = min(half, 0.13) * 0.75, top + 0.035
    if look.hat == "cap":
        page.polygon([*_arc((0.5, y), w, 0.085, 180)], colour)
        page.box((0.5, y - 0.012), (0.5 + w * 1.7, y + 0.008), colour, corner=0.008)
    elif look.hat == "top hat":
        page.box((0.5 - w * 0.7, y - 0.13), (0.5 + w * 0.7, y), colour)
        page.box((0.5 - w * 1.25, y - 0.012), (0.5 + w * 1.25, y + 0.008), colour, corner=0.008)
    elif look.hat == "party hat":
        page.polygon([(0.5 - w * 0.7, y), (0.5, y - 0.17), (0.5 + w * 0.7, y)], colour)
        page.oval((0.5, y - 0.17), (0.02, 0.02), (255, 226, 90))
    elif look.hat == "crown":
        teeth = [(0.5 + w * x, y - h) for x, h in ((-0.9, 0.09), (-0.45, 0.04), (0, 0.1), (0.45, 0.04), (0.9, 0.09))]
        page.polygon([(0.5 - w * 0.8, y), *teeth, (0.5 + w * 0.8, y)], (246, 200, 62))
        page.oval((0.5, y - 0.025), (0.014, 0.014), colour)


def _arc(centre: Point, rx: float, ry: float, degrees: float) -> Iterator[Point]:
    """An upper arc's points."""
    for i in range(25):
        turn = math.radians(180 + degrees * i / 24)
        yield centre[0] + rx * math.cos(turn), centre[1] + ry * math.sin(turn)


def _beach(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (150, 216, 246))
    page.oval((rng.uniform(0.12, 0.88), 0.13), (0.07, 0.07), (255, 231, 120))
    page.box((-0.1, 0.42), (1.1, 0.7), (48, 142, 200))
    page.box((-0.1, 0.6), (1.1, 1.1), (242, 218, 158))


def _forest(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (196, 228, 190))
    page.box((-0.1, 0.68), (1.1, 1.1), (104, 148, 78))
    for i in range(5):
        x = 0.02 + 0.24 * i + rng.uniform(-0.05, 0.05)
        y = rng.uniform(0.3, 0.4)
        page.box((x - 0.022, y), (x + 0.022, 0.74), (112, 80, 54))
        page.oval((x, y), (0.1, rng.uniform(0.13, 0.19)), (62, rng.randrange(112, 142), 72))


def _city(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (28, 32, 68))
    for i in range(6):
        x, high = 0.17 * i - 0.01, rng.uniform(0.15, 0.42)
        page.box((x, high), (x + 0.15, 0.85), (54, 58, 98))
        for row in range(5):
            for column in range(2):
                if rng.random() < 0.6:
                    low = (x + 0.03 + 0.06 * column, high + 0.04 + 0.08 * row)
                    page.box(low, (low[0] + 0.03, low[1] + 0.04), (255, 214, 110))
    page.box((-0.1, 0.78), (1.1, 1.1), (74, 74, 86))


def _snow(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (196, 212, 232))
    for x in (0.15, 0.55, 0.95):
        x += rng.uniform(-0.1, 0.1)
        page.polygon([(x - 0.3, 0.7), (x, rng.uniform(0.2, 0.35)), (x + 0.3, 0.7)], (150, 168, 196))
    page.box((-0.1, 0.66), (1.1, 1.1), (246, 249, 253))
    for _ in range(40):
        page.oval((rng.random(), rng.random()), (0.007, 0.007), WHITE)


def _desert(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (252, 206, 142))
    page.oval((rng.uniform(0.1, 0.9), 0.2), (0.09, 0.09), (250, 122, 74))
    page.box((-0.1, 0.62), (1.1, 1.1), (222, 164, 96))
    for x in (rng.uniform(0.05, 0.22), rng.uniform(0.78, 0.95)):
        page.stroke([(x, 0.72), (x, 0.44)], 0.05, (74, 138, 84))
        page.stroke([(x, 0.6), (x + 0.07, 0.58), (x + 0.07, 0.5)], 0.03, (74, 138, 84))


def _reef(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (22, 96, 150))
    page.box((-0.1, 0.84), (1.1, 1.1), (196, 178, 128))
    for _ in range(7):
        x, high = rng.random(), rng.uniform(0.5, 0.7)
        page.stroke([(x, 0.9), (x + 0.02, (0.9 + high) / 2), (x - 0.01, high)], 0.022, (42, 158, 112))
    for _ in range(12):
        r = rng.uniform(0.008, 0.02)
        page.oval((rng.random(), rng.uniform(0.05, 0.7)), (r, r), (150, 206, 232))


def _moon(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (10, 10, 24))
    for _ in range(45):
        page.oval((rng.random(), rng.uniform(0, 0.7)), (0.004, 0.004), WHITE)
    page.oval((rng.uniform(0.15, 0.85), 0.17), (0.085, 0.085), (82, 140, 216))
    page.oval((0.5, 1.35), (1.0, 0.65), (172, 172, 178))
    for _ in range(5):
        page.oval((rng.random(), rng.uniform(0.82, 0.97)), (0.05, 0.016), (138, 138, 146))


def _room(page: Page, rng: random.Random) -> None:
    page.box((0, 0), (1, 1), (236, 214, 196))
    page.box((-0.1, 0.72), (1.1, 1.1), (158, 104, 72))
    x = rng.uniform(0.08, 0.62)
    page.box((x, 0.12), (x + 0.28, 0.42), (250, 250, 250))
    page.box((x + 0.02, 0.14), (x + 0.26, 0.4), (160, 214, 244))
    page.box((x + 0.132, 0.14), (x + 0.148, 0.4), (250, 250, 250))
    page.oval((0.5, 0.86), (0.36, 0.07), (188, 72, 84))


PAINTED: dict[str, Callable[[Page, random.Random], None]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "snow": _snow,
    "desert": _desert,
    "reef": _reef,
    "moon": _moon,
    "room": _room,
}


def _in_style(image: Image.Image, style: str) -> Image.Image:
    """Made smaller, and what a style does to all of a picture alike."""
    if style == LORA_STYLE:
        small = image.resize((SIDE // 8, SIDE // 8), Image.Resampling.BOX)
        return small.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    if style != "watercolour":
        return image
    soft = image.filter(ImageFilter.GaussianBlur(2.2))
    return Image.blend(soft, Image.new("RGB", soft.size, (255, 252, 244)), 0.35)


def sheet(path: Path, seed: int = 0) -> None:
    """Write a picture of ten characters for testing, each as a reference and in seven pictures, the last a LoRA's."""
    rng = random.Random(seed)
    page = Image.new("RGB", (8 * SIDE, 10 * SIDE))
    for row in range(10):
        look = random_look(rng, held_out=True)
        pictures = [draw_reference(look), *(random_shot(rng, look).draw() for _ in range(6))]
        pictures.append(random_shot(rng, look, LORA_STYLE).draw())
        for column, picture in enumerate(pictures):
            page.paste(picture, (column * SIDE, row * SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


if __name__ == "__main__":
    sheet(Path(sys.argv[1]))
