"""The reference picture: whatever a user hands over becomes an RGB square on white."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ResizeMode = Literal["pad", "stretch"]
Keep = Literal["auto", "white", "black"]
KEEP: tuple[Keep, ...] = get_args(Keep)
Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | torch.Tensor"

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
ENCODER_RESOLUTION = 384
"""Side in pixels of what the encoders see at once."""
THUMBNAIL = 256
LARGEST = 4096
"""Pixels of a picture's longer side before it becomes a square; larger ones are shrunk, however thin they are."""
OVERSHOOT = 0.5
"""How far outside 0 to 1 a resized float picture may lie; a picture in 0 to 255 lies further."""
KEEPS = 128
"""What a mask has to be, of 255, to keep a pixel."""


def open_picture(picture: Picture, ground: Colour = WHITE) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        picture: a path; a PIL image of any mode; or an array or tensor of one picture, [H, W], [H, W, C] or
            [C, H, W] with 1, 3 or 4 channels, a leading 1 allowed, of bool, uint8, uint16, or float in [0, 1]. What
            resizing left a little outside of it is clipped.
        ground: the colour behind what is transparent.

    Returns:
        RGB, turned as its EXIF says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a picture, cut off, empty, of a shape or of values that no picture has.
    """
    image = _open(picture)
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image.convert("RGB")


def prepare_reference(
    picture: Picture, mask: Picture | None = None, margin: float = 0.05, fit: ResizeMode = "pad", keep: Keep = "white"
) -> tuple[Image.Image, str]:
    """A reference picture as the encoders see it best: the character alone, on white, in a square.

    Args:
        picture: see :func:`open_picture`.
        mask: what of it the character is, stretched over the picture if it has another size.
        margin: see :func:`cut_out`.
        fit: how the picture becomes a square where nothing is cut out, see :func:`to_square`.
        keep: which side of the mask the character is, see :func:`character_side`.

    Returns:
        The square, and a sentence that says what was kept of the picture.

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
    square = cut_out(image, alpha, margin)
    return square, f"kept what is {side} in the mask, {np.mean(values >= KEEPS):.0%} of the picture"


def character_side(image: Image.Image, mask: Image.Image, keep: Keep = "auto") -> Literal["white", "black"]:
    """Which side of a mask the character is.

    A mask that is painted over the character has it in white; one that ComfyUI makes of a transparent picture has the
    transparent part in white. ``"auto"`` tells them apart: a transparent part has one colour, and the ground lies along
    the picture's edge rather than in its middle.

    Args:
        image: RGB.
        mask: of the same size, mode L.
        keep: ``"white"`` or ``"black"``: as it says; ``"auto"``: white, unless white looks like the ground.

    Raises:
        ValueError: another ``keep``.
    """
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}; expected one of {', '.join(KEEP)}")
    if keep != "auto":
        return keep
    white, pixels = np.asarray(mask) >= KEEPS, np.asarray(image)
    white_is_flat, black_is_flat = _is_flat(pixels[white]), _is_flat(pixels[~white])
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
        mask: white keeps, black and transparent take away, grey blends; stretched over the picture if it has another
            size.
        margin: white added on each side, as a fraction of the longer side of the mask's box, 0 to 1.

    Raises:
        ValueError: a mask with nothing in it, or a margin out of its range.
    """
    image = open_picture(picture)
    alpha = _open_mask(mask, image.size)
    if not 0 <= margin <= 1:
        raise ValueError(f"margin is {margin}; expected 0 to 1")
    box = alpha.point(lambda value: 255 if value >= KEEPS else 0).getbbox()
    if box is None:
        raise ValueError("the mask is empty: paint the character white in it")
    cut = Image.composite(image, Image.new("RGB", image.size, WHITE), alpha).crop(box)
    square = to_square(cut)
    return ImageOps.expand(square, round(margin * square.width), WHITE)


def to_square(image: Image.Image, fit: ResizeMode = "pad") -> Image.Image:
    """A square with the picture's longer side, of at most :data:`LARGEST` pixels.

    Args:
        image: RGB.
        fit: ``"pad"`` centres it on white; ``"stretch"`` resizes it, which distorts, as the reference
            implementation does.

    Raises:
        ValueError: another ``fit``.
    """
    if (side := max(image.size)) > LARGEST:
        width, height = (max(round(length * LARGEST / side), 1) for length in image.size)
        image, side = image.resize((width, height)), LARGEST
    if fit == "stretch":
        return image.resize((side, side))
    if fit != "pad":
        raise ValueError(f"fit is {fit!r}; expected 'pad' or 'stretch'")
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crops(square: Image.Image) -> tuple[list[Image.Image], list[Image.Image]]:
    """What the encoders see of a square: the whole at 384 px, and its quarters, each at 384 px.

    The quarters are in the order top-left, top-right, bottom-left, bottom-right.
    """
    high = square.resize((2 * ENCODER_RESOLUTION, 2 * ENCODER_RESOLUTION))
    corners = [(x, y) for y in (0, ENCODER_RESOLUTION) for x in (0, ENCODER_RESOLUTION)]
    return [square.resize((ENCODER_RESOLUTION, ENCODER_RESOLUTION))], [
        high.crop((x, y, x + ENCODER_RESOLUTION, y + ENCODER_RESOLUTION)) for x, y in corners
    ]


def open_mask(mask: Picture) -> Image.Image:
    """A mask as 8-bit grey: white where something may be; what is transparent is black.

    Args:
        mask: see :func:`open_picture`.

    Raises:
        ValueError: not a picture, or 0 and 1 in uint8, which as a picture is black.
    """
    alpha = open_picture(mask, BLACK).convert("L")
    if np.asarray(alpha).max() == 1 and str(getattr(mask, "dtype", "")).endswith("uint8"):
        raise ValueError("the mask has values of 0 and 1 in uint8; expected 0 to 255: convert it to bool")
    return alpha


def thumbnail(picture: Picture) -> Image.Image:
    """A small square of a picture, on white, to know it by."""
    return to_square(open_picture(picture)).resize((THUMBNAIL, THUMBNAIL))


def _open(picture: Picture) -> Image.Image:
    """8-bit PIL, upright; transparency still in it."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().numpy() if picture.dtype != torch.bfloat16 else picture.float().cpu().numpy()
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if not isinstance(picture, (str, Path, Image.Image)):
        raise ValueError(f"a {type(picture).__name__} is not a picture; expected a path, PIL image, array or tensor")
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(f"{picture} is not a picture that can be read: {error}") from error
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        raise ValueError(f"{picture} is not a whole picture: {error}") from error
    if not min(image.size):
        raise ValueError(f"the picture is empty: {_size(image)} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # a file of 16 bits
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the picture's values run from {values.min()} to {values.max()}; expected 0 to 65535")
        return _from_array(values.astype(np.uint16))
    return _from_array(np.asarray(image)) if image.mode.startswith("F") else image


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(f"an array of shape {shape} is not one picture; expected [H, W], [H, W, C] or [C, H, W]")
    return Image.fromarray(_to_uint8(array))


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a picture of {array.dtype}; expected uint8, uint16, bool, or float in 0 to 1: convert it")
    if not (array.min() >= -OVERSHOOT and array.max() <= 1 + OVERSHOOT):  # NaN is not, either
        raise ValueError(f"{array.dtype} values run from {array.min()} to {array.max()}; expected float in 0 to 1")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def _open_mask(mask: Picture, size: tuple[int, int]) -> Image.Image:
    """A mask stretched over a picture of this size."""
    alpha = open_mask(mask)
    return alpha if alpha.size == size else alpha.resize(size, Image.Resampling.BILINEAR)


def _is_flat(pixels: np.ndarray) -> bool:
    """Whether nearly all of these pixels, [N, 3], have one colour."""
    if not len(pixels):
        return False
    pixels = pixels[:: -(-len(pixels) // 10_000)]
    off = np.abs(pixels - np.median(pixels, axis=0)).max(axis=1)
    return bool((off <= 8).mean() >= 0.95)


def _size(image: Image.Image) -> str:
    return f"{image.width}×{image.height}"
