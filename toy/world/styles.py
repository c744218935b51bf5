"""Gives a finished canvas its style."""

from __future__ import annotations

from PIL import Image, ImageFilter

from .canvas import SIDE
from .captions import LORA_STYLE

PIXEL = 8
"""The side of pixel art's pixels, in those of the picture."""


def apply_style(image: Image.Image, style: str) -> Image.Image:
    """The canvas reduced to :data:`~toy.world.canvas.SIDE` pixels, and filtered as its style asks."""
    if style == LORA_STYLE:
        small = image.resize((SIDE // PIXEL, SIDE // PIXEL), Image.Resampling.BOX)
        return small.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    if style != "watercolour":
        return image
    soft = image.filter(ImageFilter.GaussianBlur(2.2))
    return Image.blend(soft, Image.new("RGB", soft.size, (255, 252, 244)), 0.35)
