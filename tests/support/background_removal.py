"""A background removal model for ComfyUI that is small: its foreground is what is red."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

KEY = "bb.layers.1.blocks.0.attn.relative_position_index"
"""The key by which ComfyUI knows BiRefNet's files."""


class RedForeground(nn.Module):
    """In BiRefNet's place among ComfyUI's models, with its arguments."""

    def __init__(self, config: Any, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.logits = operations.Conv2d(3, 1, 1, dtype=dtype, device=device)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits, [B, 1, H, W], of pictures in [0, 1], [B, 3, H, W]."""
        return self.logits(pixel_values)


def save(file: Path) -> None:
    """Write a file that ComfyUI takes for BiRefNet's, with the weights of :class:`RedForeground`."""
    weight = torch.tensor([60.0, -60.0, -60.0]).reshape(1, 3, 1, 1)
    save_file({KEY: torch.zeros(1), "logits.weight": weight, "logits.bias": torch.tensor([-15.0])}, file)
