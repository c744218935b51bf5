"""Figures of edges: how sharp they are, and whether they are on the grid of pixel art."""

from __future__ import annotations

import torch
from torch import Tensor

from toy.world.styles import PIXEL

PIXEL_ART = 0.5
"""Pixel art has more than this share of its edges on a grid."""


def sharpness(pictures: Tensor) -> Tensor:
    """The mean gradient of each of [N, 3, H, W] pictures, weighted by itself: Σg² / Σg.

    Blurring an edge spreads its step over more pixels: Σg stays, Σg² falls. Areas without edges do not count.
    """
    across, down = pictures.diff(dim=3)[:, :, :-1], pictures.diff(dim=2)[..., :-1]
    squared = (across.square() + down.square()).sum(dim=1).flatten(1)
    return squared.sum(dim=1) / squared.sqrt().sum(dim=1).clamp(min=1e-6)


def share_on_grid(pictures: Tensor, side: int = PIXEL) -> Tensor:
    """The share of all changes from pixel to pixel that is on the lines of the best grid of squares of ``side``: [N].

    1 in pixel art, whose squares are of one colour each; near ``1 / side`` in any other picture.
    """
    on_lines, total = (torch.zeros(len(pictures), device=pictures.device) for _ in range(2))
    for other, dim in ((2, 3), (3, 2)):
        changes = pictures.diff(dim=dim).abs().sum(dim=(1, other))
        by_offset = torch.stack([changes[:, offset::side].sum(dim=1) for offset in range(side)], dim=1)
        on_lines, total = on_lines + by_offset.amax(dim=1), total + changes.sum(dim=1)
    return on_lines / total.clamp(min=1e-6)


def is_pixel_art(pictures: Tensor) -> Tensor:
    """Whether the edges of each picture are on a grid, [N]."""
    return share_on_grid(pictures) > PIXEL_ART
