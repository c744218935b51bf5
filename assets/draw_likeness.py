"""Draws ``web/docs/images/not_alike.jpg``, what help pages show of likeness, with the toy models.

    python -m assets.draw_likeness

Each row changes one thing; words and noise of a row stay. It takes a minute of two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from assets.draw_templates import QUALITY, enlarged, generate
from instantcharacter.cli.demo import toy_pipeline
from toy.evaluate.likeness import alone, busy, cut, head, jumping, small, waving
from toy.world import MONSTER

PATH = Path(__file__).parent.parent / "web/docs/images/not_alike.jpg"
CELL, GAP, LINE = 190, 8, 22
"""Pixels of a picture's side, between pictures, and of a title's height."""
Row = list[tuple[str, Image.Image]]
"""Titles and pictures."""


def main() -> None:
    pipe = toy_pipeline()
    encoder, adapter = pipe.character_encoder, pipe.character_adapter

    def drawn(*views, words: str, seed: int, **settings: float) -> Image.Image:
        character = adapter.create_character(*(encoder(view) for view in views))
        return generate(pipe, words, seed, subject_image=character, **settings)

    sheet(rows(drawn)).save(PATH, quality=QUALITY, optimize=True)


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
