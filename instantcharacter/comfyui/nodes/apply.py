"""InstantCharacter Apply: a character on ComfyUI's own MODEL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from .types import CATEGORY, CharacterType

if TYPE_CHECKING:
    from ..hosting import HostedCharacter


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterApply",
            display_name="InstantCharacter Apply",
            category=CATEGORY,
            description="Puts a character on a FLUX.1 MODEL, for KSampler and everything else of ComfyUI. One after "
            "another, several characters come into one picture, each where its mask is.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1 (dev, schnell, Krea, Kontext), bf16, fp8 or GGUF, LoRAs and all."
                ),
                CharacterType.Input("character", tooltip="From InstantCharacter Encode or Load Character."),
                io.Float.Input(
                    "scale",
                    default=0.9,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly the character is drawn: 0.9 to begin with; 0.6 to 0.8 leaves more to the "
                    "prompt and to a style; 0 leaves the MODEL as it is.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the denoising before which the character is left out.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Part of the denoising after which it is left out.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where in the picture the character may be; stretched over the picture. One, or "
                    "one for each picture of a batch.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="To KSampler, or to another Apply.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        character: HostedCharacter,
        scale: float,
        start_percent: float,
        end_percent: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        from ..images import masks
        from ..model_patch import CharacterConditioning, apply

        who, adapter = character
        where = None if mask is None else masks(mask)
        return io.NodeOutput(
            apply(model, CharacterConditioning(adapter, who, scale, start_percent, end_percent, where))
        )
