"""The training objective: rectified flow (arXiv 2403.03206) with FLUX's shift of the noise levels.

``x_σ = (1 − σ)·latents + σ·noise``, and the model predicts the velocity ``noise − latents``. σ is the sigmoid of a
normal variable, shifted towards noise with the picture's size, as FLUX's own schedule is.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def sample_sigmas(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Random noise levels between 0 and 1, [count], on the generator's device.

    Args:
        count: the number of pictures.
        tokens: image tokens of each picture, which decide the shift.
        generator: source of the random numbers.

    Source: logit-normal with mean 0 and deviation 1 (arXiv 2403.03206, section 3.1), FLUX.1's shift (diffusers).
    """
    logits = torch.randn(count, generator=generator, device=generator.device)
    return torch.sigmoid(logits + calculate_shift(tokens))


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_σ of [B, …] latents at noise levels [B], in the latents' dtype."""
    weights = sigmas.float().view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents.float(), noise.float(), weights).to(latents.dtype)


def velocity_losses(predicted: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of each picture's predicted velocity, [B] in float32."""
    return (predicted.float() - (noise.float() - latents.float())).square().flatten(1).mean(dim=1)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] latents as FLUX's image tokens, [B, H/2 · W/2, 4·C]."""
    return latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: ``rows`` × ``columns`` image tokens as latents, [B, C, 2·rows, 2·columns]."""
    blocks = tokens.unflatten(1, (rows, columns)).unflatten(3, (-1, 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def img_ids(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """Positions of ``rows`` × ``columns`` image tokens, [rows · columns, 3] in float32: 0, row, column."""
    grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    return torch.nn.functional.pad(grid.float(), (1, 0))
