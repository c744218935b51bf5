"""The trained model: an adapter inside a frozen FLUX; and sampling with it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..flux.attn_processor import attach
from ..model.adapter import CharacterAdapter
from ..model.conditioning import Subject


class CharacterFlow(nn.Module):
    """FLUX with an adapter's attention in its blocks, and the adapter's projector: one module for the optimizer.

    Args:
        transformer: FLUX; its weights are frozen here.
        adapter: the trained part; its weights become float32.
        checkpointing: recompute activations in the backward pass.
    """

    def __init__(self, transformer: FluxTransformer2DModel, adapter: CharacterAdapter, checkpointing: bool) -> None:
        super().__init__()
        attach(transformer.requires_grad_(False), adapter.float().requires_grad_(True), folded=False)
        self.transformer = transformer.train()  # FLUX checkpoints only in training mode; it has no dropout
        self.projector = adapter.projector
        self._checkpointing = checkpointing
        if checkpointing:
            transformer.enable_gradient_checkpointing()

    def forward(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        guidance: Tensor,
        prompts: Tensor,
        pooled: Tensor,
        features: tuple[Tensor, Tensor, Tensor],
        img_ids: Tensor,
        scale: float = 1.0,
    ) -> Tensor:
        """Predict the velocity, [B, S, C].

        Args:
            noisy: [B, S, C], image tokens.
            sigmas: [B], their noise levels.
            guidance: [B], FLUX's guidance input.
            prompts: [B, T, W], T5's embeddings.
            pooled: [B, V], CLIP's.
            features: of one character per picture, see :class:`~instantcharacter.CharacterFeatures`.
            img_ids: [S, 3], positions of the image tokens.
            scale: strength of the characters; 1 in training.
        """
        tokens = self._tokens(features, 1000 * sigmas).to(noisy)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas.to(noisy),
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
            txt_ids=torch.zeros(prompts.shape[1], 3, device=noisy.device),
            img_ids=img_ids,
            joint_attention_kwargs={
                "subjects": [Subject(tokens, torch.tensor(scale))],
                "image_tokens": noisy.shape[1],
            },
            return_dict=False,
        )[0]

    def _tokens(self, features: tuple[Tensor, Tensor, Tensor], timesteps: Tensor) -> Tensor:
        def project(*features: Tensor) -> Tensor:
            return self.projector.resample(self.projector.fuse(*features), timesteps)

        return checkpoint(project, *features, use_reentrant=False) if self._checkpointing else project(*features)


@torch.no_grad()
def sample(
    flow: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    noise: Tensor,
    *conditioning: Any,
    img_ids: Tensor,
    steps: int,
    guidance: float = 3.5,
    scale: float = 1.0,
) -> Tensor:
    """Sample a batch of pictures, each with its own character, on the schedule of FLUX's pipeline.

    Apart from the pipeline, which gives every picture of a batch the same characters, and which cannot run a flow that
    FSDP has sharded.

    Args:
        flow: a :class:`CharacterFlow`, or accelerate's wrapper of one.
        scheduler: FLUX's.
        noise: [B, S, C] in float32.
        *conditioning: prompts, pooled prompts and features, as :meth:`CharacterFlow.forward` takes them.
        img_ids: [S, 3], positions of the image tokens.
        steps: denoising steps.
        guidance: FLUX's guidance input.
        scale: strength of the characters.

    Returns:
        [B, S, C], image tokens.
    """
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(noise.shape[1]), device=noise.device)
    tokens = noise
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).expand(len(tokens))
        velocity = flow(tokens, sigma, torch.full_like(sigma, guidance), *conditioning, img_ids, scale)
        tokens = scheduler.step(velocity.float(), timestep, tokens, return_dict=False)[0]
    return tokens


def zero_values(adapter: CharacterAdapter) -> CharacterAdapter:
    """Zero a new adapter's value projections: it then leaves FLUX's output unchanged until they are trained."""
    for attention in adapter.attention:
        nn.init.zeros_(attention.get_parameter("to_v_ip.weight"))
        nn.init.zeros_(attention.get_parameter("to_v_ip.bias"))
    return adapter
