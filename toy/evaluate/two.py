"""Two characters in one picture: ``python -m toy.evaluate.two ASSETS``.

Pairs of held-out characters, by the pack's pipeline, one in each half of the picture or both anywhere. The judge sees
each half by itself, and finds the most similar of 16 references: the half's own, the other half's, and 14 more.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from instantcharacter import Character, CharacterAdapter, CharacterFeatures
from toy.device import DEVICE
from toy.evaluate.judge import halves
from toy.evaluate.measure import (
    STEPS,
    HeldOut,
    Toy,
    encode,
    generate_by_pipeline,
    guided,
    pipeline_with,
    right_answers,
    to_tensors,
)
from toy.models import T5_LENGTH
from toy.world import SIDE, Shot, draw_reference, random_shot, random_traits

AMONG = 16
"""References that the judge chooses from."""
LEFT = Image.new("L", (SIDE, SIDE), 0)
LEFT.paste(255, (0, 0, SIDE // 2, SIDE))
RIGHT = LEFT.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
MASKS = (LEFT, RIGHT)


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        subjects: which of the pair takes part, by its index, and where; None for everywhere.
        scale: the strength of each.
        guidance: by the characters, see :func:`~toy.evaluate.measure.guided`.
        two: whether the prompt says that there are two.
    """

    subjects: tuple[tuple[int, Image.Image | None], ...] = ((0, LEFT), (1, RIGHT))
    scale: float = 0.9
    guidance: float = 1.0
    two: bool = True


CASES = {
    "in masks": Case(),
    **{f"in masks, scale {scale}": Case(scale=scale) for scale in (1.0, 1.2, 1.5)},
    **{f"in masks, guidance {guidance}": Case(guidance=guidance) for guidance in (1.5, 2.0)},
    "left alone in its mask": Case(((0, LEFT),)),
    "right alone in its mask": Case(((1, RIGHT),)),
    "the left one in both masks": Case(((0, LEFT), (0, RIGHT))),
    "no masks": Case(((0, None), (1, None))),
    "no masks, scale 0.5": Case(((0, None), (1, None)), 0.5),
    "no masks, the prompt says one": Case(((0, None), (1, None)), two=False),
    "plain": Case(()),
}


@dataclass(frozen=True)
class Pairs:
    """Pairs of held-out characters, each with the next one.

    Attributes:
        shots: the pictures as data, [N].
        features: of the references, [N + 1].
        references: the judge's identities of them, [N + 1, D].
    """

    shots: list[Shot]
    features: CharacterFeatures
    references: Tensor

    @classmethod
    def random(cls, toy: Toy, count: int, seed: str) -> Pairs:
        rng = random.Random(seed)
        traits = [random_traits(rng, held_out=True) for _ in range(count + 1)]
        shots = [replace(random_shot(rng, one), companion=other) for one, other in pairwise(traits)]
        pictures = [draw_reference(one) for one in traits]
        return cls(shots, encode(toy, pictures), toy.judge(to_tensors(pictures))[0])

    def prompts(self, toy: Toy, two: bool) -> HeldOut:
        """The shots with their prompts, which say that there are two characters or not."""
        shots = self.shots if two else [replace(shot, companion=None) for shot in self.shots]
        prompts, pooled, _ = toy.pipeline.encode_prompt(
            [shot.caption() for shot in shots], None, device=DEVICE, max_sequence_length=T5_LENGTH
        )
        return HeldOut(shots, self.features, self.references[:-1], prompts, pooled)


def evaluate(
    assets: Path, adapter: Path, names: list[str], count: int, steps: int, seed: str
) -> Iterator[tuple[str, dict[str, float]]]:
    """Names and figures of pictures by code, and of the named cases; ± is one standard error."""
    toy = Toy.load(assets)
    pairs = Pairs.random(toy, count, seed)
    yield "drawn by code", judged(toy, pairs, to_tensors([shot.draw() for shot in pairs.shots]))
    weights = CharacterAdapter.from_file(adapter).to(DEVICE)
    pipeline = pipeline_with(toy, weights)
    rows = (CharacterFeatures(*(tensor[i : i + 1] for tensor in pairs.features)) for i in range(count + 1))
    characters = [weights.create_character(row) for row in rows]
    prompts = {two: pairs.prompts(toy, two) for two in {CASES[name].two for name in names}}
    for name in names:
        case = CASES[name]
        settings = [_settings(case, pair) for pair in pairwise(characters)]
        with guided(pipeline.transformer, case.guidance):
            pictures = generate_by_pipeline(pipeline, prompts[case.two], settings, steps)
        yield name, judged(toy, pairs, pictures)


def _settings(case: Case, pair: tuple[Character, Character]) -> dict:
    if not case.subjects:
        return {}
    subjects, masks = [pair[i] for i, _ in case.subjects], [mask for _, mask in case.subjects]
    return {"subject_image": subjects, "subject_mask": masks, "subject_scale": case.scale}


@torch.no_grad()
def judged(toy: Toy, pairs: Pairs, pictures: Tensor) -> dict[str, float]:
    """Fractions of pictures.

    ``left`` and ``right`` are halves with their own character, ``left has the right's`` and the reverse with the other
    half's; ``own`` and ``other`` their means. ``both`` are pictures with one character in each half, in any order.
    """
    found = [nearest(toy.judge(half)[0], pairs.references, i) for i, half in enumerate(halves(pictures))]
    left, right = ((each == 0).float() for each in found)
    from_right, from_left = ((each == 1).float() for each in found)
    own, both = (left + right) / 2, left * right + from_right * from_left
    held_out = HeldOut(pairs.shots, pairs.features, pairs.references[:-1], *(torch.empty(0),) * 2)
    answers = right_answers(toy, held_out, pictures)
    return {
        "own": own.mean().item(),
        "± own": own.std().item() / len(own) ** 0.5,
        "other": (from_right + from_left).mean().item() / 2,
        "left": left.mean().item(),
        "right": right.mean().item(),
        "left has the right's": from_right.mean().item(),
        "right has the left's": from_left.mean().item(),
        "both": both.mean().item(),
        "± both": both.std().item() / len(both) ** 0.5,
        **{name: answers[name].mean().item() for name in ("action", "scene", "style")},
    }


def nearest(halves: Tensor, references: Tensor, side: int) -> Tensor:
    """The most similar reference of each half, [N] on the CPU: 0 for its own, 1 for the other half's, above for more.

    Args:
        halves: identities, [N, D].
        references: [N + 1, D]; picture i has characters i and i + 1.
        side: 0 for left halves, 1 for right ones.
    """
    rows = torch.arange(len(halves))[:, None]
    others = rows + torch.arange(2, AMONG)[None]
    candidates = torch.cat([rows + side, rows + 1 - side, others], dim=1) % len(references)
    return torch.einsum("nd,nkd->nk", halves, references[candidates.to(references.device)]).argmax(dim=1).cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--adapter", type=Path, help="ASSETS/adapter.safetensors if not given")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES], metavar="CASE")
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", default="two", help="of the characters and prompts")
    options = parser.parse_args()
    adapter = options.adapter or options.assets / "adapter.safetensors"
    rows = evaluate(options.assets, adapter, options.cases, options.pictures, options.steps, options.seed)
    for name, figures in rows:
        print(json.dumps({"": name, **{key: round(value, 3) for key, value in figures.items()}}), flush=True)
