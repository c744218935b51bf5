"""The optimizer, its warm-up, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import TrainingConfig


def new_optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit AdamW.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    groups = [{"params": parameters, "initial_lr": config.learning_rate}]  # the keys of a saved state
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(groups, **settings)


def warm_up(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int) -> LambdaLR:
    """A linear warm-up to the config's learning rate, which then is constant; ``step`` steps are already taken."""
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate  # in place of a resumed state's
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, config.warmup)), last_epoch=step - 1)


class MovingAverage:
    """An exponential moving average of weights; follows them faster in the first steps, to forget their beginning.

    Not :class:`~torch.optim.swa_utils.AveragedModel`, which copies a whole module, and FLUX is part of it.

    Args:
        parameters: the weights.
        decay: of the average; 0 turns it off.

    Attributes:
        values: the averages in the order of the weights; empty before the first update, and if it is off.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.values: list[Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step number ``step``."""
        if not self._decay:
            return
        current = [parameter.detach() for parameter in self._parameters]
        if not self.values:
            self.values = [parameter.clone() for parameter in current]
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))
        average(self.values, current, None)

    def load(self, values: Sequence[Tensor]) -> None:
        """Go on from saved averages."""
        self.values = [value.to(parameter.device) for value, parameter in zip(values, self._parameters)]
