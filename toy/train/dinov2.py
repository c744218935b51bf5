"""The toy DINOv2: ``python -m toy.train.dinov2 ALBUM OUT STEPS``.

It learns without words, as DINOv2 does (arXiv 2304.07193): from a partly masked crop a student predicts what its own
moving average, the teacher, finds in another crop of the same picture, as a whole and patch by patch.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from instantcharacter.character.encoders import DINOV2_NORM
from instantcharacter.character.image import ENCODER_RESOLUTION
from toy.data.pictures import Album, batches, crop
from toy.device import DEVICE
from toy.models import DINOV2, new_dinov2, save_half
from toy.train.learning import learn

PROTOTYPES = 1024
MASKED = 0.4
"""Fraction of a masked crop's patches; half of the crops are masked."""
SMALLEST = 0.35
"""Smallest crop, in picture sides."""
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05


class EncoderWithHeads(nn.Module):
    """The encoder, a head for the whole crop and one for its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = new_dinov2()
        self.whole, self.patches = _head(), _head()

    def forward(self, crops: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prototypes of [B, 3, H, W] crops, [B, P], and of their patches, [B, N, P]."""
        features = self.encoder(crops, bool_masked_pos=masked).last_hidden_state
        return self.whole(features[:, 0]), self.patches(features[:, 1:])


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 64))
        self.prototypes = nn.utils.parametrizations.weight_norm(nn.Linear(64, PROTOTYPES, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1)
        self.prototypes.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.prototypes(F.normalize(self.mlp(x), dim=-1))


def _head() -> Head:
    return Head(DINOV2.hidden_size)


def train(album: Album, out: Path, steps: int, size: int = 192) -> None:
    torch.manual_seed(0)
    pictures = album.on(DEVICE)
    student = EncoderWithHeads().to(DEVICE)
    teacher = copy.deepcopy(student).requires_grad_(False)
    patch_count = (ENCODER_RESOLUTION // DINOV2.patch_size) ** 2

    def loss(batch: Tensor) -> Tensor:
        crops = torch.cat([augment(pictures[batch]) for _ in range(2)])
        masked = torch.rand(len(crops), patch_count, device=DEVICE) < MASKED
        masked &= torch.rand(len(crops), 1, device=DEVICE) < 0.5
        with torch.no_grad():
            whole, patches = teacher(crops)
            whole = sinkhorn(whole).roll(len(batch), 0)  # of the other crop
            patches = sinkhorn(patches[masked])
        student_whole, student_patches = student(crops, masked)
        return _cross_entropy(student_whole, whole) + _cross_entropy(student_patches[masked], patches)

    @torch.no_grad()
    def update_teacher(step: int) -> None:
        average = get_ema_multi_avg_fn(min(0.996, 0.9 + step / 1000))
        average([*teacher.parameters()], [*student.parameters()], None)

    learn("dinov2", student, batches(len(pictures), size, steps, 1), steps, loss, rate=1e-3, after=update_teacher)
    save_half(teacher.encoder, out / "dinov2")


def augment(pictures: Tensor) -> Tensor:
    """Random crops of random brightness at the encoders' resolution, normalized; hues are kept."""
    shown = crop(pictures, SMALLEST, ENCODER_RESOLUTION)
    light = torch.empty(len(shown), 1, 1, 1, device=DEVICE).uniform_(0.8, 1.15)
    mean, deviation = (torch.tensor(part, device=DEVICE).view(3, 1, 1) for part in DINOV2_NORM)
    return ((shown * light).clamp(0, 1) - mean) / deviation


def sinkhorn(scores: Tensor) -> Tensor:
    """Sinkhorn-Knopp: each row's share of the prototypes, balanced so that all are used equally; [N, P]."""
    shares = ((scores.float() - scores.float().amax()) / TEACHER_TEMPERATURE).exp().T
    for _ in range(3):
        shares = shares / (shares.sum(dim=1, keepdim=True) + 1e-8) / len(shares)
        shares = shares / (shares.sum(dim=0, keepdim=True) + 1e-8) / shares.shape[1]
    return (shares * shares.shape[1]).T


def _cross_entropy(scores: Tensor, shares: Tensor) -> Tensor:
    return -(shares * F.log_softmax(scores.float() / STUDENT_TEMPERATURE, dim=-1)).sum(dim=-1).mean()


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
