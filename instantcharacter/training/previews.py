"""Pictures that a training generates of itself, in TensorBoard."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..flux.latents import img_ids, unpack
from .config import TrainingConfig
from .data.cache import Tensors
from .data.examples import Examples, features_in_order
from .flow import sample


class Previews:
    """Generates the config's previews, with the same noise every time.

    Args:
        config: the training's.
        accelerator: where it runs.
        examples: encode the previews, and decode the latents.
        channels: of an image token.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator, examples: Examples, channels: int) -> None:
        self._config, self._accelerator, self._examples = config, accelerator, examples
        self._channels = channels
        self._side = config.resolution // 16

    @torch.no_grad()
    def write(self, flow: Any, step: int) -> None:
        """Write the previews into TensorBoard; every process has to call it, since FSDP shards the flow."""
        for i, preview in enumerate(self._config.previews):
            text, features = self._examples.encode_preview(preview)
            tokens = self._sample(flow, text, features)
            if self._accelerator.is_main_process:
                picture = self._examples.models.decode(unpack(tokens, self._side, self._side))[0]
                tracker = self._accelerator.get_tracker("tensorboard", unwrap=True)
                tracker.add_image(f"{i} {preview.prompt}", (picture.float() / 2 + 0.5).clamp(0, 1).cpu(), step)

    def _sample(self, flow: Any, text: Tensors, features: Tensors) -> Tensor:
        config, device = self._config, self._accelerator.device
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(config.model, subfolder="scheduler")
        generator = torch.Generator(device).manual_seed(config.seed)
        noise = torch.randn(1, self._side**2, self._channels, generator=generator, device=device)
        batched = {key: tensor[None] for key, tensor in {**text, **features}.items()}
        conditioning = batched["prompt"], batched["pooled"], features_in_order(batched)
        positions = img_ids(self._side, self._side, device)
        flow.eval()
        with self._accelerator.autocast():
            return sample(flow, scheduler, noise, *conditioning, img_ids=positions, steps=config.preview_steps)
