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


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Image tokens [B, H/2 · W/2, 4·C] as latents [B, C, H, W]: the inverse of :func:`pack`.

    Args:
        tokens: of pictures whose latents have this size.
        height: of the latents: an eighth of the picture's height in pixels, rounded down to an even number.
        width: of the latents.
    """
    return rearrange(
        tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height // PATCH, w=width // PATCH, ph=PATCH, pw=PATCH
    )


def img_ids(height: int, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Positions of the image tokens of latents [B, C, height, width]: rows of (0, row, column), [H/2 · W/2, 3].

    Args:
        height: of the latents, as ``width``.
        device: of the result; the CPU if not given.
        dtype: of the result; float32 if not given.
    """
    rows, columns = (torch.arange(side // PATCH, dtype=torch.float32) for side in (height, width))
    ids = torch.stack(torch.meshgrid(torch.zeros(1), rows, columns, indexing="ij"), dim=-1)
    return rearrange(ids, "one h w axes -> (one h w) axes").to(device, dtype)
