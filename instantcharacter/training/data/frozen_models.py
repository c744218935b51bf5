"""The models that stay frozen beside FLUX: its VAE and text encoders, SigLIP and DINOv2."""

from __future__ import annotations

from functools import cached_property

import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from ...character.encoders import CharacterEncoder
from ...flux.latents import pack
from ..config import TrainingConfig
from .cache import Tensors

FEATURES = ("low_res_shallow", "low_res_deep", "high_res_deep")
"""Names of the vision encoders' tensors, in the order of :class:`~instantcharacter.CharacterFeatures`."""


class FrozenModels:
    """The frozen models, each loaded at its first use; every method takes a batch and returns each sample's tensors.

    Args:
        config: names the models and their precision.
        device: where they run.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._dtype = getattr(torch, config.precision)

    @torch.no_grad()
    def encode_targets(self, pixels: list[Tensor]) -> list[Tensors]:
        """``tokens``: [S, 4·C], scaled latents of [3, R, R] pictures as image tokens."""
        latents = self.vae.encode(torch.stack(pixels).to(self._device, self.vae.dtype)).latent_dist.mode()
        latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return [{"tokens": tokens} for tokens in pack(latents).to(self._dtype)]

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> list[Tensors]:
        """``prompt``: [T, W] by T5; ``pooled``: [V] by CLIP."""
        pipeline = self._text_encoders
        length = pipeline.tokenizer_2.model_max_length
        prompts, pooled, _ = pipeline.encode_prompt(texts, None, device=self._device, max_sequence_length=length)
        return [{"prompt": prompt, "pooled": row} for prompt, row in zip(prompts, pooled)]

    def encode_references(self, crops: list[Tensor]) -> list[Tensors]:
        """The three features of each reference: [3·N, F], [N, F] and [4·N, F]."""
        features = self._vision_encoders.encode_images(torch.stack(crops))
        return [dict(zip(FEATURES, rows)) for rows in zip(*features)]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] as pictures, [B, 3, 8·H, 8·W] from -1 to 1."""
        config = self.vae.config
        return self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample

    @cached_property
    def vae(self) -> AutoencoderKL:
        """FLUX's, in float32: half precision loses detail of the pictures."""
        vae = AutoencoderKL.from_pretrained(self._config.model, subfolder="vae", torch_dtype=torch.float32)
        return vae.to(self._device).requires_grad_(False)

    @cached_property
    def _text_encoders(self) -> FluxPipeline:
        pipeline = FluxPipeline.from_pretrained(self._config.model, transformer=None, vae=None, torch_dtype=self._dtype)
        return pipeline.to(self._device)

    @cached_property
    def _vision_encoders(self) -> CharacterEncoder:
        config = self._config
        return CharacterEncoder.from_pretrained(config.siglip, config.dinov2, self._dtype, self._device)
