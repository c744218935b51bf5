"""Pictures from files, arrays and tensors, read safely: RGB, a mask, a square."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .atomic import atomic_write

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | torch.Tensor"
ResizeMode = Literal["pad", "stretch"]
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
THUMBNAIL = 256
"""Side of a thumbnail in pixels."""
LARGEST = 4096
"""Maximum side of a square in pixels; a larger picture is shrunk, whatever its aspect ratio."""
PNG_SETTINGS = "instantcharacter"
"""The text of a PNG that holds its settings."""
OVERSHOOT = 0.5
"""How far outside 0 to 1 a resized float picture may lie; a picture in 0 to 255 lies further."""


def open_picture(picture: Picture, background: Colour = WHITE) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        picture: a path; a PIL image of any mode; or an array or tensor of one picture, [H, W], [H, W, C] or
            [C, H, W] with 1, 3 or 4 channels, a leading 1 allowed, of bool, uint8, uint16, or float in [0, 1]. Floats
            at most :data:`OVERSHOOT` outside of that range are clipped: resizing overshoots.
        background: the colour behind transparent pixels.

    Returns:
        RGB, rotated as its EXIF says.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a picture, or one that is cut off, empty, or of a wrong shape or value range.
    """
    image = _open(picture)
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def open_mask(mask: Picture) -> Image.Image:
    """A mask as 8-bit grey, white inside; transparent pixels are black.

    Args:
        mask: see :func:`open_picture`.

    Raises:
        ValueError: not a picture, or a uint8 mask of 0 and 1, which would be black.
    """
    alpha = open_picture(mask, BLACK).convert("L")
    if np.asarray(alpha).max() == 1 and str(getattr(mask, "dtype", "")).endswith("uint8"):
        raise ValueError("the mask has values of 0 and 1 in uint8; expected 0 to 255: convert it to bool")
    return alpha


def to_square(image: Image.Image, fit: ResizeMode = "pad") -> Image.Image:
    """A square with the picture's longer side, of at most :data:`LARGEST` pixels.

    Args:
        image: RGB.
        fit: ``"pad"`` centres the picture on white; ``"stretch"`` resizes it, which distorts, as the reference
            implementation does.

    Raises:
        ValueError: an unknown ``fit``.
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


def thumbnail(picture: Picture) -> Image.Image:
    """A picture in a white square of :data:`THUMBNAIL` pixels."""
    return to_square(open_picture(picture)).resize((THUMBNAIL, THUMBNAIL))


def save_png(image: Image.Image, path: Path, prompt: str, settings: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all, that carries its prompt, and its settings as JSON.

    Raises:
        OSError: the disk is full or read-only.
    """
    text = PngInfo()
    text.add_itxt("Description", prompt)
    text.add_itxt(PNG_SETTINGS, json.dumps(settings, ensure_ascii=False))
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=text)


def _open(picture: Picture) -> Image.Image:
    """An upright 8-bit image, with its transparency."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().numpy() if picture.dtype != torch.bfloat16 else picture.float().cpu().numpy()
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if not isinstance(picture, (str, Path, Image.Image)):
        raise ValueError(f"a {type(picture).__name__} is not a picture; expected a path, PIL image, array or tensor")
    try:
        if isinstance(picture, Image.Image):
            return _upright(picture)
        with Image.open(picture) as file:
            return _upright(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise ValueError(f"{picture} is not a picture that can be read: {error}") from error
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        raise ValueError(f"{picture} is not a whole picture: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """A copy of an image, rotated as its EXIF says, with 8 bits a channel."""
    image.load()
    if not min(image.size):
        raise ValueError(f"the picture is empty: {image.width}×{image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits in a file
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
    if not (array.min() >= -OVERSHOOT and array.max() <= 1 + OVERSHOOT):  # false for NaN
        raise ValueError(f"{array.dtype} values run from {array.min()} to {array.max()}; expected float in 0 to 1")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)
