"""FLUX's image tokens: 2×2 patches of the VAE's latents, and the position of each."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2
"""Side of a token in latent pixels."""


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as image tokens [B, H/2 · W/2, 4·C], row by row."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PATCH, pw=PATCH)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Image tokens [B, rows · columns, 4·C] as latents [B, C, 2·rows, 2·columns]: the inverse of :func:`pack`.

    A token is 16 pixels wide and high in the picture.
    """
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH)


def img_ids(
    rows: int, columns: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Positions of ``rows`` × ``columns`` image tokens: (0, row, column) for each, [rows · columns, 3].

    Args:
        rows: of tokens.
        columns: of tokens.
        device: of the result; the CPU if not given.
        dtype: of the result; float32 if not given.
    """
    axes = (torch.arange(count, dtype=torch.float32) for count in (1, rows, columns))
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return rearrange(ids, "one h w axes -> (one h w) axes").to(device, dtype)
