"""What ComfyUI does for InstantCharacter: it holds the weights, and is told how far the work has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from ..character.tokens import TokenCache
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..model.config import AdapterConfig
from ..model.folding import fold
from ..model.projector import CharacterProjector


def hosted(module: nn.Module, in_parts: bool = False) -> Any:
    """A module as a ``ModelPatcher``: ComfyUI loads, counts and frees its weights.

    Args:
        module: on the CPU, or on the device already: its weights then leave when ComfyUI needs the room.
        in_parts: for a module of ComfyUI's layers, which may come and go layer by layer. Any other comes and goes
            whole, by ComfyUI's static patcher: the one for dynamic VRAM keeps no way back for it.
    """
    kind = comfy.model_patcher.CoreModelPatcher if in_parts else comfy.model_patcher.ModelPatcher
    return kind(module, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())


def load(patcher: Any, working: int = 0) -> Any:
    """The module of a ``ModelPatcher``, on its device until ComfyUI needs the room, and bytes free to work in.

    It is loaded whole: modules that are not made of ComfyUI's layers cannot be loaded in part.
    """
    management.load_models_gpu([patcher], memory_required=working, force_full_load=True)
    patcher.partially_load(patcher.load_device, 1e32)  # under --novram ComfyUI loads a part, whatever is asked
    return patcher.model


def release(patcher: Any) -> None:
    """Have ComfyUI take a ``ModelPatcher`` off its device now."""
    others = [model for model in management.current_loaded_models if model.model is not patcher]
    management.free_memory(1e30, patcher.load_device, keep_loaded=others)


def progress() -> Callable[[int, int], None]:
    """The running node's progress bar, told of how much is done and of how much there is; it cancels where users do."""
    bar = comfy.utils.ProgressBar(1)

    def tell(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return tell


def say(node: Any, text: str) -> None:
    """Show a text on the running node, of this class, if it runs in a page's graph."""
    if node.hidden and node.hidden.unique_id:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def weight_dtype() -> torch.dtype:
    """The type for weights that run on ComfyUI's device: half precision where it has it."""
    device = management.get_torch_device()
    if management.is_device_cpu(device):
        return torch.float32
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float16


class CharacterFusion(nn.ModuleList):
    """The projector's timestep-free half, under a name that says so in ComfyUI's log."""


class CharacterBlocks(nn.ModuleList):
    """Character attention of every FLUX block, as above."""


class HostedAdapter:
    """An adapter in ComfyUI: a CHARACTER_ADAPTER.

    Attributes:
        adapter: the weights as they came; the parts below share them.
        fingerprint: see :meth:`CharacterAdapter.fingerprint`.
        fusion: ``ModelPatcher`` of the projector's timestep-free half.
        resampler: ``ModelPatcher`` of its other half.
        tokens: the tokens of each character's last schedule.
    """

    def __init__(self, adapter: CharacterAdapter) -> None:
        self.adapter = adapter
        self.fingerprint = adapter.fingerprint()
        projector = adapter.projector
        self.fusion = hosted(CharacterFusion(projector.fusion_modules()))
        self.resampler = hosted(projector.resampler)
        self.tokens = TokenCache(projector)
        self._attention: dict[torch.dtype, Any] = {}

    @property
    def config(self) -> AdapterConfig:
        return self.adapter.config

    @property
    def projector(self) -> CharacterProjector:
        return self.adapter.projector

    def attention(self, dtype: torch.dtype) -> Any:
        """``ModelPatcher`` of the folded attention of every block, made once for a type of weights."""
        if dtype not in self._attention:
            linear, device = comfy.ops.disable_weight_init.Linear, management.get_torch_device()
            blocks = fold(self.adapter, torch.device("cpu"), dtype, linear, compute_on=device)
            self._attention[dtype] = hosted(CharacterBlocks(blocks), in_parts=True)
        return self._attention[dtype]

    @contextmanager
    def resampling(self) -> Iterator[None]:
        """Within this block the resampler is on the device, and no longer."""
        load(self.resampler)
        try:
            yield
        finally:
            release(self.resampler)

    def key_scales(self, query_scales: Tensor) -> list[Tensor]:
        """The scale on each block's keys, [head_dim], for FLUX's query scales, [blocks, head_dim]."""
        return [attention.key_scale(scale) for attention, scale in zip(self.adapter.attention, query_scales)]


class HostedCharacter(NamedTuple):
    """A CHARACTER: who, and the adapter that made and draws it."""

    character: Character
    adapter: HostedAdapter
