"""The commands ``generate`` and ``encode``: pictures and characters of reference pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..character.image import cut_out
from ..files.pictures import open_picture, save_png
from ..model.strength import scale_setting
from .checks import check_character_output, check_generate, check_sources
from .options import EncodeOptions, GenerateOptions
from .processes import joined, started

if TYPE_CHECKING:
    from ..flux.pipeline import InstantCharacterPipeline
    from ..model.character import Character


def generate(options: GenerateOptions) -> None:
    """Generate a picture and write it as PNG with its settings as text.

    Every process of ``--parallel`` runs this, and the main one writes.

    Raises:
        OSError: a file cannot be found, read or written, or the hub cannot be reached.
        ValueError: options that contradict each other, or a file of another kind than expected.
    """
    options = options.with_toy_paths()
    if started() == 1 and not options.parallel:
        _generate(options, random.getrandbits(32), True)
        return
    from ..batch.processes import on_main

    if not options.parallel:
        raise ValueError(f"{started()} processes for one picture: give --parallel context, too")
    with joined(options) as (options, state):
        _generate(options, on_main(partial(random.getrandbits, 32)), state.is_main_process)


def _generate(options: GenerateOptions, random_seed: int, writes: bool) -> None:
    from ..model.character import Character

    check_sources(options)
    pictures, saved = open_references(options), [Character.load(path) for path in options.character]
    check_generate(options)
    from .loading import check_arithmetic, create_characters, load_adapter, load_pipeline

    check_arithmetic(options)
    adapter = load_adapter(options)
    for character in saved:
        character.check_made_by(adapter.fingerprint())
    created = create_characters(adapter, pictures, options) if pictures else []
    if options.save_character and writes:
        created[0].save(options.save_character)
        print(f"wrote {options.save_character}")
    if options.seed is None:
        options = replace(options, seed=random_seed)
    run = _run_grid if options.grid else _run_pipeline
    picture = run(load_pipeline(adapter, options), options, [*created, *saved])
    if not writes:
        return
    _write_picture(picture, options)
    seed = "" if "seed" in dict(options.grid) else f" (seed {options.seed})"
    print(f"wrote {options.output}{seed}")


def encode(options: EncodeOptions) -> None:
    """Write a character file from a picture. Needs the encoders and the adapter, not FLUX.

    Raises:
        OSError: a file cannot be found, read or written, or the hub cannot be reached.
        ValueError: not exactly one reference picture, or a file of another kind than expected.
    """
    if len(options.reference) != 1:
        raise ValueError(f"a character is made of one picture; there are {len(options.reference)} --reference")
    options = options.with_toy_paths()
    check_sources(options)
    pictures = open_references(options)
    check_character_output(options.output)
    from .loading import create_characters, load_adapter

    (character,) = create_characters(load_adapter(options), pictures, options)
    character.save(options.output)
    print(f"wrote {options.output}")


def open_references(options: EncodeOptions) -> list[Image.Image]:
    """The reference pictures, cut out where they have a mask.

    Raises:
        OSError: a picture or mask cannot be found.
        ValueError: a file is not a picture, or the number of masks is neither 0 nor that of the references.
    """
    masks: Sequence[str | None] = options.mask or [None] * len(options.reference)
    if len(masks) != len(options.reference):
        raise ValueError(f"{len(masks)} --mask for {len(options.reference)} --reference: give one each, or none")
    return [
        open_picture(picture) if mask is None else cut_out(picture, mask)
        for picture, mask in zip(options.reference, masks)
    ]


def _run_grid(pipeline: InstantCharacterPipeline, options: GenerateOptions, characters: list[Character]) -> Image.Image:
    """The labelled sheet of all combinations. Each picture is that of its own options, bit for bit."""
    from ..flux.sweep import cross, describe, labelled_page
    from .progress import stage_bar

    axes = dict(options.grid)
    page, corners = labelled_page(axes, options.size)
    with stage_bar("grid", len(corners)) as start:
        for corner, settings in zip(corners, cross(axes)):
            start(describe(settings))
            values: dict[str, Any] = {**settings}
            if "scale" in values:
                values["scale"] = (values["scale"],)  # of all characters
            page.paste(_run_pipeline(pipeline, replace(options, **values), characters), corner)
    return page


def _run_pipeline(
    pipeline: InstantCharacterPipeline, options: GenerateOptions, characters: list[Character]
) -> Image.Image:
    import torch

    assert options.seed is not None
    width, height = options.size
    result = pipeline(
        options.prompt,
        subject_image=characters,
        subject_scale=options.scales(len(characters)),
        width=width,
        height=height,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        cache_threshold=options.cache,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return result.images[0]


def _write_picture(image: Image.Image, options: GenerateOptions) -> None:
    """Write a PNG that carries its settings as JSON, with file names instead of the user's paths."""
    settings: dict[str, Any] = {
        "prompt": options.prompt,
        "scale": [scale_setting(scale) for scale in options.scale],
        "steps": options.steps,
        "guidance": options.guidance,
        "size": "x".join(map(str, options.size)),
        "seed": options.seed,
        "lora": [f"{path.name}:{weight}" for path, weight in options.lora],
        "model": Path(options.model).name,
    }
    factors = {"scale_double": options.scale_double, "scale_single": options.scale_single}
    settings |= {name: values for name, values in factors.items() if set(values) != {1}}
    if grid := dict(options.grid):
        settings = {name: value for name, value in settings.items() if name not in grid} | {"grid": grid}
    if options.cache:
        settings["cache"] = options.cache
    save_png(image, options.output, options.prompt, settings)
