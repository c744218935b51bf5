"""Modules whose weights are in host memory, and on the GPU only while they compute.

Blocks stream through two slots on the GPU, each as large as the largest block. While one block computes from its slot,
the next block's weights, which lie side by side in pinned host memory, are copied into the other slot in one piece.
Only the GPU waits, for events; the host runs on. diffusers' group offloading streams all of a model's blocks or none,
copies tensor by tensor, and waits on the host at each block; ``benchmarks/RESULTS.md`` compares the two.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .devices import current
from .host_weights import HostWeightsCache
from .sizes import SLOTS, tensors_of

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def on_device(module: Module, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Module]:
    """Context manager that moves a module to a device, and restores the original tensors on exit.

    Nothing is copied back: the original tensors, memory-mapped or not, are kept in the meantime. A module that is on
    the device already stays there. Offloaded modules, see :func:`is_offloaded`, move their weights by themselves, and
    are left alone.

    Args:
        module: the module.
        device: where it is in the block.
        dtype: of its floating-point weights there, their own if None. Layer by layer, they are converted on the device.
    """
    if any(map(is_offloaded, module.modules())):
        yield module
        return
    originals = [(tensor, tensor.data) for tensor in tensors_of(module)]
    names = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in chain(owner.named_parameters(recurse=False), owner.named_buffers(recurse=False))
    ]
    try:
        yield module.to(device) if dtype is None else module.apply(partial(_move_and_convert, device, dtype))
    finally:
        for tensor, data in originals:
            tensor.data = data
        for owner, name, tensor in names:  # ``to`` replaces buffers, and parameters in inference mode
            setattr(owner, name, tensor)


def _move_and_convert(device: torch.device, dtype: torch.dtype, module: nn.Module) -> None:
    module.to(device)  # first: in one call, torch would convert on the CPU
    module.to(dtype)


def is_offloaded(module: nn.Module) -> bool:
    """Whether an :class:`OffloadedModule` runs this module."""
    return isinstance(vars(module).get("forward"), OffloadedModule)


def check_not_offloaded(module: nn.Module) -> None:
    """Raise ``RuntimeError`` if a module, or a part of it, is offloaded."""
    if any(map(is_offloaded, module.modules())):
        raise RuntimeError(
            f"this {type(module).__name__} is offloaded already, by another pipeline of the same models: let them "
            "share_character_adapter, or call disable_character_offload on the other one first"
        )


class OffloadedModule:
    """Runs a module whose weights are on the device only meanwhile, some of its blocks one after another.

    It takes the place of the module's ``forward`` until :meth:`remove`; forward hooks could not run the module again
    after it ran out of memory. A wrapper that others put around it later stays, and calls the module's own ``forward``
    through it once it is removed.

    Args:
        module: the module; its inputs are moved to the device.
        streamed: its blocks that stream, in the order in which they run; another order works, but is slower.
        device: where the module runs.
        resident: whether the weights that do not stream are on the device all the time.
        pinned: see :class:`HostWeights`.
        on_out_of_memory: called with torch's message when the device is out of memory; the module then runs again.
        host_weights: where weights in host memory are kept for the next plan.

    Raises:
        torch.OutOfMemoryError: the resident weights do not fit on the device; the module's ``forward`` is then as it
            was.
        RuntimeError: the module is offloaded already.
    """

    def __init__(
        self,
        module: nn.Module,
        streamed: Sequence[nn.Module],
        device: torch.device,
        resident: bool,
        pinned: bool,
        on_out_of_memory: Callable[[str], None],
        host_weights: HostWeightsCache | None = None,
    ) -> None:
        check_not_offloaded(module)
        host_weights = host_weights or HostWeightsCache()
        self._module = weakref.ref(module)  # no cycles: gigabytes of weights would wait for the garbage collector
        self._device = device
        self._on_out_of_memory = on_out_of_memory
        self._replaced = vars(module).get("forward")
        self._active = True
        in_blocks = set(tensors_of(*streamed))
        rest = [tensor for tensor in tensors_of(module) if tensor not in in_blocks]
        host_weights.forget(
            child for child in module.modules() if child not in streamed and (resident or child is not module)
        )
        if resident:
            for tensor in rest:
                tensor.data = tensor.data.to(device)
        self._rest = None if resident else host_weights.get(module, rest, device if pinned else None)
        self._blocks = StreamedBlocks(streamed, device, pinned, host_weights)
        self._handles = self._blocks.register_hooks(streamed)
        self.__signature__ = inspect.signature(module.forward)
        module.forward = self

    def remove(self) -> None:
        """Stop offloading; the weights stay where they are between the module's runs."""
        for handle in self._handles:
            handle.remove()
        self._active = False
        module = self._module()
        if module and vars(module).get("forward") is self:  # otherwise another wrapper calls this one
            del module.forward
            if self._replaced:
                module.forward = self._replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        forward = self._replaced or partial(type(module).forward, module)
        if not self._active:
            return forward(*args, **kwargs)
        try:
            args, kwargs = send_to_device((args, kwargs), self._device)
            with self._onloaded(), self._blocks.running():
                return forward(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._on_out_of_memory(reason)  # here, since the error's traceback would keep the failed run's activations
        return module.forward(*args, **kwargs)

    @contextmanager
    def _onloaded(self) -> Iterator[None]:
        """Context manager in which the weights that do not stream are on the device."""
        if self._rest is None:
            yield
            return
        weights = torch.empty(self._rest.size, dtype=torch.uint8, device=self._device)
        self._rest.copy_to(weights)
        self._rest.bind(weights)
        try:
            yield
        finally:
            self._rest.unbind()


class StreamedBlocks:
    """Blocks whose weights are on the device one after another, see the module's text.

    Within :meth:`running`, either the hooks of :meth:`register_hooks` prefetch a block as soon as a slot is free, or
    the caller does so by :meth:`prefetch` and calls :meth:`load` before the block computes.

    Args:
        blocks: the blocks, in the order in which they run; another order works, but is slower.
        device: where they run; one with streams and events, as torch calls them.
        pinned: see :class:`HostWeights`.
        host_weights: where weights in host memory are kept for the next plan.

    Attributes:
        size: bytes of all blocks on the device.
        resident: whether all blocks are there now.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        pinned: bool,
        host_weights: HostWeightsCache | None = None,
    ) -> None:
        host_weights = host_weights or HostWeightsCache()
        self._device = device
        pinned_for = device if pinned else None
        self._weights = [host_weights.get(block, tensors_of(block), pinned_for) for block in blocks]
        self._largest = max((weights.size for weights in self._weights), default=0)
        self.size = len(blocks) * self._largest
        self._slots: list[Tensor] = []
        self._in_slot: list[int | None] = []
        self._oldest = 0
        self.resident = False
        if not blocks:  # without blocks, the device needs no streams
            return
        self._backend = torch.get_device_module(device)
        self._copying = self._backend.Stream(device)
        self._filled = [self._backend.Event() for _ in blocks]

    def register_hooks(self, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Have each block's weights on the device while its ``forward`` runs; the handles remove the hooks.

        Args:
            blocks: those that were passed to the constructor. They are not kept: no cycles.
        """
        handles: list[RemovableHandle] = []
        for i, block in enumerate(blocks):
            handles += [
                block.register_forward_pre_hook(partial(self._enter, i)),
                block.register_forward_hook(partial(self._leave, i), always_call=True),
            ]
        return handles

    @contextmanager
    def running(self, resident: bool = False) -> Iterator[None]:
        """Context manager that allocates the slots, and starts to copy the first blocks into them.

        Args:
            resident: all blocks have a slot of their own, and stay in it, if the device has the memory.
        """
        if not self._weights:
            yield
            return
        self._slots = self._allocate_all() if resident else []
        resident = bool(self._slots)
        self._slots = self._slots or [self._allocate(self._largest) for _ in range(SLOTS)]
        self._in_slot = [None] * len(self._slots)
        self._oldest = 0
        try:
            for i in range(min(len(self._slots), len(self._weights))):
                self._fill(i)
            if resident:
                for i in range(len(self._weights)):
                    self.load(i)
            self.resident = resident
            yield
        finally:
            self.resident = False
            self._backend.current_stream(self._device).wait_stream(self._copying)
            for weights in self._weights:
                weights.unbind()
            self._slots = []

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _allocate_all(self) -> list[Tensor]:
        """A slot for each block, in one piece, since allocations take time; none if the device lacks the memory."""
        try:
            return list(self._allocate(self.size).split(self._largest))
        except torch.OutOfMemoryError:
            return []

    def prefetch(self, i: int) -> None:
        """Have the weights of block ``i`` and of the next one come; block 0 follows the last one."""
        if not self.resident:
            self._prefetch(i)
            self._prefetch((i + 1) % len(self._weights))

    def load(self, i: int) -> None:
        """Have block ``i`` compute on the device, until others are prefetched."""
        if not self.resident:
            self._enter(i)

    @torch.compiler.disable
    def _prefetch(self, i: int) -> None:
        if i not in self._in_slot:
            self._fill(i)

    @torch.compiler.disable
    def _enter(self, i: int, *_: Any) -> None:
        self._prefetch(i)
        slot = self._in_slot.index(i)
        self._filled[slot].wait(self._backend.current_stream(self._device))
        self._weights[i].bind(self._slots[slot])

    def _leave(self, i: int, *_: Any) -> None:
        self._weights[i].unbind()
        if i + SLOTS < len(self._weights):
            self._fill(i + SLOTS)

    def _fill(self, i: int) -> None:
        """Copy a block's weights into the slot filled longest ago, once the GPU has computed with what is in it.

        The block before this one keeps its slot: it may be about to compute.
        """
        slot, count = self._oldest, len(self._slots)
        if self._in_slot[slot] == (i - 1) % len(self._weights):
            slot = (slot + 1) % count
        self._oldest = (slot + 1) % count
        self._copying.wait_stream(self._backend.current_stream(self._device))
        with current(self._device), self._backend.stream(self._copying):
            self._weights[i].copy_to(self._slots[slot])
            self._filled[slot].record(self._copying)
        self._in_slot[slot] = i
