"""A sheet of the world: ten held-out characters, eight pictures of each."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from .canvas import SIDE
from .captions import LORA_STYLE
from .shot import draw_reference, random_shot
from .traits import random_traits


def write_sheet(path: Path, seed: int = 0) -> None:
    """Write a row for each character: the reference, six random pictures, and one in the LoRA's style."""
    rng = random.Random(seed)
    page = Image.new("RGB", (8 * SIDE, 10 * SIDE))
    for row in range(10):
        traits = random_traits(rng, held_out=True)
        pictures = [draw_reference(traits), *(random_shot(rng, traits).draw() for _ in range(6))]
        pictures.append(random_shot(rng, traits, LORA_STYLE).draw())
        for column, picture in enumerate(pictures):
            page.paste(picture, (column * SIDE, row * SIDE))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
