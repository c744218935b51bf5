"""What the nodes share: their base, their category, their own input and output types, and inputs of several nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..inputs import check_inputs

CATEGORY = "InstantCharacter"
NONE = "none"
"""The choice of a list that loads nothing."""

FluxPipe = io.Custom("FLUX_PIPE")
Encoder = io.Custom("CHARACTER_ENCODER")
Adapter = io.Custom("CHARACTER_ADAPTER")
CharacterType = io.Custom("CHARACTER")
StrengthType = io.Custom("CHARACTER_STRENGTH")


class Node(io.ComfyNode):
    """A node that checks its inputs against its schema before it runs."""

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """What ComfyUI calls."""
        return cls.run(**check_inputs(cls.define_schema().inputs, inputs))

    @classmethod
    def run(cls, *args: Any, **inputs: Any) -> io.NodeOutput:
        """What a node does with its inputs."""
        raise NotImplementedError


def prompt_input(tooltip: str, dynamic: bool | None = None) -> io.String.Input:
    """The prompt; ``dynamic`` for ComfyUI's ``{one|other}``."""
    return io.String.Input("prompt", multiline=True, default="", dynamic_prompts=dynamic, tooltip=tooltip)


def seed_input() -> io.Int.Input:
    """The seed of the noise."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**64 - 1,
        control_after_generate=True,
        tooltip="The same seed and settings generate the same picture.",
    )


def scale_input(name: str, tooltip: str) -> io.Float.Input:
    """The strength of the character."""
    return io.Float.Input(name, default=0.9, min=0.0, max=2.0, step=0.05, tooltip=tooltip)


def fraction_input(name: str, default: float, step: float, tooltip: str) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


def strength_input() -> io.Custom.Input:
    """A character's strength over time and blocks; several nodes take it."""
    return StrengthType.Input(
        "strength",
        optional=True,
        tooltip="From InstantCharacter Strength: changes scale over the steps, or between FLUX's kinds of blocks.",
    )
