"""The toy world: cartoon characters that do things in scenes, drawn by code from a seed.

A character is some discrete and some continuous traits. A picture is a character, an action, a scene, a style, and a
seed for everything else: position, size, direction, details of the scene. Its caption names action, scene and style and
never the character's traits: those are what an adapter has to bring.

``python -m toy.world output/world.png`` draws a sheet of it.
"""

from .canvas import SIDE
from .captions import ACTIONS, LORA_STYLE, SCENES, STYLES
from .shot import Shot, draw_reference, random_shot
from .traits import MONSTER, Traits, random_traits

__all__ = [
    "ACTIONS",
    "LORA_STYLE",
    "MONSTER",
    "SCENES",
    "SIDE",
    "STYLES",
    "Shot",
    "Traits",
    "draw_reference",
    "random_shot",
    "random_traits",
]
