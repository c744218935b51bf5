"""A character's traits, and the words for them."""

from __future__ import annotations

import random
import zlib
from dataclasses import astuple, dataclass

HELD_OUT = 8
"""One in this many combinations of discrete traits is held out for testing."""

SHAPES = ("round", "tall", "square", "pear")
EARS = ("pointed", "round", "long", "horns")
HATS = ("none", "cap", "top hat", "party hat", "crown")
EYES = ("dots", "wide", "sleepy", "one")
PATTERNS = ("plain", "belly", "stripes", "spots")
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "purple", "magenta", "pink")


@dataclass(frozen=True)
class Traits:
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
        """Whether this combination of discrete traits is for testing, in no training picture."""
        return zlib.crc32(repr(astuple(self)[:5]).encode()) % HELD_OUT == 0

    def describe(self) -> str:
        """The traits in words, as in alt texts on the web; no caption has them."""
        pattern = "" if self.pattern == "plain" else f"{_hue_word(self.hue + 0.25 + 0.5 * self.second_hue)} "
        hat = "no hat" if self.hat == "none" else f"a {_hue_word(self.hat_hue)} {self.hat}"
        pale = "pale " if self.paleness > 0.5 else ""
        eyes = "one eye" if self.eyes == "one" else f"{self.eyes} eyes"
        body = f"a {self.shape} {pale}{_hue_word(self.hue)} character"
        return f"{body}, {pattern}{self.pattern}, with {self.ears} ears, {hat} and {eyes}"


MONSTER = Traits("pear", "horns", "party hat", "one", "belly", 0.47, 0.2, 0.55, 0.95, 0.6)
"""The demo's character, ``assets/monster.png``; held out."""


def random_traits(rng: random.Random, held_out: bool) -> Traits:
    """A random character for training, or a held-out one for testing."""
    while True:
        discrete = [rng.choice(choices) for choices in (SHAPES, EARS, HATS, EYES, PATTERNS)]
        traits = Traits(*discrete, *(rng.random() for _ in range(5)))
        if traits.held_out == held_out:
            return traits


def _hue_word(hue: float) -> str:
    return HUES[round(hue * len(HUES)) % len(HUES)]
