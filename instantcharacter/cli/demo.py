"""The pack at work on the toy models: a character that they never saw, in four scenes, at three strengths."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..character.encoders import CharacterEncoder
from ..character.image import Picture, open_picture
from ..files import catalog as models
from ..flux.pipeline import InstantCharacterPipeline
from ..model.adapter import CharacterAdapter

PROMPTS = (
    "a picture of a character waving on a beach",
    "a comic of a character reading a book in a forest",
    "a watercolour of a character with a balloon in the snow",
    "a picture of a character jumping on the moon",
)
LORA_WORDS = "pixel art of"
SCALES = (0.0, 0.6, 0.9)
SIDE, STEPS, GUIDANCE = 256, 16, 3.5


def toy_pipeline() -> InstantCharacterPipeline:
    """The toy models, adapter and encoder set, on the CPU in float32."""
    pipeline = InstantCharacterPipeline.from_pretrained(models.toy("flux"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(CharacterAdapter.from_file(models.toy("adapter"), dtype=torch.float32))
    pipeline.set_character_encoder(CharacterEncoder.from_pretrained(models.toy("siglip"), models.toy("dinov2")))
    return pipeline


def draw_demo(reference: Picture, seed: int = 0) -> Image.Image:
    """A sheet of the reference and what is drawn of it: a row for each strength, and one with the style LoRA."""
    picture = ImageOps.pad(open_picture(reference), (SIDE, SIDE), color="white")
    return sheet(picture, list(_rows(toy_pipeline(), picture, seed)))


def _rows(pipeline: InstantCharacterPipeline, picture: Image.Image, seed: int) -> Iterator[tuple[str, list]]:
    """Each row's title and pictures; the noise of a column is the same in all."""

    def drawn(prompts: list[str], scale: float) -> list[Image.Image]:
        return pipeline(
            prompts,
            subject_image=picture,
            subject_scale=scale,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
        ).images

    for scale in SCALES:
        yield f"scale {scale}", drawn([*PROMPTS], scale)
    lora = models.toy("lora")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    yield "scale 0.9, LoRA", drawn([f"{LORA_WORDS} {prompt.split(' of ', 1)[1]}" for prompt in PROMPTS], SCALES[-1])


def sheet(reference: Image.Image, rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """The reference at the left, rows of pictures under their titles, the prompts below."""
    gap, line = 12, 26
    columns = 1 + len(PROMPTS)
    page = Image.new("RGB", (gap + columns * (SIDE + gap), len(rows) * (line + SIDE) + 3 * line), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    pen.text((gap, 6), "reference", "#222222", font)
    page.paste(reference, (gap, line))
    for row, (title, pictures) in enumerate(rows):
        y = row * (line + SIDE)
        pen.text((2 * gap + SIDE, y + 6), title, "#222222", font)
        for column, picture in enumerate(pictures, 1):
            page.paste(picture, (gap + column * (SIDE + gap), y + line))
    for column, prompt in enumerate(PROMPTS, 1):
        place = gap + column * (SIDE + gap), len(rows) * (line + SIDE) + 8
        pen.multiline_text(place, textwrap.fill(prompt, 34), "#666666", font)
    return page
