"""Sums of losses by noise level, for the log."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 10
"""Ranges of noise levels whose losses are logged apart."""


class LossesByLevel:
    """Sums and counts of losses since the last report, on the device, so that no step waits for it.

    Attributes:
        sums: [LEVELS, 2], a sum of losses and their number for each range.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(LEVELS, 2, device=device)

    def add(self, sigmas: Tensor, losses: Tensor) -> None:
        """Add losses [B] at noise levels [B]."""
        level = (sigmas * LEVELS).long().clamp(max=LEVELS - 1)
        self.sums[:, 0].index_add_(0, level, losses.float())
        self.sums[:, 1].index_add_(0, level, torch.ones_like(losses, dtype=torch.float32))


def mean_losses(sums: Tensor) -> dict[str, float]:
    """The mean ``loss``, and one for each range of noise levels that has any."""
    levels = sums.tolist()
    mean = sum(loss for loss, _ in levels) / sum(count for _, count in levels)
    by_level = {f"loss at σ {i / LEVELS:.1f}": loss / count for i, (loss, count) in enumerate(levels) if count}
    return {"loss": mean, **by_level}
