"""InstantCharacter Sampler: the library's own pipeline as one node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from .types import (
    CATEGORY,
    CharacterType,
    FluxPipe,
    Node,
    fraction_input,
    prompt_input,
    scale_input,
    seed_input,
    strength_input,
)

if TYPE_CHECKING:
    from ...model.strength import Strength
    from ..hosting import HostedCharacter
    from ..sampler import StyledPipeline


class Sampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterSampler",
            display_name="InstantCharacter Sampler",
            category=CATEGORY,
            description="Generates pictures of a character with the pack's own FLUX pipeline. To use ComfyUI's "
            "samplers, ControlNets, LoRAs and every kind of FLUX file, use InstantCharacter Apply and KSampler.",
            inputs=[
                FluxPipe.Input("flux_pipe", tooltip="From Load FLUX (InstantCharacter)."),
                CharacterType.Input("character", optional=True, tooltip="The character. Without one: plain FLUX."),
                prompt_input(
                    "What the character does, and where. Leave out how it looks. With a LoRA, its trigger words first.",
                    dynamic=True,
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="What to avoid. It has an effect only if true_cfg is above 1.",
                ),
                io.Float.Input(
                    "true_cfg",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Classifier-free guidance. Above 1, the negative prompt has an effect and a step takes "
                    "twice as long.",
                ),
                io.Int.Input("width", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input("height", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input(
                    "steps",
                    default=28,
                    min=1,
                    max=200,
                    tooltip="Denoising steps: 28 for FLUX.1-dev, 8 with a LoRA made for 8, 4 for schnell.",
                ),
                io.Float.Input(
                    "guidance", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="FLUX's own guidance: 2 to 4."
                ),
                seed_input(),
                scale_input(
                    "scale",
                    "Strength of the character. Start with 0.9; 0.6 to 0.8 follows the prompt and a style LoRA more "
                    "closely; 0 is plain FLUX.",
                ),
                fraction_input("start", 0.0, 0.01, "The character acts from this fraction of the steps on."),
                fraction_input("end", 1.0, 0.01, "The character acts up to this fraction of the steps."),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of pictures in one run."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of a connected image or latent changes; 1 changes all of it.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Replaces the prompt: a CONDITIONING of one prompt for FLUX."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Replaces the negative prompt."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Image to start from (image-to-image). It sets the size: it is scaled to multiples of 16.",
                ),
                io.Latent.Input("latent", optional=True, tooltip="Latent to start from, instead of an image."),
                io.Combo.Input(
                    "cache",
                    options=["none", "first_block"],
                    default="none",
                    optional=True,
                    tooltip="first_block leaves FLUX's blocks after the first out of the steps where their effect can "
                    "be predicted, in the toy world more than half of 28: a slightly different picture in less time. "
                    "Few steps, 4 or 8, are all computed.",
                ),
                strength_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The generated pictures."),
                io.Latent.Output(display_name="latent", tooltip="The same pictures as latents."),
            ],
        )

    @classmethod
    def run(
        cls,
        flux_pipe: StyledPipeline,
        prompt: str,
        negative_prompt: str,
        true_cfg: float,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        scale: float,
        start: float,
        end: float,
        batch_size: int,
        denoise: float,
        character: HostedCharacter | None = None,
        positive: list | None = None,
        negative: list | None = None,
        image: torch.Tensor | None = None,
        latent: dict | None = None,
        cache: str = "none",
        strength: Strength | None = None,
    ) -> io.NodeOutput:
        from ...flux.first_block_cache import THRESHOLD
        from ..init_image import Prompt, init_from_inputs

        generated = flux_pipe.generate(
            character,
            Prompt(
                prompt if positive is None else positive, negative_prompt if negative is None else negative, true_cfg
            ),
            (width, height),
            steps,
            seed,
            init_from_inputs(image, latent, denoise),
            batch_size=batch_size,
            guidance_scale=guidance,
            subject_scale=scale if strength is None else strength * scale,
            subject_start=start,
            subject_end=end,
            cache_threshold=0.0 if cache == "none" else THRESHOLD,
        )
        return io.NodeOutput(generated.image, {"samples": generated.samples})
