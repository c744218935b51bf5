"""Random weights of given shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STD = 0.02
"""Standard deviation: activations stay finite through all layers, in half precision too."""


def random_state(shapes: Callable[[], Shapes], dtype: torch.dtype) -> State:
    """Random numbers of these shapes; biases are 0, weights of norms and other scales 1."""

    def fill(key: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return torch.full(shape, float(not key.endswith("bias")), dtype=dtype)
        return (torch.randn(shape, device=DEVICE) * STD).to(dtype).cpu()

    return {key: fill(key, shape) for key, shape in shapes().items()}


def shapes_of(module: Any, prefix: str = "") -> Shapes:
    """A module's shapes; all keys get the prefix that they have in the released file."""
    state = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if "position_ids" not in key}
    return {f"{prefix}{key.removeprefix(prefix)}": shape for key, shape in state.items()}
