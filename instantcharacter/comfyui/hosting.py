"""The adapter and the encoders as ComfyUI's models: ComfyUI moves their weights to the GPU and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ..character.tokens import TokenCache
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..model.folding import fold
from .internals import linear_layer, partial_patcher, unload
from .patchers import HostedPatcher


def to_patcher(module: nn.Module, partial: bool = False) -> Any:
    """A ``ModelPatcher`` of a module: ComfyUI loads, counts and unloads its weights.

    Args:
        module: on the CPU or on ComfyUI's device. ComfyUI moves it to the CPU when it needs the memory.
        partial: whether ComfyUI may load some of its layers and leave others on the CPU. They must be ComfyUI's
            layers. Any other module is loaded whole, by ComfyUI's static patcher: the one for dynamic VRAM cannot
            move such a module back.
    """
    kind = partial_patcher() if partial else comfy.model_patcher.ModelPatcher
    return kind(module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def load(patcher: Any, activation_bytes: int = 0) -> Any:
    """Load the whole module of a ``ModelPatcher`` onto its device, and free memory for its activations: the module."""
    management.load_models_gpu([patcher], memory_required=activation_bytes, force_full_load=True)
    patcher.partially_load(patcher.load_device, 1e32)  # --novram ignores force_full_load
    return patcher.model


def weight_dtype() -> torch.dtype:
    """The dtype for weights on ComfyUI's device: float32 on a CPU, bfloat16 or float16 on a GPU."""
    device = management.get_torch_device()
    if management.is_device_cpu(device):
        return torch.float32
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float16


class CharacterFusion(nn.ModuleList):
    """The projector without its resampler. ComfyUI logs the name of this class."""


class CharacterBlocks(nn.ModuleList):
    """Character attention of all FLUX blocks. ComfyUI logs the name of this class."""


class HostedAdapter:
    """A CHARACTER_ADAPTER: an adapter whose weights ComfyUI manages, for the Sampler and for Apply alike.

    Args:
        adapter: in host memory.
        dtype: of the projector's weights on ComfyUI's device, their own if None.

    Attributes:
        adapter: the adapter, whole or folded. The patchers below share its weights.
        fingerprint: see :meth:`CharacterAdapter.fingerprint`.
        fusion: ``ModelPatcher`` of the projector's modules that run once a picture.
        resampler: ``ModelPatcher`` of the projector's modules that run at each timestep.
        tokens: the tokens of each character's last schedule.
    """

    def __init__(self, adapter: CharacterAdapter, dtype: torch.dtype | None = None) -> None:
        self.adapter = adapter
        self.fingerprint = adapter.fingerprint()
        projector = adapter.projector
        self.fusion = HostedPatcher(CharacterFusion(projector.fusion_modules()), dtype)
        self.resampler = HostedPatcher(projector.resampler, dtype)
        self.tokens = TokenCache(projector)
        self._attention: dict[torch.dtype, Any] = {}

    def attention(self, dtype: torch.dtype) -> Any:
        """``ModelPatcher`` of the folded attention of all blocks, folded once for each dtype."""
        if dtype not in self._attention:
            device = management.get_torch_device()
            blocks = fold(self.adapter, torch.device("cpu"), dtype, linear_layer(), compute_on=device)
            self._attention[dtype] = to_patcher(CharacterBlocks(blocks), partial=True)
        return self._attention[dtype]

    @contextmanager
    def resampling(self) -> Iterator[None]:
        """Context manager: the resampler is loaded, and unloaded at the end."""
        load(self.resampler)
        try:
            yield
        finally:
            unload(self.resampler)

    def key_scales(self, query_scales: Tensor) -> list[Tensor]:
        """The scale of each block's keys, [head_dim], for FLUX's query scales, [blocks, head_dim]."""
        return [attention.key_scale(scale) for attention, scale in zip(self.adapter.attention, query_scales)]


class HostedCharacter(NamedTuple):
    """A CHARACTER: a character, and the adapter that made it."""

    character: Character
    adapter: HostedAdapter
