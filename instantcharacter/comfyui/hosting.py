"""The adapter and the encoders in ComfyUI.

What makes a character is ComfyUI's to load and unload, as ``ModelPatcher``. What draws one is on the GPU during a
sampling alone: the resampler whole, the attention whole if it fits, and otherwise each block's while the block runs.
Next to FLUX on a full card, ComfyUI would load all of that anew in each step, in the way of FLUX's own copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ..model.adapter import CharacterAdapter
from ..model.attention import FoldedCharacterAttention
from ..model.character import Character
from ..model.folding import fold
from ..offload.host_weights import HostWeightsCache
from ..offload.sizes import tensors_of
from ..offload.streaming import StreamedBlocks
from .internals import pins_memory
from .patchers import HostedPatcher


def to_patcher(module: nn.Module, device: torch.device | None = None) -> Any:
    """A ``ModelPatcher`` of a module: ComfyUI loads, counts and unloads its weights, as a whole.

    It is ComfyUI's static one: the one for dynamic VRAM cannot move a module back whose layers are not ComfyUI's.

    Args:
        module: on the CPU or on the device. ComfyUI moves it to the CPU when it needs the memory.
        device: where ComfyUI loads it; ComfyUI's own device if None.
    """
    devices = {
        "load_device": device or management.get_torch_device(),
        "offload_device": management.unet_offload_device(),
    }
    return comfy.model_patcher.ModelPatcher(module, **devices)


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


class HostedAdapter:
    """A CHARACTER_ADAPTER: an adapter in ComfyUI's memory, for the Sampler and for Apply alike.

    Args:
        adapter: in host memory.
        dtype: of the projector's weights on ComfyUI's device, their own if None.

    Attributes:
        adapter: the adapter, whole or folded.
        fingerprint: see :meth:`CharacterAdapter.fingerprint`.
        fusion: ``ModelPatcher`` of the projector's modules that run once a picture.
        resampler: the projector's modules that run at each timestep.
    """

    def __init__(self, adapter: CharacterAdapter, dtype: torch.dtype | None = None) -> None:
        self.adapter = adapter
        self.fingerprint = adapter.fingerprint()
        self.fusion = HostedPatcher(CharacterFusion(adapter.projector.fusion_modules()), dtype)
        self.resampler = HostedResampler(adapter.projector.resampler, dtype)
        self._attention: dict[tuple[torch.device, torch.dtype], HostedAttention] = {}

    def attention(self, device: torch.device, dtype: torch.dtype) -> HostedAttention:
        """The folded attention of all blocks, folded once for each device and dtype."""
        if (device, dtype) not in self._attention:
            self._attention[device, dtype] = HostedAttention(fold(self.adapter, device, dtype), device)
        return self._attention[device, dtype]

    def resampling(self, device: torch.device) -> AbstractContextManager[None]:
        """Context manager in which the resampler is on a device."""
        return self.resampler.on_device(device)

    def key_scales(self, query_scales: Tensor) -> list[Tensor]:
        """The scale of each block's keys, [head_dim], for FLUX's query scales, [blocks, head_dim]."""
        return [attention.key_scale(scale) for attention, scale in zip(self.adapter.attention, query_scales)]


class HostedResampler:
    """The resampler, whose weights are in pinned host memory once it has run, and on a device within a ``with`` block.

    Args:
        resampler: on the CPU.
        dtype: of its weights when it runs, their own if None.
    """

    def __init__(self, resampler: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._resampler = resampler
        self._dtype = dtype
        self._host_weights = HostWeightsCache()

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Context manager in which the resampler is on a device; ComfyUI frees memory for it if need be."""
        self._resampler.to(dtype=self._dtype)
        if management.is_device_cpu(device):
            yield
            return
        tensors = tensors_of(self._resampler)
        weights = self._host_weights.get(self._resampler, tensors, device if pins_memory() else None)
        management.free_memory(weights.size, device)
        memory = torch.empty(weights.size, dtype=torch.uint8, device=device)
        weights.copy_to(memory)
        weights.bind(memory)
        try:
            yield
        finally:
            weights.unbind()


class HostedAttention:
    """The folded attention of all blocks.

    Its weights are in pinned host memory. During a sampling all of them are on the device if they fit beside FLUX;
    otherwise each block's come while the block before it computes. A device that cannot copy while it computes keeps
    them all.

    Args:
        blocks: on the device, each made when it is asked for.
        device: where they run.
    """

    def __init__(self, blocks: Iterable[FoldedCharacterAttention], device: torch.device) -> None:
        self._blocks: list[FoldedCharacterAttention] = []
        self._streamed: StreamedBlocks | None = None
        if not (management.is_device_cuda(device) or management.is_device_xpu(device)):
            self._blocks += blocks
            return
        pinned, host_weights = pins_memory(), HostWeightsCache()
        for block in blocks:
            pinned_for = device if pinned else None
            host_weights.get(block, tensors_of(block), pinned_for)  # moves it there, before the next one is made
            self._blocks.append(block)
        self._streamed = StreamedBlocks(self._blocks, device, pinned, host_weights)

    @property
    def resident(self) -> bool:
        """Whether all weights are on the device, as far as they are there at all."""
        return self._streamed is None or self._streamed.resident

    def on_device(self, room: float) -> AbstractContextManager[None]:
        """Context manager of a sampling.

        Args:
            room: bytes on the device that neither FLUX nor its activations need.
        """
        return self._streamed.running(resident=self._streamed.size <= room) if self._streamed else nullcontext()

    def prefetch(self, i: int) -> None:
        """Have the weights of block ``i`` and of the next one come; block 0 follows the last one."""
        if self._streamed:
            self._streamed.prefetch(i)

    def load(self, i: int) -> FoldedCharacterAttention:
        """Block ``i``'s attention, on the device."""
        if self._streamed:
            self._streamed.load(i)
        return self._blocks[i]


class HostedCharacter(NamedTuple):
    """A CHARACTER: a character, and the adapter that made it."""

    character: Character
    adapter: HostedAdapter
