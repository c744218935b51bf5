"""Character attention in one FLUX block: image tokens look at the character, beside FLUX's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Of the per-head norms. The checkpoint adds it to the root mean square; its square inside the root, which a single
GPU kernel does, is 1e-6 relative away at a root mean square of one."""

OVERSHOOT = 0.5
"""How far outside 0 to 1 resizing may leave a mask."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of [B, S, H, D] queries to [B, N, H, D] keys and values."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own attention on [B, S, H, D] queries and [B, N, H, D] keys and values."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class CharacterAttention(nn.Module):
    """What one block adds to its image tokens, before its output projection: softmax(q' k'ᵀ / √d) v'.

    ``q'`` and ``k'`` are normalised per head, each with its own learned scale. A host has FLUX's query at hand only
    *after* FLUX normalised it and put its own scale on it. Since q' and k' meet in a product, both learned scales
    and the inverse of FLUX's can stand on the keys, of which there are few: the query is used as it comes.

    Args:
        dim: width of the FLUX transformer, 3072 in FLUX.1.
        heads: its attention heads, 24.
        token_dim: width of the character tokens, 4096.
    """

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.norm_ip_q = QKNormScale(dim // heads)
        self.to_k_ip = nn.Linear(token_dim, dim)
        self.norm_ip_k = QKNormScale(dim // heads)
        self.to_v_ip = nn.Linear(token_dim, dim)

    def forward(self, query: Tensor, tokens: Tensor, query_scale: Tensor, attend: Attend = attend) -> Tensor:
        """Attend from the picture to the character.

        Args:
            query: [B, S, heads, dim/heads], FLUX's image query after its norm and before RoPE.
            tokens: [B, N, token_dim], or [1, N, token_dim] for one character in the whole batch: keys and values
                are then computed once.
            query_scale: [dim/heads], the learned scale of FLUX's query norm in this block.
            attend: the attention to use, :func:`attend` if not given.

        Returns:
            [B, S, dim].
        """
        scale = self.key_scale(query_scale).to(tokens)
        return attend_to_character(query, self.to_k_ip(tokens), self.to_v_ip(tokens), scale, attend)

    def key_scale(self, query_scale: Tensor) -> Tensor:
        """What stands on the normalised keys: both learned scales over FLUX's own, [dim/heads] in float32."""
        return self.norm_ip_k(self.norm_ip_q(query_scale.float().reciprocal()))


class QKNormScale(nn.Module):
    """The learned scale of a per-head norm, [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def attend_to_character(query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, attend: Attend) -> Tensor:
    """Normalise the keys and attend: [B, S, H, D] queries to [B or 1, N, H·D] keys and values → [B, S, H·D]."""
    batch, _, heads, head_dim = query.shape
    key, value = (rows.unflatten(-1, (heads, head_dim)) for rows in (key, value))
    key = F.rms_norm(key, (head_dim,), key_scale, eps=EPS**2)
    key, value = (rows.expand(batch, -1, -1, -1) for rows in (key, value))
    return attend(query, key, value).flatten(2)


@dataclass(frozen=True)
class Subject:
    """One character at one timestep.

    Attributes:
        tokens: [1, N, C] for the whole batch, or a row for each picture in it; C is what the attention takes.
        scale: how strongly it is drawn, 1 is what the adapter was trained with: a tensor of one number, in host
            memory, since code that is compiled for a number would be compiled anew for another.
        region: where in the picture, see :func:`region`; everywhere if not given.
    """

    tokens: Tensor
    scale: Tensor
    region: Tensor | None = None


class BlockAttention(Protocol):
    """Character attention that has all that it needs of its block."""

    def __call__(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor: ...


def add_subjects(
    hidden_states: Tensor, query: Tensor, subjects: Iterable[Subject], attention: BlockAttention, attend: Attend
) -> None:
    """Add, in place, what a block's image tokens see of the subjects.

    Args:
        hidden_states: [B, S, H·D], the image tokens' attention before its output projection.
        query: [B, S, H, D], their query.
        subjects: who is in the picture.
        attention: the block's.
        attend: the attention to use.
    """
    for subject in subjects:
        seen = attention(query, subject.tokens, partial(_attend_scaled, attend, subject.scale))
        if subject.region is None:
            hidden_states.add_(seen)
        else:
            hidden_states.addcmul_(seen, subject.region.to(seen))


def _attend_scaled(attend: Attend, scale: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled at the values, of which there are fewest."""
    return attend(query, key, value * scale)


def mask_to_tokens(mask: Tensor, rows: int, columns: int, may_be_empty: bool = False) -> Tensor:
    """A mask at the size of the picture's token grid.

    Args:
        mask: [H, W] or [B, H, W], bool or float, 1 where the character may be, 0 where not; any size, stretched over
            the picture. What resizing left a little outside of 0 to 1 is clipped.
        rows: of image tokens.
        columns: of image tokens.
        may_be_empty: whether there may be nothing in the mask.

    Returns:
        [1 or B, rows · columns, 1] in float32, each the mean of the mask over its token.

    Raises:
        ValueError: a mask of another shape or of integers, with other values, or with nothing in it.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"a region's mask is {list(mask.shape)}; expected [height, width] or [batch, height, width]")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"a region's mask is {mask.dtype}; expected bool, or float in 0 to 1: convert it")
    mask = mask.float()
    if not (mask.min() >= -OVERSHOOT and mask.max() <= 1 + OVERSHOOT):  # NaN is not, either
        low, high = mask.min().item(), mask.max().item()
        raise ValueError(f"a region's mask has values from {low:g} to {high:g}; expected 0 to 1")
    if not may_be_empty and not (mask > 0).any():
        raise ValueError("a region's mask is empty: paint white where the character may be")
    mask = mask.clamp(0, 1).reshape(-1, 1, *mask.shape[-2:])
    return F.interpolate(mask, (rows, columns), mode="area").flatten(2).transpose(1, 2)
