"""The judge by traits: a network that names each trait of a toy picture's character by itself, and the picture's style.

``toy.train.trait_judge`` trains it on pictures of its own, that nothing else learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from toy.evaluate.judge import FEATURES, new_body, pool
from toy.world import LORA_STYLE, STYLES, Shot
from toy.world.traits import EARS, EYES, HATS, HUES, PATTERNS, SHAPES

DISCRETE: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "ears": EARS,
    "hat": HATS,
    "eyes": EYES,
    "pattern": PATTERNS,
    "style": (*STYLES, LORA_STYLE),
}
"""The values of each trait that is one of several, and of the style."""
COLOURS = ("body colour", "second colour", "hat colour")
"""Hues, on a circle from 0 to 1."""
SIZES = ("paleness", "width")
"""From 0 to 1."""
TRAITS = tuple(name for name in (*DISCRETE, *COLOURS, *SIZES) if name != "style")
NEAR = {**dict.fromkeys(COLOURS, 0.5 / len(HUES)), **dict.fromkeys(SIZES, 0.125)}
"""The largest error of a right answer: half a hue's word, an eighth of the sizes."""
COLOURED_HATS = ("cap", "top hat", "party hat")

Answers = dict[str, Tensor]
"""For each question, [N]: the value's index or a number; in labels NaN where the picture does not show it."""


class TraitJudge(nn.Module):
    """The judge's network, with a head for each question: logits of a value, or a point whose angle is the number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = new_body()
        self.norm = nn.LayerNorm(FEATURES)
        sizes = {name: len(values) for name, values in DISCRETE.items()} | dict.fromkeys((*COLOURS, *SIZES), 2)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, size) for name, size in sizes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures from -1 to 1, [B, 3, 256, 256] → the outputs of each head."""
        pooled = self.norm(pool(self.body(pictures)))
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Answers:
        """The most likely answers, on the CPU."""
        outputs = [self(part) for part in pictures.split(125)]
        joined = {name: torch.cat([part[name] for part in outputs]).float().cpu() for name in self.heads}
        return {
            name: output.argmax(dim=1).float() if name in DISCRETE else to_numbers(name, output)
            for name, output in joined.items()
        }

    @classmethod
    def from_file(cls, path: Path) -> TraitJudge:
        judge = cls()
        judge.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
        return judge.eval().requires_grad_(False)


def labels_of(shots: Sequence[Shot]) -> Answers:
    """What the pictures show of their first character."""
    rows = [_label(shot) for shot in shots]
    return {name: torch.tensor([row[name] for row in rows]) for name in (*DISCRETE, *COLOURS, *SIZES)}


def right_traits(answers: Answers, labels: Answers) -> Answers:
    """Whether each answer is right: 0 or 1, NaN where the picture does not show it."""
    right = {}
    for name, label in labels.items():
        error = (answers[name] - label).abs()
        if name in COLOURS:
            error = torch.minimum(error, 1 - error)
        right[name] = (error <= NEAR.get(name, 0)).float().where(label.isfinite(), torch.nan)
    return right


def rarest_value(right: Answers, labels: Answers) -> tuple[str, float]:
    """The trait's value that is answered rightly least often, and how often."""
    shares = {
        f"{name}: {value}": right[name][labels[name] == i].mean().item()
        for name, values in DISCRETE.items()
        for i, value in enumerate(values)
        if name != "style" and (labels[name] == i).any()
    }
    return min(shares.items(), key=lambda item: item[1])


def to_points(name: str, numbers: Tensor) -> Tensor:
    """Numbers as points of the unit circle, [N, 2]; a size takes half of the circle, so that its ends are far apart."""
    angles = numbers * (math.tau if name in COLOURS else math.pi)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def to_numbers(name: str, points: Tensor) -> Tensor:
    """The numbers of points, whatever their distance from the centre."""
    angles = torch.atan2(points[:, 1], points[:, 0])
    return angles / math.tau % 1 if name in COLOURS else angles / math.pi


def _label(shot: Shot) -> dict[str, float]:
    traits = shot.traits
    values = {name: getattr(shot if name == "style" else traits, name) for name in DISCRETE}
    label = {name: float(DISCRETE[name].index(value)) for name, value in values.items()}
    label |= {"body colour": traits.hue, "paleness": traits.paleness, "width": traits.width}
    label["second colour"] = (
        (traits.hue + 0.25 + 0.5 * traits.second_hue) % 1 if traits.pattern != "plain" else math.nan
    )
    label["hat colour"] = traits.hat_hue if traits.hat in COLOURED_HATS else math.nan
    if shot.action == "sleep":
        label["eyes"] = math.nan
    return label
