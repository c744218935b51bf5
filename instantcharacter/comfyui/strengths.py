"""A character's strength at the timestep of a step, which is known on the GPU alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.strength import Scale, Strength, scales_at

KNOTS = 1001
"""Fractions of the denoising at which the strength is tabulated; the schedule's curve is straight between them."""
NARROWEST = 1e-6
"""Width between two knots at least: a schedule with a very large shift has knots at the same timestep."""


class Strengths:
    """A strength in double and in single blocks, over the timesteps of one sampling.

    Args:
        scale: the strength.
        sampling: ComfyUI's model sampling, which says how far the denoising is at a timestep.
        device: of the sampling.
        dtype: of the results that lie on it.
    """

    def __init__(self, scale: Scale, sampling: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._constant = scales_at(scale, 0.0)
        self._dtype = dtype
        self.changes = isinstance(scale, Strength) and not scale.is_constant
        if self.changes:
            fractions = [i / (KNOTS - 1) for i in reversed(range(KNOTS))]
            self._knots = timesteps_at(sampling, fractions).to(device)
            self._scales = torch.tensor([scales_at(scale, fraction) for fraction in fractions], device=device)

    def at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The strengths in double and in single blocks at a timestep, [1], as tensors of one number each.

        They lie in host memory; those of a strength that changes lie beside the timestep, which nothing waits for.
        """
        if not self.changes:
            double, single = self._constant
            return torch.tensor(double), torch.tensor(single)
        after = torch.searchsorted(self._knots, timestep).clamp(1, KNOTS - 1)
        low, high = self._knots[after - 1], self._knots[after]
        share = ((timestep - low) / (high - low).clamp_min(NARROWEST)).clamp(0, 1).unsqueeze(-1)
        now = torch.lerp(self._scales[after - 1], self._scales[after], share).to(self._dtype)
        return now[0, 0], now[0, 1]


def to_adapter(timestep: Tensor) -> Tensor:
    """Timesteps from FLUX's range [0, 1] to the adapter's, [0, 1000]."""
    return timestep.float() * 1000


def timesteps_at(sampling: Any, fractions: Sequence[float]) -> Tensor:
    """The adapter's timesteps at fractions of the denoising, as ComfyUI's samplers count it, [N]."""
    sigmas = torch.tensor([float(sampling.percent_to_sigma(fraction)) for fraction in fractions])
    return to_adapter(sampling.timestep(sigmas))
