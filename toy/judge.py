"""Who is in a toy picture, doing what, where: a network that no adapter ever saw.

``python -m toy.judge ALBUM OUT STEPS`` trains it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toy.pictures import SHOTS, Album, batches, to_floats
from toy.world import ACTIONS, SCENES, STYLES

WIDTHS = (32, 64, 96, 128)
IDENTITY = 64
WARMTH = 0.1


class Judge(nn.Module):
    """A small convolutional network with a head for each question."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, 4)]
        for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS):
            stride = 1 if before == width else 2
            layers += [_convolution(before, width, stride), Residual(width)]
        self.body = nn.Sequential(*layers)
        self.identity = nn.Linear(2 * WIDTHS[-1], IDENTITY)
        self.action = nn.Linear(2 * WIDTHS[-1], len(ACTIONS))
        self.scene = nn.Linear(2 * WIDTHS[-1], len(SCENES))
        self.style = nn.Linear(2 * WIDTHS[-1], len(STYLES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures from -1 to 1, [B, 3, 256, 256] → identities of length 1, and scores of actions, scenes, styles."""
        seen = self.body(pictures)
        seen = torch.cat([seen.mean(dim=(2, 3)), seen.amax(dim=(2, 3))], dim=1)
        return F.normalize(self.identity(seen), dim=-1), self.action(seen), self.scene(seen), self.style(seen)

    @classmethod
    def from_file(cls, path: Path) -> Judge:
        judge = cls()
        judge.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
        return judge.eval().requires_grad_(False)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width, 1), _convolution(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(8, before), nn.GELU(), nn.Conv2d(before, after, 3, stride, 1))


def train(album: Album, out: Path, steps: int, size: int = 256) -> None:
    """The same look in two pictures has the same identity (InfoNCE); the rest are classes."""
    from toy.learning import DEVICE, learn

    torch.manual_seed(0)
    pictures = album.pictures.to(DEVICE, copy=True)
    pictures[:, -1] = halves(pictures[:, -1])[0]  # of two characters, the one on the left is the row's
    classes = _classes(album).to(DEVICE)
    judge = Judge().to(DEVICE)

    def loss(batch: Tensor) -> Tensor:
        one, other = (torch.randint(low, 2 + SHOTS, batch.shape, device=DEVICE) for low in (0, 1))
        identity, *scores = judge(_disturbed(torch.cat([pictures[batch, one], pictures[batch, other]])))
        alike = (identity[: len(batch)] @ identity[len(batch) :].T).float() / WARMTH
        who = torch.arange(len(batch), device=DEVICE)
        same = F.cross_entropy(alike, who) + F.cross_entropy(alike.T, who)
        right = classes[batch, other - 1]
        return same + sum(F.cross_entropy(s[len(batch) :].float(), right[:, i]) for i, s in enumerate(scores))

    judge = learn("judge", judge, batches(len(pictures), size, steps, 1), steps, loss, rate=1e-3, average=0.99)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.half().contiguous() for key, tensor in judge.state_dict().items()}, out / "judge.safetensors"
    )


@torch.no_grad()
def check(judge: Judge, album: Album, device: str) -> dict[str, float]:
    """On an album of characters that it never saw: retrieval among 16 by the reference, and classes."""
    pictures = album.pictures.clone()
    pictures[:, -1] = halves(pictures[:, -1])[0]
    answers = [judge(to_floats(part.to(device))) for part in pictures.flatten(0, 1).split(256)]
    identity, *scores = (torch.cat(part).unflatten(0, (-1, 2 + SHOTS)) for part in zip(*answers))
    classes = _classes(album).to(device)
    figures = {"identity": retrieved(identity[:, 1], identity[:, 0]).float().mean().item()}
    figures["identity of one of two"] = retrieved(identity[:, -1], identity[:, 0]).float().mean().item()
    for i, name in enumerate(("action", "scene", "style")):
        figures[name] = (scores[i][:, 1:].argmax(dim=-1) == classes[..., i]).float().mean().item()
    return figures


def retrieved(drawn: Tensor, references: Tensor, among: int = 16) -> Tensor:
    """Whether each drawing's reference is the likest of ``among``: its own and those that follow it. [B] of bool."""
    count = len(references)
    others = (torch.arange(count)[:, None] + torch.arange(among)[None]) % count
    alike = torch.einsum("bd,bkd->bk", drawn, references[others.to(references.device)])
    return alike.argmax(dim=1) == 0


def halves(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The left and the right half of [B, 3, 256, 256] pictures, each in the middle of a black one."""
    edge = pictures.shape[-1] // 4
    left, right = (F.pad(half, (edge, edge)) for half in pictures.chunk(2, dim=-1))
    return left, right


def _classes(album: Album) -> Tensor:
    """[looks, SHOTS + 1, 3]: action, scene, style."""
    actions, scenes, styles = [*ACTIONS], [*SCENES], [*STYLES]
    return torch.tensor(
        [
            [(actions.index(s.action), scenes.index(s.scene), styles.index(s.style)) for s in shots]
            for shots in album.shots
        ]
    )


def _disturbed(pictures: Tensor) -> Tensor:
    """Blurred a little at random, with noise: what a network draws is not as clean as what code draws."""
    shown = to_floats(pictures)
    size = int(torch.randint(128, 257, ()))
    small = F.interpolate(shown, (size, size), mode="area")
    shown = F.interpolate(small, shown.shape[-2:], mode="bilinear")
    return shown + 0.05 * torch.rand(len(shown), 1, 1, 1, device=shown.device) * torch.randn_like(shown)


if __name__ == "__main__":
    train(Album(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]))
