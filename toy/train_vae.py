"""The toy VAE: ``python -m toy.train_vae ALBUM OUT``. Absolute error, edges, and a little of KL.

Every fourth time a latent is made smaller first, and is to be the picture made smaller: what FLUX learns at half the
side is then true at the whole one, and latents are easier to learn (EQ-VAE, arXiv 2502.09509).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toy.learning import DEVICE, learn
from toy.models import new_vae, save_half
from toy.pictures import Album, batches, to_floats
from toy.world import SIDE

KL = 1e-6
"""Of all of a crop's latent together, against the mean absolute error of its pixels: 2e-5 was measured to leave 3 of 16
channels in use, and eyes without pupils."""
CROP = 128
RATE = 1.5e-3
"""Of AdamW, and 6e-3 of Muon: in 300 small steps it went to 0.22, where AdamW alone ended at 0.30."""


def train(album: Album, out: Path, steps: int, size: int = 64) -> None:
    torch.manual_seed(0)
    pictures = album.pictures.flatten(0, 1).to(DEVICE)
    vae = new_vae().to(DEVICE, memory_format=torch.channels_last)

    def given(step: int, batch: Tensor) -> tuple[Tensor, ...]:
        """Crops, and what is to be drawn of their latents."""
        x, y = torch.randint(0, SIDE - CROP + 1, (2,)).tolist()
        shown = to_floats(pictures[batch, :, y : y + CROP, x : x + CROP]).contiguous(memory_format=torch.channels_last)
        return shown, F.avg_pool2d(shown, 2) if step % 4 == 0 else shown

    def loss(shown: Tensor, wanted: Tensor) -> Tensor:
        latent = vae.encode(shown).latent_dist
        sample = latent.sample()
        if wanted.shape != shown.shape:
            sample = F.avg_pool2d(sample, 2)
        drawn = vae.decode(sample).sample
        return F.l1_loss(drawn, wanted) + 0.5 * _edges(drawn, wanted) + KL * latent.kl().mean()

    ends = ("conv_in", "conv_out")
    hidden = [p for name, p in vae.named_parameters() if p.ndim > 1 and not any(end in name for end in ends)]
    drawn = batches(len(pictures), size, steps, 1)
    average = learn("vae", vae, drawn, steps, loss, RATE, average=0.998, decay=0.0, hidden=hidden, given=given)
    _scale_latents(average, pictures[:2048])
    print("vae: absolute error of held-out crops", _error(average, pictures[-512:]))
    save_half(average, out / "vae")


def _edges(drawn: Tensor, shown: Tensor) -> Tensor:
    return sum(F.l1_loss(drawn.diff(dim=d), shown.diff(dim=d)) for d in (2, 3))


@torch.no_grad()
def _scale_latents(vae, pictures: Tensor) -> None:
    """Have the pipeline shift and scale latents to mean 0 and deviation 1."""
    latents = torch.cat([vae.encode(to_floats(part)).latent_dist.mean for part in pictures.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def _error(vae, pictures: Tensor) -> float:
    errors = [F.l1_loss(vae(part).sample, part).item() for part in map(to_floats, pictures.split(64))]
    return sum(errors) / len(errors)


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
