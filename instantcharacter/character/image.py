"""Preparation of a reference picture: the character alone, on white, in a square, and the encoders' crops of it."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from ..files.pictures import LARGEST_SIDE, WHITE, Picture, ResizeMode, open_mask, open_picture, to_square

Keep = Literal["auto", "white", "black"]
KEEP: tuple[Keep, ...] = get_args(Keep)
ENCODER_RESOLUTION = 384
"""Side in pixels of the encoders' input."""
KEEPS = 128
"""Least value of a mask, of 255, that keeps a pixel."""


def prepare_reference(
    picture: Picture, mask: Picture | None = None, margin: float = 0.05, fit: ResizeMode = "pad", keep: Keep = "white"
) -> tuple[Image.Image, str]:
    """A reference picture with the character alone, on white, in a square.

    Args:
        picture: see :func:`open_picture`.
        mask: of the character, stretched over the picture if it has another size.
        margin: see :func:`cut_out`.
        fit: how a picture that is not cut out becomes a square, see :func:`to_square`.
        keep: the character's side of the mask, see :func:`character_side`.

    Returns:
        The square, and a sentence on the part of the picture in it.

    Raises:
        ValueError: not a picture or a mask, or a mask that keeps nothing where ``keep`` names its side.
    """
    image = open_picture(picture)
    if mask is None:
        return to_square(image, fit), "kept the whole picture"
    alpha = _open_mask(mask, image.size)
    side = character_side(image, alpha, keep)
    if side == "black":
        alpha = ImageOps.invert(alpha)
    values = np.asarray(alpha)
    if values.min() == 255 or (keep == "auto" and values.max() < KEEPS):
        return to_square(image, fit), "kept the whole picture: nothing of it is masked"
    square = _cut_out(image, alpha, margin)
    return square, f"kept what is {side} in the mask, {np.mean(values >= KEEPS):.0%} of the picture"


def character_side(image: Image.Image, mask: Image.Image, keep: Keep = "auto") -> Literal["white", "black"]:
    """The character's side of a mask.

    A mask painted over the character is white there; ComfyUI's mask of a transparent picture is white where the picture
    is transparent. ``"auto"`` distinguishes them: a transparent part has one colour, and the background lies along the
    picture's edge rather than in its middle.

    Args:
        image: RGB.
        mask: of the same size, mode L.
        keep: ``"white"``, ``"black"``, or ``"auto"`` for white, unless white looks like the background.

    Raises:
        ValueError: an unknown ``keep``.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}; expected one of {', '.join(KEEP)}")
    if keep != "auto":
        return keep
    white = np.asarray(mask) >= KEEPS
    samples = _sample(white), _sample(~white)
    pixels = np.asarray(image).reshape(-1, 3)
    white_is_flat, black_is_flat = (_is_flat(pixels[sample]) for sample in samples)
    if white_is_flat != black_is_flat:
        return "black" if white_is_flat else "white"
    rows, columns = white.shape
    middle = white[rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4].mean()
    edge = np.concatenate([white[0], white[-1], white[:, 0], white[:, -1]]).mean()
    return "black" if edge > max(middle, 0.5) else "white"


def cut_out(picture: Picture, mask: Picture, margin: float = 0.05) -> Image.Image:
    """The masked part of a picture, on white, in a square with a margin around it.

    Args:
        picture: see :func:`open_picture`.
        mask: white keeps, black and transparent remove, grey blends; stretched over the picture if it has another
            size.
        margin: white added on each side, as a fraction of the longer side of the mask's box, 0 to 1. With it, the
            square has at most :data:`~instantcharacter.files.pictures.LARGEST_SIDE` pixels a side.

    Raises:
        ValueError: an empty mask, or a margin out of its range.
    """
    image = open_picture(picture)
    return _cut_out(image, _open_mask(mask, image.size), margin)


def crops(square: Image.Image) -> tuple[list[Image.Image], list[Image.Image]]:
    """The encoders' crops of a square: the whole at 384 px, and its quarters, each at 384 px.

    The quarters are in the order top-left, top-right, bottom-left, bottom-right.
    """
    high = square.resize((2 * ENCODER_RESOLUTION, 2 * ENCODER_RESOLUTION))
    corners = [(x, y) for y in (0, ENCODER_RESOLUTION) for x in (0, ENCODER_RESOLUTION)]
    return [square.resize((ENCODER_RESOLUTION, ENCODER_RESOLUTION))], [
        high.crop((x, y, x + ENCODER_RESOLUTION, y + ENCODER_RESOLUTION)) for x, y in corners
    ]


def _cut_out(image: Image.Image, alpha: Image.Image, margin: float) -> Image.Image:
    """See :func:`cut_out`: an RGB picture, and a mask of its size in mode L."""
    if not 0 <= margin <= 1:
        raise ValueError(f"margin is {margin}; expected 0 to 1")
    box = alpha.point(lambda value: 255 if value >= KEEPS else 0).getbbox()
    if box is None:
        raise ValueError("the mask is empty: paint the character white in it")
    alpha = alpha.crop(box)
    cut = Image.new("RGB", alpha.size, WHITE)
    cut.paste(image.crop(box), mask=alpha)
    square = to_square(cut, largest=int(LARGEST_SIDE / (1 + 2 * margin)))
    return ImageOps.expand(square, round(margin * square.width), WHITE)


def _open_mask(mask: Picture, size: tuple[int, int]) -> Image.Image:
    """A mask stretched over a picture of this size."""
    alpha = open_mask(mask)
    return alpha if alpha.size == size else alpha.resize(size, Image.Resampling.BILINEAR)


def _sample(where: np.ndarray) -> np.ndarray:
    """Indices of at most 10,000 pixels among those of a side of a mask, [height, width]."""
    indices = np.flatnonzero(where)
    return indices[:: max(-(-len(indices) // 10_000), 1)]


def _is_flat(pixels: np.ndarray) -> bool:
    """Whether nearly all of these pixels, [N, 3], have one colour."""
    if not len(pixels):
        return False
    off = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1)
    return bool((off <= 8).mean() >= 0.95)
