"""The characters of a forward pass of FLUX: which, how strongly, and where in the picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attend, CharacterAttention, sdpa

OVERSHOOT = 0.5
"""How far outside 0 to 1 a mask may lie: resizing overshoots."""


@dataclass(frozen=True)
class Subject:
    """One character at one timestep.

    Attributes:
        tokens: [1, N, C] for the whole batch, or a row for each picture in it. C is resampler_dim + 8 for folded
            attention, token_dim for the adapter's own.
        scale: strength, 1 is the one that the adapter was trained with: a float tensor of one number. It lies in host
            memory if its value is known there: a GPU kernel takes it as an argument, without a copy, and
            ``torch.compile`` takes it as an input, where it would compile anew for every value of a Python float.
        mask: where in the picture, from :func:`mask_to_tokens`; None for everywhere.
        single_scale: strength in FLUX's single blocks; None for ``scale``, as in its double blocks.
    """

    tokens: Tensor
    scale: Tensor
    mask: Tensor | None = None
    single_scale: Tensor | None = None

    def scale_in(self, single: bool) -> Tensor:
        """The strength in a single block, or in a double one."""
        return self.scale if self.single_scale is None or not single else self.single_scale


def add_subjects(
    hidden_states: Tensor,
    query: Tensor,
    subjects: Iterable[Subject],
    attention: CharacterAttention,
    key_scale: Tensor,
    attend: Attend = sdpa,
    single: bool = False,
) -> None:
    """Add, in place, the image tokens' attention to each subject.

    Args:
        hidden_states: [B, S, H·D], the image tokens' attention before its output projection.
        query: [B, S, H, D], their query after FLUX's norm and before RoPE.
        subjects: the characters.
        attention: of this block.
        key_scale: [D], of this block, see :meth:`~.CharacterAttention.key_scale`.
        attend: the attention kernel.
        single: whether this is one of FLUX's single blocks.
    """
    hidden_states = hidden_states.unflatten(-1, query.shape[-2:])  # a view; the output may lie head by head
    for subject in subjects:
        output = attention(query, subject.tokens, key_scale, subject.scale_in(single), attend)
        if subject.mask is None:
            hidden_states.add_(output)
        else:
            hidden_states.addcmul_(output, subject.mask.to(output).unsqueeze(-1))


def mask_to_tokens(mask: Tensor, rows: int, columns: int, may_be_empty: bool = False) -> Tensor:
    """A mask at the resolution of the image tokens.

    Args:
        mask: [H, W] or [B, H, W], bool or float, 1 inside and 0 outside; any size, stretched over the picture. Values
            at most :data:`OVERSHOOT` outside of 0 to 1 are clipped.
        rows: of image tokens.
        columns: of image tokens.
        may_be_empty: whether a mask of zeros is allowed.

    Returns:
        [1 or B, rows · columns, 1] in float32, the mean of the mask over each token.

    Raises:
        ValueError: a mask of another shape, of integers, of other values, or of zeros.
    """
    if mask.ndim not in (2, 3):
        raise ValueError(f"the mask is {list(mask.shape)}; expected [height, width] or [batch, height, width]")
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"the mask is {mask.dtype}; expected bool, or float in 0 to 1: convert it")
    mask = mask.float()
    if not (mask.min() >= -OVERSHOOT and mask.max() <= 1 + OVERSHOOT):  # false for NaN
        low, high = mask.min().item(), mask.max().item()
        raise ValueError(f"the mask has values from {low:g} to {high:g}; expected 0 to 1")
    if not may_be_empty and not (mask > 0).any():
        raise ValueError("the mask is empty: paint white where the character may be")
    mask = mask.clamp(0, 1).reshape(-1, 1, *mask.shape[-2:])
    return F.interpolate(mask, (rows, columns), mode="area").flatten(2).transpose(1, 2)
