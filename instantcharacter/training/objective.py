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
