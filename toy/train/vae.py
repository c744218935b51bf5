"""The toy VAE: ``python -m toy.train.vae ALBUM OUT``. Absolute error, edges, and a little of KL.

In every fourth step the latent is reduced to half its side before decoding, and so is the target: what FLUX learns at
half the resolution then holds at the full one, and latents are easier to model (EQ-VAE, arXiv 2502.09509).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toy.data.pictures import Album, batches, to_floats
from toy.device import DEVICE
from toy.models import new_vae, save_half
from toy.train.learning import learn
from toy.world import SIDE

KL = 1e-6
"""Weight of a crop's whole KL against the mean absolute error of its pixels. 2e-5 left 3 of 16 channels in use, and
eyes without pupils."""
CROP = 128
RATE = 1.5e-3
"""AdamW's; Muon's is 6e-3. In 300 small steps the loss fell to 0.22, with AdamW alone to 0.30."""


def train(album: Album, out: Path, steps: int, size: int = 64) -> None:
    torch.manual_seed(0)
    pictures = album.pictures.flatten(0, 1).to(DEVICE)
    vae = new_vae().to(DEVICE, memory_format=torch.channels_last)

    def prepare(step: int, batch: Tensor) -> tuple[Tensor, ...]:
        """Crops, and the targets of their latents."""
        x, y = torch.randint(0, SIDE - CROP + 1, (2,)).tolist()
        crops = to_floats(pictures[batch, :, y : y + CROP, x : x + CROP]).contiguous(memory_format=torch.channels_last)
        return crops, F.avg_pool2d(crops, 2) if step % 4 == 0 else crops

    def loss(crops: Tensor, targets: Tensor) -> Tensor:
        latent = vae.encode(crops).latent_dist
        sample = latent.sample()
        if targets.shape != crops.shape:
            sample = F.avg_pool2d(sample, 2)
        decoded = vae.decode(sample).sample
        return F.l1_loss(decoded, targets) + 0.5 * _edges(decoded, targets) + KL * latent.kl().mean()

    ends = ("conv_in", "conv_out")
    hidden = [p for name, p in vae.named_parameters() if p.ndim > 1 and not any(end in name for end in ends)]
    indices = batches(len(pictures), size, steps, 1)
    average = learn("vae", vae, indices, steps, loss, RATE, average=0.998, decay=0.0, hidden=hidden, prepare=prepare)
    _scale_latents(average, pictures[:2048])
    print("vae: absolute error of held-out crops", _error(average, pictures[-512:]))
    save_half(average, out / "vae")


def _edges(decoded: Tensor, targets: Tensor) -> Tensor:
    return sum(F.l1_loss(decoded.diff(dim=d), targets.diff(dim=d)) for d in (2, 3))


@torch.no_grad()
def _scale_latents(vae, pictures: Tensor) -> None:
    """Set the shift and scale that give latents mean 0 and deviation 1."""
    latents = torch.cat([vae.encode(to_floats(part)).latent_dist.mean for part in pictures.split(64)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def _error(vae, pictures: Tensor) -> float:
    errors = [F.l1_loss(vae(part).sample, part).item() for part in map(to_floats, pictures.split(64))]
    return sum(errors) / len(errors)


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
