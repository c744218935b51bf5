"""IMAGE and MASK, ComfyUI's pictures, from PIL's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_image(picture: Image.Image) -> Tensor:
    """A PIL picture as one picture of an IMAGE, [H, W, 3] in [0, 1]."""
    return to_batch([picture])[0]


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures of one size as an IMAGE, [B, H, W, 3] in [0, 1], without a second copy of it."""
    width, height = pictures[0].size
    batch = torch.empty(len(pictures), height, width, 3)
    for image, picture in zip(batch, pictures):
        image.copy_(torch.from_numpy(np.array(picture.convert("RGB"))))
    return batch.div_(255)


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
