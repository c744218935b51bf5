"""Draws ``web/docs/images/not_alike.jpg``, what help pages show of likeness, with the toy models.

    python -m assets.draw_likeness

Words and noise are the same in all pictures. It takes a minute of two CPU cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from assets.draw_templates import enlarged, generate, quarters
from instantcharacter import InstantCharacterPipeline
from instantcharacter.cli.demo import toy_pipeline
from toy.evaluate.likeness import alone, busy, cut, head, jumping, small, waving
from toy.world import MONSTER

PATH = Path(__file__).parent.parent / "web/docs/images/not_alike.jpg"
WORDS, SEED = "a picture of a character waving on a beach", 4
SCALES, ENDS = (0.2, 0.6, 0.9, 1.2), (0.3, 0.5, 0.8, 1.0)
QUALITY = 80
CELL, GAP, LINE = 190, 8, 22
"""Pixels of a picture's side, between pictures, and of a title's height."""
Row: TypeAlias = list[tuple[str, Image.Image]]
"""Titles and pictures."""


def main() -> None:
    pipe = toy_pipeline()
    whole = alone(MONSTER)
    references = {
        "whole, large, alone": [whole],
        "small": [small(MONSTER)],
        "the upper half": [head(MONSTER)],
        "busy ground": [busy(MONSTER)],
        "the same, cut out": [cut(MONSTER)],
        "three pictures": [whole, waving(MONSTER), jumping(MONSTER)],
    }
    pairs = [
        [(f"reference: {title}", views[0] if len(views) == 1 else quarters(views)), ("gives", picture(pipe, views))]
        for title, views in references.items()
    ]
    rows = [left + right for left, right in zip(pairs[::2], pairs[1::2])]
    rows.append([(f"scale {scale}", picture(pipe, [whole], subject_scale=scale)) for scale in SCALES])
    rows.append([(f"end_percent {end}", picture(pipe, [whole], subject_end=end)) for end in ENDS])
    sheet(rows).save(PATH, quality=QUALITY, optimize=True)


def picture(pipe: InstantCharacterPipeline, views: list[Image.Image], **settings: float) -> Image.Image:
    """The picture of a character that is made of these reference pictures."""
    adapter, encoder = pipe.character_adapter, pipe.character_encoder
    character = adapter.create_character(*(encoder(view) for view in views))
    return generate(pipe, WORDS, SEED, subject_image=character, **settings)


def sheet(rows: list[Row]) -> Image.Image:
    """Rows of pictures, each under its title."""
    width = max(len(row) for row in rows)
    page = Image.new("RGB", (GAP + width * (CELL + GAP), len(rows) * (LINE + CELL + GAP)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for y, row in enumerate(rows):
        for x, (title, picture) in enumerate(row):
            left, top = GAP + x * (CELL + GAP), y * (LINE + CELL + GAP)
            pen.text((left, top + 3), title, "#222222", font)
            page.paste(enlarged(picture, CELL), (left, top + LINE))
            pen.rectangle((left, top + LINE, left + CELL - 1, top + LINE + CELL - 1), outline="#cccccc")
    return page


if __name__ == "__main__":
    main()
