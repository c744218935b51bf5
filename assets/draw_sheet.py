"""Draws README's first picture, ``assets/sheet.png``, with the toy models: what the pack does, a cell for each.

    python -m assets.draw_sheet

It takes two minutes of two CPU cores.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from instantcharacter.cli.demo import toy_pipeline
from toy.world.shot import Shot, draw_reference
from toy.world.traits import MONSTER

from .draw_templates import FRIEND, enlarged, generate, refined, two_characters

SHEET = Path(__file__).parent / "sheet.png"
SIDE = 256
"""Pixels of a cell's side."""
GAP, CAPTION = 12, 52
"""Pixels between cells, and of the captions below them."""
SCENES = (
    ("waving on a beach", 4),
    ("reading a book in a forest", 3),
    ("with a balloon in the snow", 2),
    ("jumping on the moon", 3),
)
"""What the character does, and the seed."""

Cell = tuple[Image.Image, str]
"""A picture and its caption."""


def main() -> None:
    pipe = toy_pipeline()
    reference, second = draw_reference(MONSTER), draw_reference(FRIEND)
    monster, friend = pipe.create_character(reference), pipe.create_character(second)

    def picture(words: str, seed: int, scale: float = 0.9) -> Image.Image:
        prompt = f"a picture of a character {words}"
        return generate(pipe, prompt, seed, subject_image=monster, subject_scale=scale)

    scenes: list[Cell] = [(picture(words, seed), f"“a picture of a character {words}”") for words, seed in SCENES]
    strengths = [picture("waving on a beach", 0, scale) for scale in (0.0, 0.9)]
    cut_out = [Shot(MONSTER, "wave", "forest", "flat", 3).draw(), reference]
    abilities: list[Cell] = [
        (two_characters(pipe, monster, friend), "both in one picture, each in its mask"),
        (strips(strengths), "strength 0 and 0.9, the same noise"),
        (strips([*refined(pipe, monster)]), "a small figure, and the same generated again, larger"),
        (strips(cut_out), "a busy picture, and the character cut out"),
    ]
    rows = [[(reference, "reference: one picture"), *scenes], [(second, "another reference"), *abilities]]
    sheet(rows).save(SHEET, optimize=True)


def strips(pictures: list[Image.Image]) -> Image.Image:
    """The middles of some pictures side by side in a cell, with white lines between."""
    cell, width = Image.new("RGB", (SIDE, SIDE), "white"), (SIDE - 4 * (len(pictures) - 1)) // len(pictures)
    for i, picture in enumerate(pictures):
        left = (SIDE - width) // 2
        cell.paste(enlarged(picture, SIDE).crop((left, 0, left + width, SIDE)), (i * (width + 4), 0))
    return cell


def sheet(rows: list[list[Cell]]) -> Image.Image:
    """A page of cells with their captions; an arrow leads from the first row's first cell to the others."""
    size = len(rows[0]) * (SIDE + GAP) + GAP, len(rows) * (SIDE + CAPTION) + GAP
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for row, cells in enumerate(rows):
        for column, (picture, caption) in enumerate(cells):
            x, y = GAP + column * (SIDE + GAP), GAP + row * (SIDE + CAPTION)
            page.paste(enlarged(picture, SIDE), (x, y))
            pen.multiline_text((x, y + SIDE + 6), textwrap.fill(caption, 36), "#444444", font)
    x, y = GAP + SIDE, GAP + SIDE // 2
    pen.line([(x - 34, y), (x - 6, y)], "#222222", 5)
    pen.polygon([(x - 12, y - 11), (x + 8, y), (x - 12, y + 11)], "#222222")
    return page


if __name__ == "__main__":
    main()
