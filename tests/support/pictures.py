"""Small pictures, and how tests compare them."""

from __future__ import annotations

import numpy as np
from PIL import Image

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


def gradient() -> Image.Image:
    """30 wide, 20 high, every pixel another colour."""
    y, x = np.mgrid[:20, :30]
    return Image.fromarray(np.stack([x * 8, y * 12, x + y], axis=-1).astype(np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures agree in mode, size and every pixel."""
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
