"""What makes a picture more like its character: ``python -m toy.evaluate.likeness ASSETS``.

The same characters, prompts and noise with other settings and with other reference pictures, one picture at a time by
the pack's pipeline, judged as :mod:`toy.evaluate.measure` does.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from instantcharacter import CharacterAdapter, CharacterFeatures
from instantcharacter.character.image import cut_out
from toy.device import DEVICE
from toy.evaluate.measure import (
    HeldOut,
    Toy,
    encode,
    generate_by_pipeline,
    guided,
    pipeline_with,
    random_held_out,
    right_answers,
)
from toy.world import SIDE, Traits
from toy.world.canvas import Canvas, Point
from toy.world.figure import POSES, STANDING, Pose, draw_figure
from toy.world.scenes import DRAW_SCENE
from toy.world.styles import apply_style

STEPS = 10
"""Few, and every fraction of :data:`CASES` is a whole number of them."""
CENTRE, LARGE, SMALL = (0.5, 0.53), 1.35, 0.45
"""Where the figure is in a reference, and how large."""
View: TypeAlias = Callable[[Traits], Image.Image]
"""Draws a reference picture of a character."""


def alone(traits: Traits, pose: Pose = STANDING, size: float = LARGE) -> Image.Image:
    """The whole character on white, as :func:`~toy.world.draw_reference` draws it."""
    return _finished(Canvas(outlined=False), draw_figure(traits, pose, outlined=False, mirrored=False), size, CENTRE)


def busy(traits: Traits) -> Image.Image:
    """The same before one of the world's scenes."""
    canvas, rng = Canvas(outlined=False), random.Random(repr(traits))
    DRAW_SCENE[rng.choice([*DRAW_SCENE])](canvas, rng)
    return _finished(canvas, draw_figure(traits, STANDING, outlined=False, mirrored=False), LARGE, CENTRE)


def cut(traits: Traits) -> Image.Image:
    """The same, cut out by its mask, as Prepare Character Reference does it."""
    white = Image.new("RGBA", (SIDE * 2, SIDE * 2), "white")
    figure = draw_figure(traits, STANDING, outlined=False, mirrored=False)
    white.putalpha(figure.getchannel("A"))
    black = Canvas(outlined=False)
    black.image.paste("black", (0, 0, black.side, black.side))
    return cut_out(busy(traits), _finished(black, white, LARGE, CENTRE).convert("L"))


def small(traits: Traits) -> Image.Image:
    """The whole character on white, a third as large."""
    return alone(traits, size=SMALL)


def head(traits: Traits) -> Image.Image:
    """The upper half of the character, as large as a square holds it."""
    side = SIDE * 9 // 16
    left = (SIDE - side) // 2
    return alone(traits).crop((left, 0, left + side, side))


def waving(traits: Traits) -> Image.Image:
    return alone(traits, POSES["wave"])


def jumping(traits: Traits) -> Image.Image:
    return alone(traits, POSES["jump"])


@dataclass(frozen=True)
class Case:
    """A row: reference pictures and settings.

    Attributes:
        views: the reference pictures of each character.
        scale: the character's strength.
        end: the character acts up to this fraction of the steps.
        guidance: by the character, see :func:`~toy.evaluate.measure.guided`.
    """

    views: tuple[View, ...] = (alone,)
    scale: float = 0.9
    end: float = 1.0
    guidance: float = 1.0


BASE = "scale 0.9"
CASES = {
    BASE: Case(),
    **{f"scale {scale}": Case(scale=scale) for scale in (0.6, 0.8, 1.0, 1.2, 1.5)},
    **{f"end {end}": Case(end=end) for end in (0.5, 0.7, 0.8)},
    **{f"guidance {guidance}": Case(guidance=guidance) for guidance in (1.25, 1.5, 2.0)},
    "busy ground": Case((busy,)),
    "the same, cut out": Case((cut,)),
    "small on white": Case((small,)),
    "upper half alone": Case((head,)),
    "standing, waving, jumping": Case((alone, waving, jumping)),
}
"""The rows by name; each differs from the first in one thing."""


def evaluate(assets: Path, names: list[str], count: int, steps: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of the first case and of the named ones.

    ``similarity`` is the judge's, of the picture to the reference alone on white, at most 1. ``± …`` is the standard
    error of the difference from the first row, picture by picture.
    """
    toy = Toy.load(assets)
    test = random_held_out(toy, count)
    adapter = CharacterAdapter.from_file(assets / "adapter.safetensors").to(DEVICE)
    pipeline = pipeline_with(toy, adapter)
    features: dict[View, CharacterFeatures] = {alone: test.features}
    expected: dict[str, Tensor] = {}
    for name in [BASE, *(name for name in names if name != BASE)]:
        case = CASES[name]
        for view in case.views:
            if view not in features:
                features[view] = encode(toy, [view(shot.traits) for shot in test.shots])
        rows = [[_row(features[view], i) for view in case.views] for i in range(count)]
        characters = [adapter.create_character(*views) for views in rows]
        settings = [
            {"subject_image": character, "subject_scale": case.scale, "subject_end": case.end}
            for character in characters
        ]
        with guided(pipeline.transformer, case.guidance):
            judged = _judge(toy, test, generate_by_pipeline(pipeline, test, settings, steps))
        expected = expected or judged
        figures = {}
        for question, answers in judged.items():
            figures[question] = answers.mean().item()
            figures[f"± {question}"] = (answers - expected[question]).std().item() / count**0.5
        yield name, figures


@torch.no_grad()
def _judge(toy: Toy, test: HeldOut, pictures: Tensor) -> dict[str, Tensor]:
    similarity = (toy.judge(pictures)[0] * test.references).sum(dim=-1)
    return {"similarity": similarity.cpu(), **right_answers(toy, test, pictures)}


def _row(features: CharacterFeatures, i: int) -> CharacterFeatures:
    return CharacterFeatures(*(tensor[i : i + 1] for tensor in features))


def _finished(canvas: Canvas, figure: Image.Image, size: float, centre: Point) -> Image.Image:
    canvas.paste(figure, size, centre)
    return apply_style(canvas.image, "flat")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    for name, figures in evaluate(options.assets, options.cases, options.pictures, options.steps):
        print(json.dumps({"": name, **{key: round(value, 4) for key, value in figures.items()}}), flush=True)
