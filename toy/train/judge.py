"""The judge of toy pictures: ``python -m toy.train.judge ALBUM OUT STEPS``.

Two pictures of a character have the same identity (InfoNCE); action, scene and style are classes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from toy.data.pictures import SHOTS, Album, batches, to_floats
from toy.device import DEVICE
from toy.evaluate.judge import Judge, classes_of, halves
from toy.train.learning import learn

TEMPERATURE = 0.1


def train(album: Album, out: Path, steps: int, size: int = 256) -> None:
    torch.manual_seed(0)
    pictures = album.pictures.to(DEVICE, copy=True)
    pictures[:, -1] = halves(pictures[:, -1])[0]  # the left one of two characters is the row's
    classes = classes_of(album).to(DEVICE)
    judge = Judge().to(DEVICE)

    def loss(batch: Tensor) -> Tensor:
        anchor, positive = (torch.randint(low, 2 + SHOTS, batch.shape, device=DEVICE) for low in (0, 1))
        identities, *logits = judge(augment(torch.cat([pictures[batch, anchor], pictures[batch, positive]])))
        similarity = (identities[: len(batch)] @ identities[len(batch) :].T).float() / TEMPERATURE
        labels = torch.arange(len(batch), device=DEVICE)
        contrastive = F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels)
        targets = classes[batch, positive - 1]
        return contrastive + sum(
            F.cross_entropy(scores[len(batch) :].float(), targets[:, i]) for i, scores in enumerate(logits)
        )

    judge = learn("judge", judge, batches(len(pictures), size, steps, 1), steps, loss, rate=1e-3, average=0.99)
    out.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.half().contiguous() for key, tensor in judge.state_dict().items()}
    save_file(weights, out / "judge.safetensors")


def augment(pictures: Tensor) -> Tensor:
    """Random blur and noise, since generated pictures are not as clean as those that code draws."""
    pixels = to_floats(pictures)
    size = int(torch.randint(128, 257, ()))
    small = F.interpolate(pixels, (size, size), mode="area")
    pixels = F.interpolate(small, pixels.shape[-2:], mode="bilinear")
    return pixels + 0.05 * torch.rand(len(pixels), 1, 1, 1, device=pixels.device) * torch.randn_like(pixels)


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
