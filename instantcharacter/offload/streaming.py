"""Weights that live in host memory, and are on the GPU only while something computes with them.

Blocks stream: two slots lie on the GPU, each as large as the largest block. While one block computes from its slot, the
next one's weights, which lie side by side in pinned host memory, are copied into the other in one piece. Only the GPU
waits, for events; the host runs on. diffusers' group offloading streams all of a model's blocks or none, copies weight
by weight, and waits on the host at each block; what that costs is in ``benchmarks/RESULTS.md``.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)

SLOTS = 2
ALIGNMENT = 256
"""Bytes; what GPUs read fastest."""


@contextmanager
def on_device(module: Module, device: torch.device) -> Iterator[Module]:
    """A module on a device for as long as the block lasts; afterwards its weights are where they were.

    Nothing is copied back: the weights at home, memory-mapped or not, are kept while the module is away. On the
    device already, it simply stays; and so does what comes to the device by itself, as a :class:`OffloadedModule`.
    """
    if any(part in OffloadedModule.visiting for part in module.modules()):
        yield module
        return
    home: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (table, name, tensor, tensor.data)
        for owner in module.modules()
        for table in (vars(owner)["_parameters"], vars(owner)["_buffers"])
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        yield module.to(device)
    finally:
        for table, name, tensor, data in home:
            tensor.data = data
            table[name] = tensor


class OffloadedModule:
    """A module whose weights are on the device only while it runs, some of its blocks one after another.

    The module's ``forward`` is replaced until :meth:`remove`.

    Args:
        module: what runs; its inputs are brought to the device.
        streamed: its blocks that stream, in the order in which they run; another order works, and is slower.
        device: where it runs.
        stays: whether all that does not stream is on the device for good.
        pinned: see :class:`HostWeights`.
        on_out_of_memory: called with torch's message when the device is out of memory; the module then runs again.

    Raises:
        torch.OutOfMemoryError: what stays does not fit on the device; the module is then left alone.
    """

    visiting: ClassVar[WeakSet[nn.Module]] = WeakSet()

    def __init__(
        self,
        module: nn.Module,
        streamed: Sequence[nn.Module],
        device: torch.device,
        stays: bool,
        pinned: bool,
        on_out_of_memory: Callable[[str], None],
    ) -> None:
        self._module = weakref.ref(module)  # no cycles: gigabytes of weights would wait for the garbage collector
        self._device = device
        self._make_room = on_out_of_memory
        self._before = vars(module).get("forward")
        in_blocks = set(chain.from_iterable(map(_tensors, streamed)))
        rest = [tensor for tensor in _tensors(module) if tensor not in in_blocks]
        HostWeights.forget(part for part in module.modules() if part not in streamed and (stays or part is not module))
        if stays:
            for tensor in rest:
                tensor.data = tensor.data.to(device)
        self._rest = None if stays else HostWeights.of(module, rest, pinned)
        self._blocks = StreamedBlocks(streamed, device, pinned)
        forward = partial(self._run)
        forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
        module.forward = forward
        OffloadedModule.visiting.add(module)

    def remove(self) -> None:
        """Leave the module alone, its weights where they are between its runs."""
        self._blocks.remove()
        if module := self._module():
            del module.forward
            if self._before:
                module.forward = self._before
            OffloadedModule.visiting.discard(module)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self._module()
        forward = self._before or partial(type(module).forward, module)
        try:
            args, kwargs = send_to_device((args, kwargs), self._device)
            with self._present(), self._blocks.running():
                return forward(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        self._make_room(reason)  # here, since an error that is handled keeps alive what was computed
        return module.forward(*args, **kwargs)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Within this block, what does not stream is on the device."""
        if self._rest is None:
            yield
            return
        visit = torch.empty(self._rest.size, dtype=torch.uint8, device=self._device)
        self._rest.copy_to(visit)
        self._rest.bind(visit)
        try:
            yield
        finally:
            self._rest.go_home()


class StreamedBlocks:
    """Blocks whose weights are on the device one after another, see the module's text."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, pinned: bool) -> None:
        self._device = device
        self._weights = [HostWeights.of(block, list(_tensors(block)), pinned) for block in blocks]
        self._slots: list[Tensor] = []
        self._holds: list[int | None] = []
        self._handles: list[RemovableHandle] = []
        if not blocks:  # a device without streams can do without
            return
        self._backend = torch.get_device_module(device)
        self._copying = self._backend.Stream(device)
        self._filled = [self._backend.Event() for _ in range(SLOTS)]
        for i, block in enumerate(blocks):
            self._handles += [
                block.register_forward_pre_hook(partial(self._enter, i)),
                block.register_forward_hook(partial(self._leave, i), always_call=True),
            ]

    def remove(self) -> None:
        """Leave the blocks alone, their weights in host memory."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within this block, the slots are there, and the first blocks on their way."""
        if not self._weights:
            yield
            return
        largest = max(weights.size for weights in self._weights)
        self._slots = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(SLOTS)]
        self._holds = [None] * SLOTS
        try:
            for i in range(min(SLOTS, len(self._weights))):
                self._fill(i)
            yield
        finally:
            self._backend.current_stream(self._device).wait_stream(self._copying)
            self._slots = []

    def _enter(self, i: int, *_: Any) -> None:
        if self._holds[i % SLOTS] != i:
            self._fill(i)
        self._filled[i % SLOTS].wait(self._backend.current_stream(self._device))
        self._weights[i].bind(self._slots[i % SLOTS])

    def _leave(self, i: int, *_: Any) -> None:
        self._weights[i].go_home()
        if i + SLOTS < len(self._weights):
            self._fill(i + SLOTS)

    def _fill(self, i: int) -> None:
        """Copy a block's weights into its slot, as soon as what was computed from there is done."""
        self._copying.wait_stream(self._backend.current_stream(self._device))
        with self._backend.stream(self._copying):
            self._weights[i].copy_to(self._slots[i % SLOTS])
            self._filled[i % SLOTS].record(self._copying)
        self._holds[i % SLOTS] = i


class HostWeights:
    """Tensors side by side in one piece of host memory; each becomes a view of that piece.

    Args:
        tensors: of a module.
        pinned: lock the piece in memory, so that a GPU copies it at the link's full speed and in the background.
    """

    _known: ClassVar[WeakKeyDictionary[nn.Module, HostWeights]] = WeakKeyDictionary()

    def __init__(self, tensors: Sequence[Tensor], pinned: bool) -> None:
        self.pinned = pinned
        self._tensors = tensors
        self._places: list[tuple[int, int, torch.dtype, torch.Size]] = []
        self.size = 0
        for tensor in tensors:
            begin, data = self.size, tensor.data
            self._places.append((begin, begin + data.nbytes, data.dtype, data.shape))
            self.size = begin + -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        self._home = torch.empty(self.size, dtype=torch.uint8)
        if pinned:
            pin(self._home)
        for tensor, view in zip(tensors, self._views(self._home)):
            tensor.data = view.copy_(tensor.data)

    @classmethod
    def of(cls, module: nn.Module, tensors: Sequence[Tensor], pinned: bool) -> HostWeights:
        """Those that the module has already, since pinning takes seconds, or new ones."""
        known = cls._known.get(module)
        if known is None or known.pinned != pinned or not known._are_home(tensors):
            known = cls._known[module] = cls(tensors, pinned)
        return known

    @classmethod
    def forget(cls, modules: Iterable[nn.Module]) -> None:
        """Let go of the host memory of modules whose weights are to be elsewhere."""
        for module in modules:
            cls._known.pop(module, None)

    def copy_to(self, slot: Tensor) -> None:
        """Copy the weights into a tensor of bytes on the GPU."""
        slot[: self.size].copy_(self._home, non_blocking=True)

    def bind(self, slot: Tensor) -> None:
        """Have the module compute with the copy there."""
        for tensor, view in zip(self._tensors, self._views(slot)):
            tensor.data = view

    def go_home(self) -> None:
        """Have the module's weights be those in host memory again."""
        self.bind(self._home)

    def _views(self, piece: Tensor) -> Iterator[Tensor]:
        for begin, end, dtype, shape in self._places:
            yield piece[begin:end].view(dtype).view(shape)

    def _are_home(self, tensors: Sequence[Tensor]) -> bool:
        first, last = self._home.data_ptr(), self._home.data_ptr() + self.size
        return list(map(id, tensors)) == list(map(id, self._tensors)) and all(
            first <= tensor.data_ptr() < last or not tensor.numel() for tensor in tensors
        )


def pin(memory: Tensor) -> None:
    """Lock a tensor's memory where it is: torch's own pinned memory is a copy, and takes up a power of two."""
    if not torch.cuda.is_available() or not memory.nbytes:
        return
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
        logger.warning("%.2f GiB of host memory cannot be pinned: streaming is slower", memory.nbytes / 2**30)
        _forget_cuda_error()
    else:
        weakref.finalize(memory.untyped_storage(), _unpin, runtime, address)


def _unpin(runtime: Any, address: int) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # the GPU may still copy from there
    if int(runtime.cudaHostUnregister(address)):
        _forget_cuda_error()


def _forget_cuda_error() -> None:
    """CUDA keeps the error of a failed call, and torch raises it at the next kernel: here, where it is expected."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("CUDA's error is taken", exc_info=True)


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    """A module's parameters and buffers, each once."""
    return dict.fromkeys(chain(module.parameters(), module.buffers()))
