"""Pictures in ComfyUI's input folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image
from support.server import PACK


def write_pictures(folder: Path) -> None:
    """Write the shipped workflows' pictures, a photograph without alpha, and the photograph with a painted mask."""
    if (folder / "painted.png").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("character.png", "owl.png", "monster.png"):
        shutil.copy(PACK / "assets" / name, folder / name)
    figure = Image.open(PACK / "assets/character.png")
    figure = figure.resize((figure.width * 3 // 2, figure.height * 3 // 2))
    photograph = Image.radial_gradient("L").resize((1536, 2048)).convert("RGB")
    photograph.paste(figure, (288, 600), figure)
    photograph.save(folder / "photograph.jpg", quality=90)
    alpha = Image.new("L", photograph.size, 255)
    alpha.paste(0, (288, 600, 288 + figure.width, 600 + figure.height))  # ComfyUI's mask editor erases alpha
    photograph.putalpha(alpha)
    photograph.save(folder / "painted.png", compress_level=1)
