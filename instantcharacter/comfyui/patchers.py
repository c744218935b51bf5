"""ComfyUI's ``ModelPatcher`` for modules whose weights stay in host memory while a copy is on the device."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import torch
from torch import nn

from ..offload.sizes import tensors_of
from ..offload.streaming import on_device


class HostedPatcher(comfy.model_patcher.ModelPatcher):
    """A ``ModelPatcher`` that loads and unloads a module as a whole, and never copies it back.

    ComfyUI's own copies weights back to host memory when it unloads a module: a memory-mapped file of gigabytes is then
    in memory for as long as the module lives. Here the module has its original tensors again.

    Args:
        module: in host memory; not to be patched.
        dtype: of its weights on the device, their own if None.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__(
            module,
            load_device=management.get_torch_device(),
            offload_device=torch.device("cpu"),
            size=sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors_of(module)),
        )
        self._dtype = dtype
        self._loaded = ExitStack()

    def load(self, device_to: Any = None, *args: Any, **kwargs: Any) -> None:
        """Move the module to the device, in its dtype there."""
        self._restore()
        self._loaded.enter_context(on_device(self.model, device_to, self._dtype))
        super().load(device_to, *args, **kwargs)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
        """Restore the module's tensors in host memory; ComfyUI then finds nothing to move."""
        if unpatch_weights:
            self._restore()
        super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, *_: Any, **__: Any) -> int:
        """Bytes that were freed: none, so that ComfyUI unloads the module whole."""
        return 0

    def _restore(self) -> None:
        self._loaded.close()
