"""A CUDA device that is not there, for tests on a machine without one.

Every tensor lives in host memory and is computed there, with real values; where it would be is written on its storage,
so views, ``.data`` and modules' weights carry it along. Inside :class:`PretendedCuda`

* ``tensor.device``, ``.to``, ``.cuda``, ``device="cuda"`` and ``torch.cuda`` speak of the device as if it were there;
* an operation on tensors of different devices raises, as on a real one (a number in a 0-d CPU tensor may join in
  element-wise operations and indices may come from the host: nothing else);
* streams and events are followed with vector clocks: a read before its copy is known to be done, a slot that is
  written while it may still be read, memory that is freed while another stream may still use it, are put in ``races``;
* ``torch.cuda.memory_allocated`` counts, and a ``capacity`` makes ``torch.OutOfMemoryError``;
* ``waits`` has the operations at which the host waited for the GPU, to read from it;
* without ``pins``, host memory cannot be pinned, and the next kernel raises the error of that, as CUDA's does.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from typing import Any
from unittest import mock

import torch
import torch._tensor
import torch.functional
import torch.nn.functional
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
RealGenerator, RealTensor = torch.Generator, torch.Tensor
ACROSS = {"copy_", "_to_copy", "_copy_from", "set_", "is_set_to", "_has_compatible_shallow_copy_type", "resize_",
          "is_same_size", "_foreach_copy_"}  # fmt: skip
INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
ELEMENT_WISE = {"_foreach_mul_", "fill_", "masked_fill", "masked_fill_"}


class Clock:
    """A stream's, or the host's: what it knows to be done."""

    ids = itertools.count()

    def __init__(self, name: str) -> None:
        self.id, self.name, self.time = next(Clock.ids), name, 0
        self.seen: dict[int, int] = {}

    def now(self) -> dict[int, int]:
        return {**self.seen, self.id: self.time}

    def learn(self, seen: dict[int, int]) -> None:
        for stream, time in seen.items():
            if time > self.seen.get(stream, 0):
                self.seen[stream] = time

    def knows(self, stream: int, time: int) -> bool:
        return stream == self.id or self.seen.get(stream, 0) >= time


class Place:
    """Where a storage is, and who touched it when."""

    def __init__(self, card: PretendedCuda, device: torch.device, size: int, stream: Clock) -> None:
        self.card, self.device, self.size, self.stream = card, device, size, stream
        self.written: tuple[Clock, int, str] | None = None
        self.read: dict[int, tuple[Clock, int, str]] = {}
        self.recorded: set[int] = set()
        self.pinned = False
        if device.type == "cuda":
            card.allocate(size)

    def __del__(self) -> None:
        if self.device.type == "cuda":
            self.card.allocated -= self.size
        for clock, time, what in [*([self.written] if self.written else []), *self.read.values()]:
            owner = self.stream if self.device.type == "cuda" else self.card.host
            if clock.id not in self.recorded and not owner.knows(clock.id, time):
                self.card.races.append(f"{self.size} bytes freed while {clock.name} may still be at {what}")


class Stream(Clock):
    def __init__(self, device: Any = None, priority: int = 0, name: str = "", **_: Any) -> None:
        super().__init__(name or f"stream {next(PretendedCuda.numbers)}")
        self.device = CUDA
        PretendedCuda.current.streams.append(self)

    def __eq__(self, other: Any) -> bool:
        return self is other

    def __hash__(self) -> int:
        return self.id

    def wait_stream(self, other: Stream) -> None:
        self.learn(other.now())

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        PretendedCuda.current.host.learn(self.now())

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.at = (stream or PretendedCuda.current.stream).now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or PretendedCuda.current.stream).learn(self.at)

    def synchronize(self) -> None:
        PretendedCuda.current.host.learn(self.at)

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Generator(RealGenerator):
    """One of any device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls)
        made.where = PretendedCuda.normal(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.where


class _Operations(TorchDispatchMode):
    def __init__(self, card: PretendedCuda) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.card.operate(func, args, kwargs or {})


class PretendedCuda(TorchFunctionMode):
    """See the module's text.

    Args:
        capacity: bytes that it has.
    """

    current: PretendedCuda
    numbers = itertools.count(1)

    def __init__(self, capacity: int = 80 << 30) -> None:
        super().__init__()
        self.capacity, self.allocated, self.peak = capacity, 0, 0
        self.races: list[str] = []
        self.waits: list[str] = []
        self.registered: dict[int, int] = {}
        self.pins = True
        self.error = ""
        self.host = Clock("the host")
        self.streams: list[Stream] = []
        PretendedCuda.current = self
        self.default = self.stream = Stream(name="the default stream")
        self._operations = _Operations(self)

    # What is where

    @staticmethod
    def normal(device: Any) -> torch.device:
        if isinstance(device, int):
            return CUDA
        device = torch.device(device)
        return CUDA if device.type == "cuda" else device

    def place(self, tensor: Any) -> Place | None:
        if RealTensor.device.__get__(tensor).type != "cpu" or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        place = getattr(storage, "_place", None)
        if place is None or place.card is not self:
            place = storage._place = Place(self, CPU, storage.nbytes(), self.stream)
        return place

    def where(self, tensor: Any) -> torch.device:
        with torch._C.DisableTorchFunction():
            place = self.place(tensor)
            return RealTensor.device.__get__(tensor) if place is None else place.device

    def put(self, made: Any, device: torch.device) -> Any:
        """What was made anew, said to be on a device."""
        with torch._C.DisableTorchFunction():
            for tensor in pytree.tree_leaves(made):
                if isinstance(tensor, RealTensor) and (place := self.place(tensor)) and place.device != device:
                    storage = tensor.untyped_storage()
                    place.written, place.read = None, {}
                    place = storage._place = Place(self, device, storage.nbytes(), self.stream)
                    self.touch(place, "made", True)
        return made

    def raise_error(self) -> None:
        """As torch does at the next kernel, whatever call failed."""
        error, self.error = self.error, ""
        if error:
            raise RuntimeError(error)

    def allocate(self, size: int) -> None:
        if self.allocated + size > self.capacity:
            self.allocated += size  # __del__ takes it off again
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended)")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    # Operations

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, RealTensor)]
        device = self.common(func, tensors)
        if device == CUDA:
            self.raise_error()
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and device == CUDA:
            self.wait(name)
        written = {
            id(x)
            for argument, value in itertools.chain(zip(func._schema.arguments, args))
            if argument.alias_info and argument.alias_info.is_write
            for x in pytree.tree_leaves(value)
        }
        if name == "copy_":
            self.transfer(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        elif not func.is_view and name not in ("set_", "detach", "alias", "lift_fresh"):
            for x in tensors:
                if place := self.place(x):
                    self.touch(place, name, id(x) in written)
        for x in pytree.tree_leaves(out):
            if isinstance(x, RealTensor) and RealTensor.device.__get__(x).type == "cpu":
                storage = x.untyped_storage()
                known = getattr(storage, "_place", None)
                if known is None or known.card is not self:
                    storage._place = Place(self, device, storage.nbytes(), self.stream)
                    self.touch(storage._place, name, True)
        return out

    def common(self, func: Any, tensors: list[Any]) -> torch.device:
        """The device that an operation runs on."""
        locations = [(x, self.where(x)) for x in tensors]
        devices = {device for _, device in locations if device.type != "meta"}
        if len(devices) < 2:
            return devices.pop() if devices else CPU
        name = func._schema.name.removeprefix("aten::")
        strangers = [x for x, device in locations if device == CPU]
        if name in ACROSS:
            return locations[0][1]
        element_wise = torch.Tag.pointwise in func.tags or name in ELEMENT_WISE
        if element_wise and all(x.ndim == 0 for x in strangers):
            return CUDA
        if name in INDICES and locations[0][1] == CUDA:
            return CUDA
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got tensors on {sorted(map(str, devices))} "
            f"in {name} of {[tuple(x.shape) for x in tensors]} (pretended)"
        )

    def touch(self, place: Place, what: str, write: bool, clock: Clock | None = None) -> None:
        clock = clock or (self.stream if place.device == CUDA else self.host)
        if clock is not self.host:
            clock.learn(self.host.now())  # it was launched after all that the host has waited for
        clock.time += 1
        against = [place.written, *(place.read.values() if write else ())]
        for other in filter(None, against):
            if not clock.knows(other[0].id, other[1]):
                self.races.append(
                    f"{clock.name} {'writes' if write else 'reads'} {place.size} bytes in {what} while "
                    f"{other[0].name} may still be at {other[2]}"
                )
        if write:
            place.written, place.read = (clock, clock.time, what), {}
        else:
            place.read[clock.id] = (clock, clock.time, what)

    def transfer(self, to: Any, source: Any, non_blocking: bool) -> None:
        """Between tensors: only from and to pinned memory does the host not wait."""
        into, out_of = self.place(to), self.place(source)
        if not into or not out_of or into is out_of:
            return
        if CUDA not in (into.device, out_of.device):
            self.touch(out_of, "copy", False)
            self.touch(into, "copy", True)
            return
        pinned = all(place.device == CUDA or self.is_pinned(place, x) for place, x in ((into, to), (out_of, source)))
        waits = into.device != out_of.device and not (non_blocking and pinned)
        if waits:
            self.touch(out_of, "copy", False, None)
            if into.device == CPU:
                self.wait("copy")
            self.touch(into, "copy", True, None)
            if into.device == CUDA:  # the memory is free to change at once
                return
        else:
            self.touch(out_of, "copy", False, self.stream)
            self.touch(into, "copy", True, self.stream)

    def wait(self, what: str) -> None:
        """The host waits for all that the current stream has to do."""
        self.host.learn(self.stream.now())
        self.waits.append(what)

    def is_pinned(self, place: Place, tensor: Any) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return place.pinned or any(a <= address < a + size for a, size in self.registered.items())

    # What torch is asked

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if asked := _ASKED.get(func):
            return asked(self, *args, **kwargs)
        device = kwargs.get("device")
        generator = kwargs.get("generator")
        if isinstance(generator, Generator):
            here = self.normal(device) if device is not None else None
            here = here or (self.where(args[0]) if args and isinstance(args[0], RealTensor) else CPU)
            if here.type != generator.device.type:
                raise RuntimeError(f"Expected a '{here.type}' device type for generator but found '{generator.device}'")
        if device is not None and not isinstance(device, torch.device):
            device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device is None or device.type == "meta":
            return func(*args, **kwargs)
        data = args[0] if args else None
        if func in (torch.as_tensor, torch.asarray) and isinstance(data, RealTensor):
            return _to(self, data, self.normal(device), kwargs.get("dtype"))
        if self.normal(device) == CUDA:
            self.raise_error()
        out = func(*args, **{**kwargs, "device": CPU})
        return self.put(out, self.normal(device))

    def __enter__(self) -> PretendedCuda:
        self._stack = contextlib.ExitStack()
        for target, name, value in _patches(self):
            if hasattr(target, name):
                self._stack.enter_context(mock.patch.object(target, name, value))
        self._stack.enter_context(self._operations)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        self._stack.close()


def _to(card: PretendedCuda, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], RealTensor):
        device, dtype, non_blocking, form = card.where(args[0]), args[0].dtype, any(args[1:2]), None
    else:
        if len(args) > 2 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
            copy, args = args[-1], args[:-1]
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*args, **kwargs)
    non_blocking = bool(non_blocking or kwargs.get("non_blocking"))
    here = card.where(tensor)
    there = here if device is None else card.normal(device)
    if there.type == "meta" or here.type == "meta":
        if there.type == here.type:
            return tensor.to(dtype=dtype or tensor.dtype, copy=copy)
        return tensor.to(device=there, dtype=dtype)
    if there == here:
        more = {} if form is None else {"memory_format": form}
        return tensor.to(dtype=dtype or tensor.dtype, copy=copy, **more)
    with _disable_current_modes():  # the copy takes no memory where it comes from
        made = tensor.to(dtype=dtype or tensor.dtype, copy=True)
    card.put(made, there)
    with torch._C.DisableTorchFunction():
        card.transfer(made, tensor, non_blocking)
    return made


def _numpy(card: PretendedCuda, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    if card.where(tensor) == CUDA:
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() first (pretended)")
    place = card.place(tensor)
    if place:
        card.touch(place, "numpy", False)
    return tensor.numpy(*args, **kwargs)


def _set_data(card: PretendedCuda, tensor: Any, data: Any) -> None:
    RealTensor.data.__set__(tensor, data)


def _tolist(card: PretendedCuda, tensor: Any) -> Any:
    if card.where(tensor) == CUDA:
        card.wait("tolist")
    elif place := card.place(tensor):
        card.touch(place, "tolist", False)
    return tensor.tolist()


def _pin(card: PretendedCuda, tensor: Any, *_: Any, **__: Any) -> Any:
    if card.where(tensor) == CUDA:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned (pretended)")
    made = tensor.clone()
    card.place(made).pinned = True
    return made


def _record(card: PretendedCuda, tensor: Any, stream: Stream) -> None:
    card.place(tensor).recorded.add(stream.id)


_ASKED: dict[Any, Any] = {
    RealTensor.device.__get__: lambda card, x: card.where(x),
    RealTensor.is_cuda.__get__: lambda card, x: card.where(x).type == "cuda",
    RealTensor.is_cpu.__get__: lambda card, x: card.where(x).type == "cpu",
    RealTensor.get_device: lambda card, x: 0 if card.where(x) == CUDA else -1,
    RealTensor.to: _to,
    RealTensor.cpu: lambda card, x, *_, **__: _to(card, x, CPU),
    RealTensor.cuda: lambda card, x, device=None, non_blocking=False, **_: _to(
        card, x, CUDA, non_blocking=non_blocking
    ),
    RealTensor.type_as: lambda card, x, other: _to(card, x, other),
    RealTensor.numpy: _numpy,
    RealTensor.tolist: _tolist,
    RealTensor.pin_memory: _pin,
    RealTensor.is_pinned: lambda card, x, *_, **__: (p := card.place(x)) is not None and card.is_pinned(p, x),
    RealTensor.record_stream: _record,
}


class _Resumed:
    """The mode again, its patches being there."""

    def __init__(self, card: PretendedCuda) -> None:
        self._card = card

    def __enter__(self) -> None:
        TorchFunctionMode.__enter__(self._card)

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self._card, *error)


class _Runtime:
    """What ``torch.cuda.cudart()`` gives."""

    def __init__(self, card: PretendedCuda) -> None:
        self._card = card

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if not self._card.pins:
            self._card.error = "CUDA error: out of memory (pretended: of a call before)"
            return 2  # cudaErrorMemoryAllocation
        if any(address < a + s and a < address + size for a, s in self._card.registered.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self._card.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self._card.registered.pop(address, None) else 713


def _patches(card: PretendedCuda) -> list[tuple[Any, str, Any]]:
    @contextlib.contextmanager
    def stream(stream_or_none: Stream | None) -> Any:
        before, card.stream = card.stream, stream_or_none or card.stream
        try:
            yield
        finally:
            card.stream = before

    def synchronize(*_: Any) -> None:
        for each in card.streams:
            card.host.learn(each.now())

    def has_not(*_: Any, **__: Any) -> bool:
        return False

    class Device:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: Any) -> None: ...

    properties = types.SimpleNamespace(
        name="pretended", major=9, minor=0, total_memory=card.capacity, multi_processor_count=132, gcnArchName=""
    )
    stats = {"reserved_bytes.all.current": 0, "active_bytes.all.current": 0, "allocated_bytes.all.current": 0}
    real_autocast = torch.autocast

    class Autocast(real_autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    checkpointing = torch.utils.checkpoint._checkpoint_without_reentrant_generator

    def checkpointed(fn: Any, *args: Any, **kwargs: Any) -> Any:
        def again(*positional: Any, **named: Any) -> Any:  # the backward pass runs it without the mode
            on = card in torch.overrides._get_current_function_mode_stack()
            with contextlib.nullcontext() if on else _Resumed(card):
                return fn(*positional, **named)

        return checkpointing(again, *args, **kwargs)

    cuda = torch.cuda
    found: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", checkpointed),
        (torch, "autocast", Autocast),
        (torch.amp, "autocast", Autocast),
        (torch.amp.autocast_mode, "autocast", Autocast),
        *((cuda, name, value) for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
            "Stream": Stream, "Event": Event, "stream": stream, "StreamContext": stream,
            "current_stream": lambda *_: card.stream, "default_stream": lambda *_: card.default,
            "set_stream": lambda s: setattr(card, "stream", s), "synchronize": synchronize,
            "mem_get_info": lambda *_: (card.capacity - card.allocated, card.capacity),
            "memory_allocated": lambda *_: card.allocated, "memory_reserved": lambda *_: card.allocated,
            "max_memory_allocated": lambda *_: card.peak, "max_memory_reserved": lambda *_: card.peak,
            "reset_peak_memory_stats": lambda *_: setattr(card, "peak", card.allocated),
            "memory_stats": lambda *_: stats, "empty_cache": lambda: None, "ipc_collect": lambda: None,
            "get_device_name": lambda *_: "pretended", "get_device_properties": lambda *_: properties,
            "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
            "set_device": lambda *_: None, "device": Device, "cudart": lambda: _Runtime(card),
            "manual_seed": lambda *_: None, "manual_seed_all": lambda *_: None, "seed_all": lambda *_: None,
            "get_rng_state": lambda *_: RealGenerator().get_state(), "set_rng_state": lambda *_: None,
            "get_rng_state_all": lambda *_: [RealGenerator().get_state()], "set_rng_state_all": lambda *_: None,
            "is_current_stream_capturing": lambda: False, "get_arch_list": lambda: ["sm_90"],
        }.items()),
    ]  # fmt: skip
    # Python functions of torch's that would ask the mode as a whole: their bodies do, piece by piece
    for module in (torch.functional, torch.nn.functional, torch._tensor, torch.nn.init):
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            found.append((module, name, has_not))
    found.append((torch.overrides, "has_torch_function", has_not))
    found.append((torch.overrides, "has_torch_function_unary", has_not))
    found.append((torch.overrides, "has_torch_function_variadic", has_not))
    return found
