"""Tensors from users, checked for their shape, dtype and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..values import shown

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST_LATENT = 1e4
"""Greatest magnitude of latents and embeddings: theirs is below 1000, and float16 ends at 65504."""


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | None],
    dtype: torch.dtype | None = None,
    largest: float = LARGEST_LATENT,
) -> None:
    """Raise ``ValueError`` unless a value is a tensor of finite floats.

    Args:
        name: in the message.
        value: the tensor.
        shape: None stands for any length of at least 1.
        dtype: None for any of :data:`FLOATS`.
        largest: greatest magnitude.
    """
    if not is_dense(value) or value.dtype not in FLOATS or dtype not in (None, value.dtype) or not _has(value, shape):
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} is {shown(value)}; expected a tensor [{lengths}] in {dtype or 'float'}")
    check_range(name, value, -largest, largest)


def check_range(name: str, values: Any, low: float, high: float) -> None:
    """Raise ``ValueError`` unless all values of a tensor or array are from ``low`` to ``high``; NaN is outside."""
    least, greatest = values.min().item(), values.max().item()
    if not (low <= least and greatest <= high):
        raise ValueError(f"{name} has values from {least:g} to {greatest:g}; expected finite ones, {low:g} to {high:g}")


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor with its numbers in memory: not nested, sparse or on the meta device."""
    if not isinstance(value, Tensor) or value.is_nested:
        return False
    return value.layout == torch.strided and not value.is_meta


def _has(value: Tensor, shape: Sequence[int | None]) -> bool:
    if value.ndim != len(shape) or not value.numel():
        return False
    return all(expected in (None, length) for length, expected in zip(value.shape, shape))
