"""The command ``demo``: a sheet of pictures by the toy models, of a character that is not in their training data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..character.encoders import CharacterEncoder
from ..files import catalog
from ..files.atomic import atomic_write
from ..files.pictures import Picture, open_picture
from ..flux.pipeline import InstantCharacterPipeline
from ..model.adapter import CharacterAdapter
from .checks import check_picture_output
from .options import DemoOptions

PROMPTS = (
    "a picture of a character waving on a beach",
    "a comic of a character reading a book in a forest",
    "a watercolour of a character with a balloon in the snow",
    "a picture of a character jumping on the moon",
)
LORA_WORDS = "pixel art of"
SCALES = (0.0, 0.6, 0.9)
SIDE, STEPS, GUIDANCE = 256, 16, 3.5
REAL_COMMAND = (
    "python -m instantcharacter generate --reference assets/character.png "
    '--prompt "the fox flies a paper plane over the sea" --output output/fox.png'
)


def demo(options: DemoOptions) -> None:
    """Generate the demo's sheet and write it as PNG.

    Raises:
        OSError: no toy models, no such reference picture, or the output cannot be written.
        ValueError: the reference is not a picture, or the output's name does not end in .png.
    """
    catalog.toy("flux")  # raises where pip installed the package without the toy models
    check_picture_output(options.output, options.reference)
    page = generate_demo(options.reference)
    with atomic_write(options.output) as partial:
        page.save(partial, format="PNG")
    print(f"wrote {options.output}")
    print(f"With the real weights (FLUX.1-dev, about 47 GB to fetch, a GPU):\n  {REAL_COMMAND}")


def toy_pipeline() -> InstantCharacterPipeline:
    """A pipeline of the toy models with adapter and encoder, on the CPU in float32."""
    pipeline = InstantCharacterPipeline.from_pretrained(catalog.toy("flux"), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(CharacterAdapter.from_file(catalog.toy("adapter"), dtype=torch.float32))
    pipeline.set_character_encoder(CharacterEncoder.from_pretrained(catalog.toy("siglip"), catalog.toy("dinov2")))
    return pipeline


def generate_demo(reference: Picture, seed: int = 0) -> Image.Image:
    """A sheet with the reference and generated pictures: a row for each strength, and one with the style LoRA.

    Args:
        reference: a picture of the character.
        seed: of the first column's noise; each column has its own, the same in all rows.
    """
    picture = ImageOps.pad(open_picture(reference), (SIDE, SIDE), color="white")
    return sheet(picture, list(_rows(toy_pipeline(), picture, seed)))


def _rows(
    pipeline: InstantCharacterPipeline, picture: Image.Image, seed: int
) -> Iterator[tuple[str, list[Image.Image]]]:
    """The title and the pictures of each row."""
    for scale in SCALES:
        yield f"scale {scale}", _pictures(pipeline, picture, PROMPTS, scale, seed)
    lora = catalog.toy("lora")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    prompts = [f"{LORA_WORDS} {prompt.split(' of ', 1)[1]}" for prompt in PROMPTS]
    yield "scale 0.9, LoRA", _pictures(pipeline, picture, prompts, SCALES[-1], seed)


def _pictures(
    pipeline: InstantCharacterPipeline, picture: Image.Image, prompts: Sequence[str], scale: float, seed: int
) -> list[Image.Image]:
    """A picture for each prompt."""
    return pipeline(
        [*prompts],
        subject_image=picture,
        subject_scale=scale,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
    ).images


def sheet(reference: Image.Image, rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """A page with the reference at the left, rows of pictures under their titles, and the prompts below.

    Args:
        reference: a square of :data:`SIDE` pixels.
        rows: a title and a picture for each prompt, of the same size.
    """
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
        position = gap + column * (SIDE + gap), len(rows) * (line + SIDE) + 8
        pen.multiline_text(position, textwrap.fill(prompt, 34), "#666666", font)
    return page
