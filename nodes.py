"""The pack's nodes, in the order in which ComfyUI lists them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .instantcharacter.comfyui.nodes.apply import Apply
from .instantcharacter.comfyui.nodes.character import (
    Encode,
    LoadCharacter,
    LoadCharacters,
    MixCharacters,
    SaveCharacter,
)
from .instantcharacter.comfyui.nodes.deprecated import Generate, LoadModel, LoadModelFromLocal
from .instantcharacter.comfyui.nodes.loaders import AdapterLoader, EncoderLoader, FluxLoader, ToyLoader
from .instantcharacter.comfyui.nodes.reference import LoadExample, PrepareReference
from .instantcharacter.comfyui.nodes.sampler import Sampler
from .instantcharacter.comfyui.nodes.strength import StrengthNode
from .instantcharacter.comfyui.nodes.sweep import Sweep

NODES: list[type[io.ComfyNode]] = [
    FluxLoader,
    EncoderLoader,
    AdapterLoader,
    LoadExample,
    PrepareReference,
    Encode,
    SaveCharacter,
    LoadCharacter,
    LoadCharacters,
    MixCharacters,
    Sampler,
    Sweep,
    Apply,
    StrengthNode,
    ToyLoader,
]
DEPRECATED_NODES: list[type[io.ComfyNode]] = [LoadModel, LoadModelFromLocal, Generate]


class InstantCharacterExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """ComfyUI calls it once, when it loads the pack."""
        return [*NODES, *DEPRECATED_NODES]
