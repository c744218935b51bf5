"""InstantCharacter Apply: a character on ComfyUI's own MODEL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io

from .types import CATEGORY, CharacterType, Node, fraction_input, scale_input, strength_input

if TYPE_CHECKING:
    from ...model.strength import Strength
    from ..hosting import HostedCharacter


class Apply(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterApply",
            display_name="InstantCharacter Apply",
            category=CATEGORY,
            description="Adds a character to a FLUX.1 MODEL, for KSampler and ComfyUI's other nodes. For several "
            "characters in one picture, chain several of these nodes, each with a mask.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="FLUX.1 (dev, schnell, Krea, Kontext) in bf16, fp8 or GGUF, with or without LoRAs."
                ),
                CharacterType.Input("character", tooltip="From InstantCharacter Encode or Load Character."),
                scale_input(
                    "scale",
                    "Strength of the character. Start with 0.9; 0.6 to 0.8 follows the prompt and a style LoRA more "
                    "closely; 0 leaves the MODEL unchanged.",
                ),
                fraction_input(
                    "start_percent", 0.0, 0.001, "The character acts from this fraction of the denoising on."
                ),
                fraction_input("end_percent", 1.0, 0.001, "The character acts up to this fraction of the denoising."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the character may be in the picture. Any size: it is stretched over the "
                    "picture. One mask, or one for each picture of a batch.",
                ),
                strength_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For KSampler, or for another Apply.")],
        )

    @classmethod
    def run(
        cls,
        model: Any,
        character: HostedCharacter,
        scale: float,
        start_percent: float,
        end_percent: float,
        mask: torch.Tensor | None = None,
        strength: Strength | None = None,
    ) -> io.NodeOutput:
        from ..conditioning import CharacterConditioning
        from ..model_patch import apply

        over_time = scale if strength is None else strength * scale
        conditioning = CharacterConditioning(
            character.adapter, character.character, over_time, start_percent, end_percent, mask
        )
        return io.NodeOutput(apply(model, conditioning))
