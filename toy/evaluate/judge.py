"""The judge: a network that recognizes a toy picture's character, action, scene and style.

``toy.train.judge`` trains it. Nothing that it measures was trained with it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from toy.data.pictures import SHOTS, Album, to_floats
from toy.world import ACTIONS, SCENES, STYLES

WIDTHS = (32, 64, 96, 128)
FEATURES = 2 * WIDTHS[-1]
"""Of a picture, pooled."""
IDENTITY = 64


class Judge(nn.Module):
    """A small convolutional network with a head for each question."""

    def __init__(self) -> None:
        super().__init__()
        self.body = new_body()
        self.identity = nn.Linear(FEATURES, IDENTITY)
        self.action = nn.Linear(FEATURES, len(ACTIONS))
        self.scene = nn.Linear(FEATURES, len(SCENES))
        self.style = nn.Linear(FEATURES, len(STYLES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures from -1 to 1, [B, 3, 256, 256] → unit identities, [B, 64]; logits of actions, scenes, styles."""
        pooled = pool(self.body(pictures))
        return F.normalize(self.identity(pooled), dim=-1), self.action(pooled), self.scene(pooled), self.style(pooled)

    @classmethod
    def from_file(cls, path: Path) -> Judge:
        judge = cls()
        judge.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
        return judge.eval().requires_grad_(False)


def new_body() -> nn.Sequential:
    """Pictures, [B, 3, 256, 256] → maps, [B, WIDTHS[-1], 8, 8]."""
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, 4)]
    for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS):
        stride = 1 if before == width else 2
        layers += [_convolution(before, width, stride), Residual(width)]
    return nn.Sequential(*layers)


def pool(maps: Tensor) -> Tensor:
    """Each map's mean and maximum, [B, FEATURES]."""
    return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width, 1), _convolution(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(8, before), nn.GELU(), nn.Conv2d(before, after, 3, stride, 1))


@torch.no_grad()
def check(judge: Judge, album: Album, device: str) -> dict[str, float]:
    """Accuracies on an album of held-out characters: the reference among 16, and the classes."""
    pictures = album.pictures.clone()
    pictures[:, -1] = halves(pictures[:, -1])[0]
    answers = [judge(to_floats(part.to(device))) for part in pictures.flatten(0, 1).split(256)]
    identity, *scores = (torch.cat(part).unflatten(0, (-1, 2 + SHOTS)) for part in zip(*answers))
    classes = classes_of(album).to(device)
    figures = {"identity": retrieved(identity[:, 1], identity[:, 0]).float().mean().item()}
    figures["identity of one of two"] = retrieved(identity[:, -1], identity[:, 0]).float().mean().item()
    for i, name in enumerate(("action", "scene", "style")):
        figures[name] = (scores[i][:, 1:].argmax(dim=-1) == classes[..., i]).float().mean().item()
    return figures


def retrieved(identities: Tensor, references: Tensor, among: int = 16) -> Tensor:
    """Whether each identity's own reference is the most similar of ``among``: its own and the following ones, [B]."""
    count = len(references)
    candidates = (torch.arange(count)[:, None] + torch.arange(among)[None]) % count
    similarity = torch.einsum("bd,bkd->bk", identities, references[candidates.to(references.device)])
    return similarity.argmax(dim=1) == 0


def halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right half of [B, 3, 256, 256] pictures, each in the middle of a black picture."""
    edge = pictures.shape[-1] // 4
    left, right = (F.pad(half, (edge, edge)) for half in pictures.chunk(2, dim=-1))
    return left, right


def classes_of(album: Album) -> Tensor:
    """[characters, SHOTS + 1, 3]: action, scene, style."""
    actions, scenes, styles = [*ACTIONS], [*SCENES], [*STYLES]
    return torch.tensor(
        [
            [(actions.index(s.action), scenes.index(s.scene), styles.index(s.style)) for s in shots]
            for shots in album.shots
        ]
    )
