"""The pack's nodes, in the order in which ComfyUI lists them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .instantcharacter.comfyui.nodes.apply import Apply
from .instantcharacter.comfyui.nodes.character import Encode, LoadCharacter, PrepareReference, SaveCharacter
from .instantcharacter.comfyui.nodes.deprecated import Generate, LoadModel, LoadModelFromLocal
from .instantcharacter.comfyui.nodes.loaders import AdapterLoader, EncoderLoader, FluxLoader, ToyLoader
from .instantcharacter.comfyui.nodes.sampler import Sampler
from .instantcharacter.comfyui.nodes.strength import StrengthNode

NODES: list[type[io.ComfyNode]] = [
    FluxLoader,
    EncoderLoader,
    AdapterLoader,
    PrepareReference,
    Encode,
    SaveCharacter,
    LoadCharacter,
    Sampler,
    Apply,
    StrengthNode,
    ToyLoader,
]
DEPRECATED_NODES: list[type[io.ComfyNode]] = [LoadModel, LoadModelFromLocal, Generate]


class InstantCharacterExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """ComfyUI calls it once, when it loads the pack."""
        return [*NODES, *DEPRECATED_NODES]
