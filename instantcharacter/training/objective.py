"""What is learned: the velocity from a picture's latents to noise, at timesteps drawn as FLUX needs them.

Rectified flow (arXiv 2403.03206): x_σ = (1 − σ)·latents + σ·noise, and the model is to say noise − latents. σ is the
logistic function of a normal number, then shifted towards noise by the picture's size, as FLUX is when it draws.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ..flux.latents import img_ids, pack

__all__ = ["add_noise", "draw_sigmas", "pack", "positions", "velocity_losses"]


def draw_sigmas(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Noise levels between 0 and 1 for ``count`` pictures of so many image tokens, [count], on the generator's device.

    Source: logit-normal with mean 0 and deviation 1 (arXiv 2403.03206, section 3.1), FLUX.1's shift (diffusers).
    """
    logits = torch.randn(count, generator=generator, device=generator.device)
    return torch.sigmoid(logits + calculate_shift(tokens))


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_σ of [B, …] latents, in their dtype."""
    return torch.lerp(latents.float(), noise.float(), _beside(sigmas, latents)).to(latents.dtype)


def velocity_losses(predicted: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity for each picture, [B] in float32."""
    return (predicted.float() - (noise.float() - latents.float())).square().flatten(1).mean(dim=1)


def positions(latents: Tensor) -> Tensor:
    """Of :func:`pack`'s tokens, [H/2 · W/2, 3] in float32."""
    height, width = latents.shape[-2:]
    return img_ids(height // 2, width // 2, latents.device)


def _beside(sigmas: Tensor, latents: Tensor) -> Tensor:
    return sigmas.float().view(-1, *[1] * (latents.ndim - 1))
