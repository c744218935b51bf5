"""Weights in host memory: a module's tensors side by side in one piece, which a GPU copies at once."""

from __future__ import annotations

import logging
import mmap
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .devices import current
from .sizes import GIB

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes; each tensor begins at a multiple of it, as GPUs read fastest."""
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
"""For pages that count as this process's own; those of Windows always do."""


class HostWeights:
    """Tensors side by side in one piece of host memory; each becomes a view of that piece.

    Args:
        tensors: parameters and buffers of a module.
        pinned_for: the GPU for which the piece is locked in memory, so that the GPU copies it at the link's full speed
            and in the background; None if it is not locked.
    """

    def __init__(self, tensors: Sequence[Tensor], pinned_for: torch.device | None) -> None:
        self.pinned_for = pinned_for
        self._tensors = tensors
        self._slices: list[_Slice] = []
        self.size = 0
        for tensor in tensors:
            begin, data = self.size, tensor.data
            self._slices.append(_Slice(begin, begin + data.nbytes, data.dtype, data.shape))
            self.size = begin + -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = allocate(self.size)
        if pinned_for:
            pin(self._memory, pinned_for)
        for tensor, view in zip(tensors, self._views(self._memory)):
            tensor.data = view.copy_(tensor.data)

    def copy_to(self, slot: Tensor) -> None:
        """Copy the weights into a tensor of bytes on the GPU."""
        slot[: self.size].copy_(self._memory, non_blocking=True)

    def bind(self, slot: Tensor) -> None:
        """Have the module compute with the copy in a slot."""
        for tensor, view in zip(self._tensors, self._views(slot)):
            tensor.data = view

    def unbind(self) -> None:
        """Have the module's tensors be those in host memory again."""
        self.bind(self._memory)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors, and their data still lies in this piece of memory."""
        first, last = self._memory.data_ptr(), self._memory.data_ptr() + self.size
        return list(map(id, tensors)) == list(map(id, self._tensors)) and all(
            first <= tensor.data_ptr() < last or not tensor.numel() for tensor in tensors
        )

    def _views(self, piece: Tensor) -> Iterator[Tensor]:
        for begin, end, dtype, shape in self._slices:
            yield piece[begin:end].view(dtype).view(shape)


class HostWeightsCache:
    """The host weights of an offloader's modules. Pinning takes seconds, so another plan uses them again."""

    def __init__(self) -> None:
        self._weights: WeakKeyDictionary[nn.Module, HostWeights] = WeakKeyDictionary()

    def get(self, module: nn.Module, tensors: Sequence[Tensor], pinned_for: torch.device | None) -> HostWeights:
        """The host weights of some of a module's tensors: those that hold them already, or new ones."""
        weights = self._weights.get(module)
        if weights is None or weights.pinned_for != pinned_for or not weights.holds(tensors):
            weights = self._weights[module] = HostWeights(tensors, pinned_for)
        return weights

    def forget(self, modules: Iterable[nn.Module]) -> None:
        """Let go of the host memory of modules whose weights are to be elsewhere."""
        for module in modules:
            self._weights.pop(module, None)


class _Slice(NamedTuple):
    """Where a tensor lies in a piece of memory, in bytes, and what it is there."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


def allocate(size: int) -> Tensor:
    """Bytes of host memory in pages of their own, which the system has again as soon as they are freed.

    The C library keeps freed pieces of up to 32 MB, as blocks are, for itself: gigabytes after a model is unloaded.
    """
    return torch.frombuffer(mmap.mmap(-1, size, **PRIVATE), dtype=torch.uint8) if size else torch.empty(0).byte()


def pin(memory: Tensor, device: torch.device) -> None:
    """Lock a tensor's memory where it is, for a CUDA device; a warning says if it cannot be locked.

    ``Tensor.pin_memory`` would copy it, and torch's host allocator rounds up to a power of two. CUDA's own calls act on
    the current device, on which they would take hundreds of megabytes.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or not memory.nbytes:
        return
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    with current(device):
        if int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
            logger.warning("%.2f GiB of host memory cannot be pinned: streaming is slower", memory.nbytes / GIB)
            _clear_cuda_error()
        else:
            weakref.finalize(memory.untyped_storage(), _unpin, runtime, address, device)


def _unpin(runtime: Any, address: int, device: torch.device) -> None:
    if not torch.cuda.is_initialized():  # in a forked process, which has the memory but no GPU
        return
    with current(device):
        torch.cuda.synchronize()  # the GPU may still copy from there
        if int(runtime.cudaHostUnregister(address)):
            _clear_cuda_error()


def _clear_cuda_error() -> None:
    """Run a kernel, at which torch raises the error that CUDA keeps of a failed call: here, where it is expected.

    It runs on the current device.
    """
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("the error that CUDA kept is cleared", exc_info=True)
