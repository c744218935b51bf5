"""The words of captions: several for each action, scene and style, and none for a character's traits."""

from __future__ import annotations

import random

ACTIONS: dict[str, tuple[str, ...]] = {
    "wave": ("waving", "that waves"),
    "jump": ("jumping", "that jumps into the air"),
    "sit": ("sitting on the ground", "that sits down"),
    "sleep": ("sleeping", "lying asleep"),
    "run": ("running", "that runs"),
    "balloon": ("with a balloon", "holding a balloon"),
    "read": ("reading a book", "with an open book"),
    "swim": ("in a swim ring", "floating in a swim ring"),
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
LORA_STYLE = "pixel"
"""The style that a LoRA learns; the base model's pictures have only those of :data:`STYLES`."""
LORA_WORDS = "pixel art of"


def caption(action: str, scene: str, style: str, rng: random.Random, two: bool = False) -> str:
    """Words for one character or ``two`` in a picture, chosen by ``rng``."""
    style_words = LORA_WORDS if style == LORA_STYLE else rng.choice(STYLES[style])
    action_words, scene_words = rng.choice(ACTIONS[action]), rng.choice(SCENES[scene])
    if two:
        return f"{style_words} two characters {ACTIONS[action][0]} {scene_words}"
    return f"{style_words} a character {action_words} {scene_words}"
