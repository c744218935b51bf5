"""CUDA devices that are not there, for tests on a machine without one.

Every tensor lives in host memory and is computed there, with real values; where it would be is written on its storage,
so views, ``.data`` and modules' weights carry it along. Inside :class:`PretendedCuda`

* ``tensor.device``, ``.to``, ``.cuda``, ``device="cuda"`` and ``torch.cuda`` speak of devices as if they were there;
  what names none of several is on the current one;
* an operation on tensors of different devices raises, as on a real one (a number in a 0-d CPU tensor may join in
  element-wise operations and indices may come from the host: nothing else);
* streams and events are followed with vector clocks: a read before its copy is known to be done, a slot that is
  written while it may still be read, memory that is freed while another stream may still use it, are put in ``races``;
* ``torch.cuda.memory_allocated`` counts, and a ``capacity`` makes ``torch.OutOfMemoryError``;
* ``contexts`` has the devices that a process would have a context on: hundreds of megabytes of each;
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

    def __init__(self, card: PretendedCuda, device: torch.device, size: int) -> None:
        self.card, self.device, self.size = card, device, size
        self.gpu = card.gpus[device.index] if device.type == "cuda" else None
        self.stream = self.gpu.stream if self.gpu else card.host
        self.written: tuple[Clock, int, str] | None = None
        self.read: dict[int, tuple[Clock, int, str]] = {}
        self.recorded: set[int] = set()
        self.pinned = False
        if self.gpu:
            self.gpu.allocate(size)

    def __del__(self) -> None:
        if self.gpu:
            self.gpu.allocated -= self.size
        for clock, time, what in [*([self.written] if self.written else []), *self.read.values()]:
            if clock.id not in self.recorded and not self.stream.knows(clock.id, time):
                self.card.races.append(f"{self.size} bytes freed while {clock.name} may still be at {what}")


class Gpu:
    """One device: its memory and its streams."""

    def __init__(self, card: PretendedCuda, index: int, capacity: int) -> None:
        self.card, self.device = card, torch.device("cuda", index)
        self.capacity, self.allocated, self.peak = capacity, 0, 0
        self.streams: list[Stream] = []
        self.default = self.stream = Stream(self.device, name=f"the default stream of {self.device}", gpu=self)

    def use(self) -> Gpu:
        """The device, on which the process has a context from now on."""
        self.card.initialized = True
        self.card.contexts.add(self.device.index)
        return self

    def allocate(self, size: int) -> None:
        self.use()
        self.allocated += size  # __del__ takes it off again
        if self.allocated > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended)")
        self.peak = max(self.peak, self.allocated)


class Stream(Clock):
    def __init__(self, device: Any = None, priority: int = 0, name: str = "", gpu: Gpu | None = None, **_: Any) -> None:
        super().__init__(name or f"stream {next(PretendedCuda.numbers)}")
        gpu = gpu or PretendedCuda.current.gpu(device).use()
        self.device = gpu.device
        gpu.streams.append(self)

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
        self.device: torch.device | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or PretendedCuda.current.gpu().stream
        PretendedCuda.current.gpu(stream.device).use()
        if self.device not in (None, stream.device):
            raise RuntimeError(f"Event device {self.device} does not match recording stream's device {stream.device}.")
        self.device, self.at = stream.device, stream.now()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or PretendedCuda.current.gpu().stream).learn(self.at)

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
        made.where = PretendedCuda.current.normal(device)
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


def _of_the_first(name: str) -> Any:
    return property(lambda card: getattr(card.gpus[0], name), lambda card, value: setattr(card.gpus[0], name, value))


class PretendedCuda(TorchFunctionMode):
    """See the module's text.

    Args:
        capacity: bytes that each device has.
        devices: how many there are.

    Attributes:
        gpus: the devices; ``capacity``, ``allocated`` and ``peak`` are those of the first.
        index: of the current device.
        initialized: what ``torch.cuda.is_initialized`` says.
    """

    current: PretendedCuda
    numbers = itertools.count(1)
    capacity, allocated, peak = map(_of_the_first, ("capacity", "allocated", "peak"))

    def __init__(self, capacity: int = 80 << 30, devices: int = 1) -> None:
        super().__init__()
        self.index, self.initialized = 0, False
        self.contexts: set[int] = set()
        self.races: list[str] = []
        self.waits: list[str] = []
        self.registered: dict[int, int] = {}
        self.pins = True
        self.error = ""
        self.host = Clock("the host")
        self.gpus = [Gpu(self, index, capacity) for index in range(devices)]
        PretendedCuda.current = self
        self._operations = _Operations(self)

    # What is where

    def gpu(self, device: Any = None) -> Gpu:
        """A device by its name or number; the current one if none is named."""
        self.initialized = True
        if not isinstance(device, int):
            index = None if device is None else torch.device(device).index
            device = self.index if index is None else index
        if device >= len(self.gpus):
            raise RuntimeError("CUDA error: invalid device ordinal (pretended)")
        return self.gpus[device]

    def normal(self, device: Any) -> torch.device:
        if isinstance(device, int) or torch.device(device).type == "cuda":
            return self.gpu(device).device
        return torch.device(torch.device(device).type)

    @contextlib.contextmanager
    def on(self, device: Any) -> Any:
        """Context manager in which a device is the current one."""
        before = self.index
        self.index = before if device is None else self.gpu(device).device.index
        try:
            yield
        finally:
            self.index = before

    def place(self, tensor: Any) -> Place | None:
        if RealTensor.device.__get__(tensor).type != "cpu" or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        place = getattr(storage, "_place", None)
        if place is None or place.card is not self:
            place = storage._place = Place(self, CPU, storage.nbytes())
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
                    place = storage._place = Place(self, device, storage.nbytes())
                    self.touch(place, "made", True)
        return made

    def raise_error(self) -> None:
        """As torch does at the next kernel, whatever call failed."""
        error, self.error = self.error, ""
        if error:
            raise RuntimeError(error)

    # Operations

    def operate(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, RealTensor)]
        device = self.common(func, tensors)
        if device.type == "cuda":
            self.raise_error()
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense" and device.type == "cuda":
            self.wait(device, name)
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
                    storage._place = Place(self, device, storage.nbytes())
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
        gpus = devices - {CPU}
        if len(gpus) == 1 and element_wise and all(x.ndim == 0 for x in strangers):
            return gpus.pop()
        if len(gpus) == 1 and name in INDICES and locations[0][1] in gpus:
            return gpus.pop()
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got tensors on {sorted(map(str, devices))} "
            f"in {name} of {[tuple(x.shape) for x in tensors]} (pretended)"
        )

    def touch(self, place: Place, what: str, write: bool, clock: Clock | None = None) -> None:
        clock = clock or (place.gpu.stream if place.gpu else self.host)
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
        gpu = out_of.gpu or into.gpu  # a copy between two devices is in the stream of the one that it comes from
        if gpu is None:
            self.touch(out_of, "copy", False)
            self.touch(into, "copy", True)
            return
        if into.gpu and into.gpu is not gpu:
            gpu.stream.learn(into.gpu.stream.now())
        pinned = all(place.gpu or self.is_pinned(place, x) for place, x in ((into, to), (out_of, source)))
        if (into.gpu and out_of.gpu) or (non_blocking and pinned):
            self.touch(out_of, "copy", False, gpu.stream)
            self.touch(into, "copy", True, gpu.stream)
            if into.gpu:
                into.gpu.stream.learn(gpu.stream.now())
            return
        self.touch(out_of, "copy", False, None)
        if into.device == CPU:
            self.wait(gpu.device, "copy")
        self.touch(into, "copy", True, None)  # the memory is free to change at once

    def wait(self, device: torch.device, what: str) -> None:
        """The host waits for all that a device's current stream has to do."""
        self.host.learn(self.gpu(device).stream.now())
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
            if here != generator.device:
                raise RuntimeError(f"Expected a '{here.type}' device type for generator but found '{generator.device}'")
        if device is not None and not isinstance(device, torch.device):
            device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device is None or device.type == "meta":
            return func(*args, **kwargs)
        data = args[0] if args else None
        if func in (torch.as_tensor, torch.asarray) and isinstance(data, RealTensor):
            return _to(self, data, self.normal(device), kwargs.get("dtype"))
        if device.type == "cuda":
            self.normal(device)  # there may be no such device
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
    if (device := card.where(tensor)).type == "cuda":
        raise TypeError(f"can't convert {device} device type tensor to numpy. Use Tensor.cpu() first (pretended)")
    place = card.place(tensor)
    if place:
        card.touch(place, "numpy", False)
    return tensor.numpy(*args, **kwargs)


def _set_data(card: PretendedCuda, tensor: Any, data: Any) -> None:
    RealTensor.data.__set__(tensor, data)


def _tolist(card: PretendedCuda, tensor: Any) -> Any:
    if (device := card.where(tensor)).type == "cuda":
        card.wait(device, "tolist")
    elif place := card.place(tensor):
        card.touch(place, "tolist", False)
    return tensor.tolist()


def _pin(card: PretendedCuda, tensor: Any, *_: Any, **__: Any) -> Any:
    if card.where(tensor).type == "cuda":
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
    RealTensor.get_device: lambda card, x: card.where(x).index if card.where(x).type == "cuda" else -1,
    RealTensor.to: _to,
    RealTensor.cpu: lambda card, x, *_, **__: _to(card, x, CPU),
    RealTensor.cuda: lambda card, x, device=None, non_blocking=False, **_: _to(
        card, x, card.gpu(device).device, non_blocking=non_blocking
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
        self._card.gpu().use()  # as a call does that names no device
        if not self._card.pins:
            self._card.error = "CUDA error: out of memory (pretended: of a call before)"
            return 2  # cudaErrorMemoryAllocation
        if any(address < a + s and a < address + size for a, s in self._card.registered.items()):
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        self._card.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._card.gpu().use()
        return 0 if self._card.registered.pop(address, None) else 713


def _patches(card: PretendedCuda) -> list[tuple[Any, str, Any]]:
    @contextlib.contextmanager
    def stream(stream: Stream | None) -> Any:
        if stream is None:
            yield
            return
        gpu = card.gpu(stream.device)
        before, gpu.stream = gpu.stream, stream
        try:
            with card.on(stream.device):
                yield
        finally:
            gpu.stream = before
            if card.gpu() is not gpu:  # torch makes it the current one again by cudaSetDevice, which makes a context
                card.gpu().use()

    def set_stream(stream: Stream) -> None:
        card.index = stream.device.index
        card.gpu().stream = stream

    def synchronize(device: Any = None) -> None:
        for each in card.gpu(device).use().streams:
            card.host.learn(each.now())

    def of(name: str) -> Any:
        """What torch says of a device's memory; it says nothing of one before CUDA is initialized."""
        return lambda device=None: getattr(card.gpu(device), name) if card.initialized else 0

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        gpu = card.gpu(device).use()
        return gpu.capacity - gpu.allocated, gpu.capacity

    def reset_peak(device: Any = None) -> None:
        gpu = card.gpu(device)
        gpu.peak = gpu.allocated

    def has_not(*_: Any, **__: Any) -> bool:
        return False

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
            "is_available": lambda: True, "device_count": lambda: len(card.gpus),
            "current_device": lambda: card.gpu().device.index, "is_initialized": lambda: card.initialized,
            "init": card.gpu, "_lazy_init": card.gpu,
            "Stream": Stream, "Event": Event, "stream": stream, "StreamContext": stream,
            "current_stream": lambda device=None: card.gpu(device).stream,
            "default_stream": lambda device=None: card.gpu(device).default,
            "set_stream": set_stream, "synchronize": synchronize, "mem_get_info": mem_get_info,
            "memory_allocated": of("allocated"), "memory_reserved": of("allocated"),
            "max_memory_allocated": of("peak"), "max_memory_reserved": of("peak"),
            "reset_peak_memory_stats": reset_peak,
            "memory_stats": lambda *_: stats, "empty_cache": lambda: None, "ipc_collect": lambda: None,
            "get_device_name": lambda device=None: card.gpu(device) and "pretended",
            "get_device_properties": lambda device=None: card.gpu(device) and properties,
            "get_device_capability": lambda device=None: card.gpu(device) and (9, 0),
            "is_bf16_supported": lambda *_, **__: True,
            "set_device": lambda device: setattr(card, "index", card.gpu(device).use().device.index),
            "device": card.on, "device_of": lambda tensor: card.on(tensor.device if tensor.is_cuda else None),
            "cudart": lambda: _Runtime(card),
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
