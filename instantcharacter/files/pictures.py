"""Pictures from files, arrays and tensors, read safely: RGB, a mask, a square."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from .atomic import atomic_write
from .errors import first_line

Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | torch.Tensor"
ResizeMode = Literal["pad", "stretch"]
Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
THUMBNAIL = 256
"""Side of a thumbnail in pixels."""
LARGEST_SIDE = 4096
"""Maximum side of a square in pixels; a larger picture is shrunk, whatever its aspect ratio."""
MAX_SIDE, MAX_PIXELS = 65_535, 64_000_000
"""Limits of a picture that is prepared within 2 s and 500 MB."""
FULL_PIXELS = 25_000_000
"""A picture of more pixels is halved in width and height while it is opened."""
STRIP_PIXELS = 1_000_000
"""Pixels that are converted at a time, so that no second copy of a large picture is made."""
PNG_SETTINGS = "instantcharacter"
"""The text of a PNG that holds its settings."""
OVERSHOOT = 0.5
"""How far outside 0 to 1 a resized float picture may lie; a picture in 0 to 255 lies further."""

BROKEN = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError, EOFError, MemoryError),
    *(NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises for broken files, beside ``OSError``."""


def open_picture(picture: Picture, background: Colour = WHITE) -> Image.Image:
    """A picture as upright 8-bit RGB.

    Args:
        picture: a path; a PIL image of any mode; or an array or tensor of one picture, [H, W], [H, W, C] or
            [C, H, W] with 1, 3 or 4 channels, a leading 1 allowed, of bool, uint8, uint16, or float in [0, 1]. Floats
            at most :data:`OVERSHOOT` outside of that range are clipped: resizing overshoots.
        background: the colour behind transparent pixels.

    Returns:
        RGB, rotated as its EXIF says; half as wide and high if it has more than :data:`FULL_PIXELS`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a picture; one that is cut off, empty, or of a wrong shape or value range; or one above
            :data:`MAX_SIDE` or :data:`MAX_PIXELS`.
    """
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        array = _one_picture(picture)
        height, width = array.shape[:2]
        return _in_strips(width, height, lambda top, end: _to_rgb(_from_array(array[top:end]), background))
    if not isinstance(picture, (str, Path, Image.Image)):
        raise ValueError(f"a {type(picture).__name__} is not a picture; expected a path, PIL image, array or tensor")
    try:
        if isinstance(picture, Image.Image):
            return _from_image(picture, background)
        with Image.open(picture) as file:
            return _from_image(file, background)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        kind = "a picture that can be read" if isinstance(error, UnidentifiedImageError) else "a whole picture"
        raise ValueError(f"{picture} is not {kind}: {first_line(error)}") from error
    except BROKEN as error:
        raise ValueError(f"{picture} is not a picture that can be read: {first_line(error)}") from error


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


def to_square(image: Image.Image, fit: ResizeMode = "pad", largest: int = LARGEST_SIDE) -> Image.Image:
    """A square with the picture's longer side, of at most ``largest`` pixels.

    Args:
        image: RGB.
        fit: ``"pad"`` centres the picture on white; ``"stretch"`` resizes it, which distorts, as the reference
            implementation does.
        largest: the limit of the side.

    Raises:
        ValueError: an unknown ``fit``.
    """
    if (side := max(image.size)) > largest:
        width, height = (max(round(length * largest / side), 1) for length in image.size)
        image, side = image.resize((width, height)), largest
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


def _from_image(image: Image.Image, background: Colour) -> Image.Image:
    """An upright copy of an image as 8-bit RGB."""
    if image.format == "EPS":
        raise ValueError("an EPS is a program, which is not run: convert it to PNG")
    _check_size(*image.size)
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    opened = _in_strips(*image.size, lambda top, end: _to_rgb(image.crop((0, top, image.width, end)), background))
    if isinstance(orientation, int):
        opened.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(opened, in_place=True)
    return opened


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise ValueError(f"the picture is empty: {width}×{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"the picture has {width}×{height} pixels; expected at most {MAX_SIDE} a side and "
            f"{MAX_PIXELS // 10**6} million in all: shrink it"
        )


def _in_strips(width: int, height: int, strip: Callable[[int, int], Image.Image]) -> Image.Image:
    """A picture from its strips.

    Args:
        width: of the picture.
        height: of the picture.
        strip: the RGB picture of the rows from one, up to another.
    """
    _check_size(width, height)
    factor = 2 if width * height > FULL_PIXELS else 1
    rows = max(STRIP_PIXELS // width, 1) * factor
    whole = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    for top in range(0, height, rows):
        part = strip(top, min(top + rows, height))
        whole.paste(part if factor == 1 else part.reduce(factor), (0, top // factor))
    return whole


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """An image of any mode as 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 bits in a file
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"the picture's values run from {values.min()} to {values.max()}; expected 0 to 65535")
        image = _from_array(values.astype(np.uint16))
    elif image.mode.startswith("F"):
        image = _from_array(np.asarray(image))
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def _one_picture(array: np.ndarray | torch.Tensor) -> Any:
    """An array or tensor of one picture as [H, W] or [H, W, C], its data where it was."""
    shape = list(array.shape)
    if isinstance(array, torch.Tensor) and (array.layout != torch.strided or array.is_meta or array.is_quantized):
        raise ValueError(f"a tensor {shape} of {array.dtype} without plain values is not a picture; convert it")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.swapaxes(0, 1).swapaxes(1, 2)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ValueError(f"an array of shape {shape} is not one picture; expected [H, W], [H, W, C] or [C, H, W]")
    return array


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An array or tensor, [H, W] or [H, W, C], as an 8-bit image."""
    if isinstance(array, torch.Tensor):
        if array.is_floating_point() and array.dtype not in (torch.float16, torch.float32, torch.float64):
            array = array.float()  # numpy has no bfloat16
        array = array.detach().cpu().numpy()
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
