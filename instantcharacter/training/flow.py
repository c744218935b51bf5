"""What is trained: an adapter inside a FLUX that stays as it is."""

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
    """FLUX with an adapter's own attention in its blocks, and the adapter's projector.

    Args:
        transformer: FLUX; frozen here.
        adapter: to be trained; its weights become float32.
        checkpointing: compute activations again in the backward pass.
    """

    def __init__(self, transformer: FluxTransformer2DModel, adapter: CharacterAdapter, checkpointing: bool) -> None:
        super().__init__()
        attach(transformer.requires_grad_(False), adapter.float().requires_grad_(True), folded=False)
        self.transformer = transformer.train()  # or FLUX would not checkpoint; nothing in it drops out
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
        places: Tensor,
        scale: float = 1.0,
    ) -> Tensor:
        """The velocity, [B, S, C].

        Args:
            noisy: [B, S, C], image tokens.
            sigmas: [B], their noise level.
            guidance: [B], what FLUX is told.
            prompts: [B, T, W].
            pooled: [B, V].
            features: of the characters, see :class:`~instantcharacter.character.encoders.CharacterFeatures`.
            places: [S, 3], where the tokens are.
            scale: how strongly the characters are drawn; 1 where an adapter is trained.
        """
        tokens = self._tokens(features, 1000 * sigmas).to(noisy)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas.to(noisy),
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            encoder_hidden_states=prompts,
            pooled_projections=pooled,
            txt_ids=torch.zeros(prompts.shape[1], 3, device=noisy.device),
            img_ids=places,
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
def draw(
    flow: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    noise: Tensor,
    *told: Any,
    places: Tensor,
    steps: int,
    guidance: float = 3.5,
    scale: float = 1.0,
) -> Tensor:
    """Draw pictures as FLUX does, each of its own character: what a training shows of itself, and is measured by.

    Args:
        flow: a :class:`CharacterFlow`, also one that is in pieces or in several processes.
        scheduler: FLUX's.
        noise: [B, S, C] in float32, to begin with.
        *told: prompts, pooled prompts and features, as :meth:`CharacterFlow.forward` takes them.
        places: [S, 3], where the tokens are.
        steps: of denoising.
        guidance: what FLUX is told.
        scale: how strongly the characters are drawn.

    Returns:
        [B, S, C], image tokens.
    """
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(noise.shape[1]), device=noise.device)
    tokens = noise
    for timestep in scheduler.timesteps:
        sigma = (timestep / 1000).expand(len(tokens))
        velocity = flow(tokens, sigma, torch.full_like(sigma, guidance), *told, places, scale)
        tokens = scheduler.step(velocity.float(), timestep, tokens, return_dict=False)[0]
    return tokens


def new_adapter(adapter: CharacterAdapter) -> CharacterAdapter:
    """Have an untrained adapter leave FLUX as it is: its values are zero, and the first thing that learns."""
    for attention in adapter.attention:
        nn.init.zeros_(attention.get_parameter("to_v_ip.weight"))
        nn.init.zeros_(attention.get_parameter("to_v_ip.bias"))
    return adapter
