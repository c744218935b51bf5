"""The reference picture: whatever a user hands over becomes an RGB square on white."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Fit = Literal["pad", "stretch"]
Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | torch.Tensor"

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
VIEW = 384
"""Side in pixels of what the encoders see at once."""
THUMBNAIL = 256


def open_picture(picture: Picture, ground: Colour = WHITE) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        picture: a path; a PIL image of any mode; or an array or tensor of one picture, [H, W], [H, W, C] or
            [C, H, W] with 1, 3 or 4 channels, a leading 1 allowed, of bool, uint8, uint16, or float in [0, 1].
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


def cut_out(picture: Picture, mask: Picture, margin: float = 0.05) -> Image.Image:
    """The masked part of a picture, on white, in a square with a margin around it.

    Args:
        picture: see :func:`open_picture`.
        mask: of the same size; white keeps, black and transparent take away, grey blends.
        margin: white added on each side, as a fraction of the longer side of the mask's box, 0 to 1.

    Raises:
        ValueError: a mask of another size, a mask with nothing in it, or a margin out of its range.
    """
    image, alpha = open_picture(picture), open_picture(mask, BLACK).convert("L")
    if image.size != alpha.size:
        raise ValueError(f"the mask is {_size(alpha)}, the picture {_size(image)}; they must be of one size")
    if not 0 <= margin <= 1:
        raise ValueError(f"margin is {margin}; expected 0 to 1")
    box = alpha.point(lambda value: 255 if value >= 128 else 0).getbbox()
    if box is None:
        raise ValueError("the mask is empty: paint the character white in it")
    cut = Image.composite(image, Image.new("RGB", image.size, WHITE), alpha).crop(box)
    return ImageOps.expand(to_square(cut), round(margin * max(cut.size)), WHITE)


def to_square(image: Image.Image, fit: Fit = "pad") -> Image.Image:
    """A square with the picture's longer side.

    Args:
        image: RGB.
        fit: ``"pad"`` centres it on white; ``"stretch"`` resizes it, which distorts, as the reference
            implementation does.

    Raises:
        ValueError: another ``fit``.
    """
    side = max(image.size)
    if fit == "stretch":
        return image.resize((side, side))
    if fit != "pad":
        raise ValueError(f"fit is {fit!r}; expected 'pad' or 'stretch'")
    square = Image.new("RGB", (side, side), WHITE)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def views(square: Image.Image) -> tuple[list[Image.Image], list[Image.Image]]:
    """What the encoders see of a square: the whole at 384 px, and its quarters, each at 384 px.

    The quarters are in the order top-left, top-right, bottom-left, bottom-right.
    """
    high = square.resize((2 * VIEW, 2 * VIEW))
    corners = [(x, y) for y in (0, VIEW) for x in (0, VIEW)]
    return [square.resize((VIEW, VIEW))], [high.crop((x, y, x + VIEW, y + VIEW)) for x, y in corners]


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
    return _from_array(np.asarray(image)) if image.mode.startswith(("I", "F")) else image


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
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"{array.dtype} values run from {array.min()} to {array.max()}; expected 0 to 65535")
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    # NaN fails this comparison too; resizing in float leaves values a hair outside.
    if not (np.issubdtype(array.dtype, np.floating) and array.min() >= -0.01 and array.max() <= 1.01):
        raise ValueError(f"{array.dtype} values run from {array.min()} to {array.max()}; expected float in 0 to 1")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def _size(image: Image.Image) -> str:
    return f"{image.width}×{image.height}"
