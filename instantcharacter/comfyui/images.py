"""IMAGE and MASK, ComfyUI's pictures: checks of a node's inputs, and conversion from PIL.

ComfyUI passes any JSON that a prompt has in place of a link, so that an input may be a number, a text or a dictionary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def images(value: Any, name: str = "image") -> Tensor:
    """An input as IMAGE, [B, H, W, C] in float32; values outside of 0 to 1 are clipped.

    Args:
        value: the input's value.
        name: the input's name, for the error.

    Raises:
        ValueError: not a tensor, not [B, H, W, C] with 1, 3 or 4 channels, empty, of integers, or with NaN.
    """
    pictures = _tensor(value, name, "an IMAGE, [pictures, height, width, channels]")
    if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3, 4) or not pictures.numel():
        raise ValueError(f"{name} is {list(pictures.shape)}; expected an IMAGE, [pictures, height, width, 3]")
    return pictures.clamp(0, 1)


def masks(value: Any, name: str = "mask") -> Tensor:
    """An input as MASK, [B, H, W] in float32; values outside of 0 to 1 are clipped.

    [H, W] and [B, 1, H, W] are converted. Arguments and errors are those of :func:`images`.
    """
    tensor = _tensor(value, name, "a MASK, [masks, height, width]")
    one_channel = tensor.ndim == 4 and tensor.shape[1] == 1
    if not (tensor.ndim in (2, 3) or one_channel) or not tensor.numel():
        raise ValueError(f"{name} is {list(tensor.shape)}; expected a MASK, [masks, height, width]")
    return tensor.reshape(-1, *tensor.shape[-2:]).clamp(0, 1)


def to_image(picture: Any) -> Tensor:
    """A PIL picture as one picture of an IMAGE, [H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)


def load_image(path: Path) -> tuple[Tensor, Tensor]:
    """A picture from its file as ComfyUI's Load Image gives it.

    Returns:
        IMAGE, [1, H, W, 3], with the colours that transparent pixels have; and MASK, [1, H, W], white where it is
        transparent, or 64×64 zeros for a picture without transparency.
    """
    with Image.open(path) as picture:
        image = to_image(picture)[None]
        if "A" not in picture.getbands():
            return image, torch.zeros(1, 64, 64)
        alpha = np.asarray(picture.getchannel("A")).astype(np.float32) / 255
    return image, 1 - torch.from_numpy(alpha)[None]


def _tensor(value: Any, name: str, expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {expected}: connect a node's output")
    if not (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} is of {value.dtype}; expected {expected} of floats from 0 to 1")
    if (value := value.float()).isnan().any():
        raise ValueError(f"{name} contains NaN: the node before it failed")
    return value
