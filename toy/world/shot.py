"""A picture of the world as data: who does what, where, in which style; its caption; and the drawing of it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from .canvas import WHITE, Canvas
from .captions import ACTIONS, SCENES, STYLES, caption
from .figure import POSES, STANDING, draw_figure
from .scenes import DRAW_SCENE
from .styles import apply_style
from .traits import Traits

POSITIONS = {1: ([(0.35, 0.65)], [(1.0, 1.25)]), 2: ([(0.23, 0.3), (0.7, 0.77)], [(0.8, 0.95)] * 2)}
"""By the number of characters: the range of each one's horizontal position, and of its size."""


@dataclass(frozen=True)
class Shot:
    """Everything that decides a picture.

    Attributes:
        traits: the character's.
        action: a key of ``ACTIONS``.
        scene: a key of ``SCENES``.
        style: a key of ``STYLES``, or ``LORA_STYLE``.
        seed: decides positions, sizes, details of the scene, and the caption's words.
        companion: traits of a second character, to the right of the first and with the same action.
    """

    traits: Traits
    action: str
    scene: str
    style: str
    seed: int
    companion: Traits | None = None

    def caption(self) -> str:
        """Words for action, scene and style, none for the character."""
        return caption(self.action, self.scene, self.style, random.Random(self.seed), two=self.companion is not None)

    def alt_text(self) -> str:
        """The caption with the character's traits: what a vision encoder learns from."""
        return self.caption().replace("a character", self.traits.describe())

    def draw(self) -> Image.Image:
        """RGB, :data:`~toy.world.canvas.SIDE` pixels a side."""
        rng, pose = random.Random(self.seed), POSES[self.action]
        canvas = Canvas(outlined=self.style == "comic")
        DRAW_SCENE[self.scene](canvas, rng)
        characters = [self.traits] if self.companion is None else [self.traits, self.companion]
        for traits, (low, high), (smallest, largest) in zip(characters, *POSITIONS[len(characters)]):
            scale, x = rng.uniform(smallest, largest), rng.uniform(low, high)
            figure = draw_figure(traits, pose, canvas.outlined, mirrored=rng.random() < 0.5)
            canvas.paste(figure, scale, (x, rng.uniform(0.56, 0.64) - pose.lift))
        return apply_style(canvas.image, self.style)


def random_shot(rng: random.Random, traits: Traits, style: str | None = None) -> Shot:
    """A shot of the character with a random action and scene, and a random style if none is named."""
    action, scene = rng.choice([*ACTIONS]), rng.choice([*SCENES])
    return Shot(traits, action, scene, style or rng.choice([*STYLES]), rng.randrange(2**31))


def draw_reference(traits: Traits) -> Image.Image:
    """The character alone on white, standing: the picture that a user gives."""
    canvas = Canvas(outlined=False)
    canvas.box((0, 0), (1, 1), WHITE)
    canvas.paste(draw_figure(traits, STANDING, outlined=False, mirrored=False), 1.35, (0.5, 0.53))
    return apply_style(canvas.image, "flat")
