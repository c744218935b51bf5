"""What nodes take of IMAGE and MASK: tensors alone, whatever is typed in place of a link."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def images(value: Any, name: str = "image") -> Tensor:
    """An IMAGE, [B, H, W, C] in float32 from 0 to 1; what other nodes left outside of it is clipped.

    Args:
        value: what the input was given.
        name: the input's, for the error.

    Raises:
        ValueError: not a tensor of this rank with 1, 3 or 4 channels, empty, or with NaN in it.
    """
    pictures = _tensor(value, name, "an IMAGE, [pictures, height, width, channels]")
    if pictures.ndim != 4 or pictures.shape[-1] not in (1, 3, 4) or not pictures.numel():
        raise ValueError(f"{name} is {list(pictures.shape)}; expected an IMAGE, [pictures, height, width, 3]")
    return pictures.clamp(0, 1)


def masks(value: Any, name: str = "mask") -> Tensor:
    """A MASK, [B, H, W] in float32 from 0 to 1; one alone, [H, W], and one with a channel, [B, 1, H, W], are taken.

    Args, raises: as :func:`images`.
    """
    found = _tensor(value, name, "a MASK, [masks, height, width]")
    one_channel = found.ndim == 4 and found.shape[1] == 1
    if not (found.ndim in (2, 3) or one_channel) or not found.numel():
        raise ValueError(f"{name} is {list(found.shape)}; expected a MASK, [masks, height, width]")
    return found.reshape(-1, *found.shape[-2:]).clamp(0, 1)


def to_image(picture: Any) -> torch.Tensor:
    """A PIL picture as one of an IMAGE: [H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)


def _tensor(value: Any, name: str, expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; expected {expected}: connect a node's output")
    if not (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} is of {value.dtype}; expected {expected} of floats from 0 to 1")
    if (value := value.float()).isnan().any():
        raise ValueError(f"{name} has NaN in it: the node before it failed")
    return value
