"""Draws the template browser's pictures, ``workflows/NAME.jpg``, with the toy models.

    python -m assets.draw_templates

Each shows what its workflow does, with the toy in place of FLUX.1. It takes two minutes of two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter

from instantcharacter import Character, InstantCharacterImg2ImgPipeline, InstantCharacterPipeline
from instantcharacter.cli.demo import GUIDANCE, SIDE, toy_pipeline
from instantcharacter.files import catalog
from toy.world.shot import Shot, draw_reference
from toy.world.traits import MONSTER, Traits

FOLDER = Path(__file__).parent.parent / "workflows"
CARD = 400
"""Pixels of a picture's side."""
QUALITY = 85
FRIEND = Traits("round", "long", "crown", "wide", "spots", 0.08, 0.85, 0.95, 0.6, 0.6)
"""The second of two characters."""


def main() -> None:
    pipe = toy_pipeline()
    reference = draw_reference(MONSTER)
    monster, friend = (pipe.create_character(draw_reference(traits)) for traits in (MONSTER, FRIEND))

    def picture(words: str, seed: int, count: int = 20) -> Image.Image:
        return generate(pipe, words, seed, subject_image=monster, num_inference_steps=count)

    beach, forest, snow, moon = (
        picture(f"a picture of a character {words}", seed)
        for words, seed in (
            ("waving on a beach", 4),
            ("reading a book in a forest", 3),
            ("with a balloon in the snow", 2),
            ("jumping on the moon", 3),
        )
    )
    save("01_toy_any_machine", from_reference(beach, reference))
    save("02_toy_native_any_machine", from_reference(forest, reference))
    save("04_native", from_reference(picture("a comic of a character reading a book in a forest", 1, 16), reference))
    save("05_self_contained", from_reference(snow, reference))
    save("07_two_characters", enlarged(two_characters(pipe, monster, friend)))
    save("08_background_removal", halves(Shot(MONSTER, "wave", "forest", "flat", 3).draw(), reference))
    save("09_save_character", as_file(reference))
    save("10_load_character", quarters([beach, forest, snow, moon]))
    save(
        "11_turbo_8_steps",
        quarters([picture("a picture of a character waving on a beach", 4, n) for n in (1, 2, 4, 8)]),
    )
    before, after = refined(pipe, monster)
    for name in ("03_toy_refine_any_machine", "06_native_refine"):
        save(name, halves(before, after))
    lora = catalog.toy("lora")
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    save(
        "12_gguf_and_style_lora",
        from_reference(picture("pixel art of a character jumping on the moon", 3, 16), reference),
    )


def generate(pipe: InstantCharacterPipeline, words: str, seed: int, **arguments: object) -> Image.Image:
    """One picture of the toy, :data:`SIDE` pixels a side if the arguments name no other size."""
    settings = {"width": SIDE, "height": SIDE, "num_inference_steps": 20, "guidance_scale": GUIDANCE} | arguments
    return pipe(words, generator=torch.Generator().manual_seed(seed), **settings).images[0]


def two_characters(pipe: InstantCharacterPipeline, left: Character, right: Character) -> Image.Image:
    """Both in one picture, each in its half."""
    masks = [Image.new("L", (SIDE, SIDE)) for _ in range(2)]
    for i, mask in enumerate(masks):
        mask.paste(255, (i * SIDE // 2, 0, (i + 1) * SIDE // 2, SIDE))
    words = "a picture of two characters waving on a beach"
    return generate(pipe, words, 1, subject_image=[left, right], subject_mask=masks)


def refined(pipe: InstantCharacterPipeline, character: Character) -> tuple[Image.Image, Image.Image]:
    """A picture of half the size, enlarged; and the same with its figure generated again, as the workflows do it."""
    words = "a picture of a character waving on a beach"
    small = generate(pipe, words, 16, subject_image=character, width=SIDE // 2, height=SIDE // 2)
    before = small.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    again = InstantCharacterImg2ImgPipeline(**pipe.components)
    again.share_character_adapter(pipe)
    again.set_progress_bar_config(disable=True)
    square = (32, 48, 224, 240)
    figure = generate(
        again, words, 16, image=before.crop(square), strength=0.5, subject_image=character, width=192, height=192
    )
    mask = Image.new("L", before.size)
    mask.paste(255, (48, 64, 208, 224))
    after = before.copy()
    after.paste(figure, square, mask.filter(ImageFilter.GaussianBlur(8)).crop(square))
    return before, after


# Cards


def from_reference(picture: Image.Image, reference: Image.Image) -> Image.Image:
    """The picture, with the reference in a corner."""
    card, small = enlarged(picture), enlarged(reference, 112)
    frame = Image.new("RGB", (120, 120), "white")
    frame.paste(small, (4, 4))
    card.paste(frame, (CARD - 128, CARD - 128))
    return card


def halves(before: Image.Image, after: Image.Image) -> Image.Image:
    """The middles of two pictures side by side."""
    card = Image.new("RGB", (CARD, CARD), "white")
    for i, picture in enumerate((before, after)):
        whole = enlarged(picture)
        card.paste(whole.crop((CARD // 4, 0, CARD // 4 * 3, CARD)), (i * CARD // 2, 0))
    ImageDraw.Draw(card).line([(CARD // 2, 0), (CARD // 2, CARD)], "white", 4)
    return card


def quarters(pictures: list[Image.Image]) -> Image.Image:
    """Four pictures."""
    card, side = Image.new("RGB", (CARD, CARD), "white"), CARD // 2 - 2
    for i, picture in enumerate(pictures):
        card.paste(enlarged(picture, side), (i % 2 * (side + 4), i // 2 * (side + 4)))
    return card


def as_file(reference: Image.Image) -> Image.Image:
    """The reference on a sheet of paper with a folded corner."""
    card = Image.new("RGB", (CARD, CARD), "#31415c")
    pen = ImageDraw.Draw(card)
    pen.polygon([(80, 40), (260, 40), (320, 100), (320, 360), (80, 360)], "white")
    pen.polygon([(260, 40), (260, 100), (320, 100)], "#b9c4d6")
    card.paste(enlarged(reference, 200), (100, 130))
    return card


def enlarged(picture: Image.Image, side: int = CARD) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def save(name: str, card: Image.Image) -> None:
    card.save(FOLDER / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
