"""The judge by traits: ``python -m toy.train.trait_judge ALBUM OUT STEPS``, on an album that nothing else learned from.

``python -m toy.data.pictures ALBUM --seed 7`` draws one. An eighth of the pictures become pixel art.
``--body ASSETS/judge.safetensors`` begins with the judge's network, where a CPU has time for few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from toy.data.pictures import SHOTS, Album, batches, to_floats
from toy.device import DEVICE
from toy.evaluate.judge import Judge
from toy.evaluate.trait_judge import DISCRETE, Answers, TraitJudge, labels_of, right_traits, to_points
from toy.train.judge import augment
from toy.train.learning import learn
from toy.world import LORA_STYLE, Shot
from toy.world.styles import PIXEL

PIXEL_ART = 0.125
"""Fraction of the pictures that become pixel art."""


def train(album: Album, out: Path, steps: int, size: int = 64, body: Path | None = None) -> None:
    """Train on ``size`` pictures a step; ``body`` is a judge whose network this one begins with."""
    torch.manual_seed(0)
    pictures, labels = album.on(DEVICE), {name: label.to(DEVICE) for name, label in labels_of(shots_of(album)).items()}
    judge = TraitJudge().to(DEVICE)
    if body:
        judge.body.load_state_dict(Judge.from_file(body).body.state_dict())

    def loss(batch: Tensor) -> Tensor:
        pixelated = torch.rand(len(batch), device=DEVICE) < PIXEL_ART
        shown = pictures[batch].where(~pixelated[:, None, None, None], to_pixel_art(pictures[batch]))
        wanted = {name: label[batch] for name, label in labels.items()}
        wanted["style"] = wanted["style"].masked_fill(pixelated, DISCRETE["style"].index(LORA_STYLE))
        return loss_of(judge(_mirrored(augment(shown))), wanted)

    indices = batches(len(pictures), size, steps, 1)
    hidden = [parameter for parameter in judge.body.parameters() if parameter.ndim > 1]
    judge = learn("trait judge", judge, indices, steps, loss, rate=1.5e-3, average=0.99, hidden=hidden)
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.half().contiguous() for key, tensor in judge.state_dict().items()}
    save_file(weights, out / "trait_judge.safetensors")


def loss_of(outputs: dict[str, Tensor], wanted: Answers) -> Tensor:
    """The sum over the questions; a picture that does not show the answer counts for none."""
    total = torch.zeros((), device=DEVICE)
    for name, label in wanted.items():
        output = outputs[name].float()
        if name in DISCRETE:
            total = total + F.cross_entropy(output, label.nan_to_num(-100).long(), ignore_index=-100)
        else:
            error = (output - to_points(name, label.nan_to_num(0))).square().sum(dim=1)
            total = total + 2 * (error * label.isfinite()).mean()
    return total


def to_pixel_art(pictures: Tensor) -> Tensor:
    """uint8 pictures in the LoRA's style."""
    small = F.avg_pool2d(pictures.float(), PIXEL)
    return F.interpolate(small, scale_factor=PIXEL, mode="nearest").round().to(pictures.dtype)


@torch.no_grad()
def check(judge: TraitJudge, album: Album) -> dict[str, float]:
    """Accuracies on an album."""
    answers = judge.read(to_floats(album.on(DEVICE)))
    return {name: right.nanmean().item() for name, right in right_traits(answers, labels_of(shots_of(album))).items()}


def shots_of(album: Album) -> list[Shot]:
    """Those of ``Album.on``; a reference is flat."""
    return [
        shot
        for traits, shots in zip(album.characters, album.shots)
        for shot in (Shot(traits, "", "", "flat", 0), *shots[:SHOTS])
    ]


def _mirrored(pictures: Tensor) -> Tensor:
    """Half of the pictures, mirrored."""
    chosen = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) < 0.5
    return torch.where(chosen, pictures.flip(-1), pictures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("album", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--size", type=int, default=64, help="pictures in a step")
    parser.add_argument("--body", type=Path, help="the judge whose network this one begins with")
    options = parser.parse_args()
    train(Album(options.album), options.out, options.steps, options.size, options.body)
