"""InstantCharacter Strength: a character's strength over time and blocks."""

from __future__ import annotations

from comfy_api.latest import io

from .types import CATEGORY, Node, StrengthType


class StrengthNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InstantCharacterStrength",
            display_name="InstantCharacter Strength",
            category=CATEGORY,
            description="Changes a character's strength over the steps, in straight lines from start through middle to "
            "end, and between FLUX's two kinds of blocks. All are factors on scale: 1 everywhere changes nothing.",
            inputs=[
                _factor("start", "Factor on scale at the beginning, where the layout and the pose form."),
                _factor("middle", "Factor on scale half-way."),
                _factor("end", "Factor on scale at the end, where the details form."),
                _factor("double_blocks", "Factor on scale in FLUX's double blocks, which come first."),
                _factor("single_blocks", "Factor on scale in FLUX's single blocks, which follow."),
            ],
            outputs=[StrengthType.Output(display_name="strength", tooltip="For Apply or Sampler, or for several.")],
        )

    @classmethod
    def run(cls, start: float, middle: float, end: float, double_blocks: float, single_blocks: float) -> io.NodeOutput:
        from ...model.strength import Strength

        return io.NodeOutput(Strength(start, middle, end, double_blocks, single_blocks))


def _factor(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=3.0, step=0.05, tooltip=tooltip)
