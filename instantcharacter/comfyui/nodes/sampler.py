"""InstantCharacter Sampler: the library's own pipeline as one node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from .types import CATEGORY, CharacterType, FluxPipe

if TYPE_CHECKING:
    from ..hosting import HostedCharacter
    from ..sampler import StyledPipeline


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterSampler",
            display_name="InstantCharacter Sampler",
            category=CATEGORY,
            description="Draws the character: the library's own pipeline, self-contained. For every FLUX file, "
            "sampler, ControlNet and LoRA of ComfyUI, take InstantCharacter Apply and KSampler.",
            inputs=[
                FluxPipe.Input("flux_pipe", tooltip="From Load FLUX (InstantCharacter)."),
                CharacterType.Input("character", optional=True, tooltip="Who. Without a character this is plain FLUX."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip="What the character does, and where; a LoRA's trigger words first. Not what it looks like.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="What to keep out; counts only with true_cfg above 1.",
                ),
                io.Float.Input(
                    "true_cfg",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="Above 1, the negative prompt counts and each step takes twice as long.",
                ),
                io.Int.Input("width", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input("height", default=1024, min=256, max=4096, step=16, tooltip="In pixels."),
                io.Int.Input("steps", default=28, min=1, max=200, tooltip="28 for FLUX.1-dev, 4 for schnell."),
                io.Float.Input(
                    "guidance", default=3.5, min=0.0, max=100.0, step=0.1, tooltip="FLUX's own guidance: 2 to 4."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The same seed draws the same picture.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.9,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the character is drawn: 0.9 to begin with; 0.6 to 0.8 leaves more to the "
                    "prompt and to a style; 0 is plain FLUX.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps before which the character is left out.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the steps after which it is left out.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures at once."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="With an image or latent to begin with: how much of it is drawn anew.",
                ),
                io.Conditioning.Input("positive", optional=True, tooltip="In place of the prompt; FLUX's, and one."),
                io.Conditioning.Input("negative", optional=True, tooltip="In place of the negative prompt."),
                io.Image.Input("image", optional=True, tooltip="A picture to begin with; its size is taken."),
                io.Latent.Input("latent", optional=True, tooltip="A latent to begin with, in place of a picture."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture."),
                io.Latent.Output(display_name="latent", tooltip="The picture as latents."),
            ],
        )

    @classmethod
    def execute(
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
    ) -> io.NodeOutput:
        from ..sampler import Prompt, init_from_inputs

        drawing = flux_pipe.draw(
            character,
            Prompt(positive or prompt, negative or negative_prompt, true_cfg),
            (width, height),
            steps,
            seed,
            init_from_inputs(image, latent, denoise),
            batch_size=batch_size,
            guidance_scale=guidance,
            subject_scale=scale,
            subject_start=start,
            subject_end=end,
        )
        return io.NodeOutput(drawing.image, {"samples": drawing.samples})
