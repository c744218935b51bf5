"""Decodes a sample's pictures into what the frozen models take."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...character.encoders import image_to_crops
from ...character.image import open_picture
from .samples import BadSample, Encoded


def target_pixels(picture: Encoded, resolution: int) -> Tensor:
    """The middle square of a picture for the VAE, [3, R, R] from -1 to 1.

    Raises:
        BadSample: the file is not a picture, or is cut off.
    """
    square = ImageOps.fit(_decode(picture), (resolution, resolution))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(*square.size, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def reference_crops(picture: Encoded) -> Tensor:
    """A reference for the vision encoders, see :func:`~instantcharacter.character.encoders.image_to_crops`.

    Raises:
        BadSample: the file is not a picture, or is cut off.
    """
    return image_to_crops(_decode(picture))


def white_picture() -> bytes:
    """A PNG file without a character in it: the reference of the unconditional case."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "PNG")
    return file.getvalue()


def _decode(picture: Encoded) -> Image.Image:
    """A picture as RGB, decoded from memory, so that no file stays open."""
    data = picture.read_bytes() if isinstance(picture, Path) else picture
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return open_picture(image)
    except UnidentifiedImageError as error:
        raise BadSample("not a picture that can be read") from error
    except (OSError, Image.DecompressionBombError, SyntaxError, EOFError, RuntimeError) as error:
        raise BadSample(f"not a whole picture: {error}") from error
