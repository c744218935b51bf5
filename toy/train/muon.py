"""Muon for models of many small matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` with ``match_rms_adamw``, which orthogonalizes all matrices of one shape together.

    A convolution's kernel counts as a matrix with a row for each output.

    Source: https://kellerjordan.github.io/posts/muon; arXiv 2502.16982 for the rate.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                gradients = torch.stack([matrix.grad for matrix in matrices])
                average = self.state[matrices[0]].setdefault("average", torch.zeros_like(gradients))
                average.lerp_(gradients, 1 - MOMENTUM)
                updates = orthogonalize(gradients.lerp_(average, MOMENTUM).flatten(2))
                rate = group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
                for matrix, update in zip(matrices, updates.view_as(gradients)):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Approximately the nearest orthogonal matrix of each, by five Newton-Schulz steps; [N, R, C]."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        squared = x @ x.mT
        x = 3.4445 * x + (-4.775 * squared + 2.0315 * squared @ squared) @ x
    return (x.mT if tall else x).to(matrices.dtype)
