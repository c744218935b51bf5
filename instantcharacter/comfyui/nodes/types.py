"""The nodes' category, and the types of their inputs and outputs that ComfyUI does not have."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "InstantCharacter"
NONE = "none"

FluxPipe = io.Custom("FLUX_PIPE")
Encoder = io.Custom("CHARACTER_ENCODER")
Adapter = io.Custom("CHARACTER_ADAPTER")
CharacterType = io.Custom("CHARACTER")
