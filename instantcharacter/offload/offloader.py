"""A pipeline whose weights are where a plan of :mod:`.memory` has them."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from .planning import ACTIVATION_BYTES, PHASE, Component, Components, MemoryPlan, ModuleSize
from .streaming import OffloadedModule

if TYPE_CHECKING:
    from ..flux.pipeline import CharacterPipelineMixin

logger = logging.getLogger(__name__)

STREAMING = ("text_encoder", "text_encoder_2", "siglip", "dinov2", "transformer")
"""Components with blocks that stream; the others are small, or run one small part at a time."""
ACCELERATE_DOES_NOT_KNOW = ("siglip", "dinov2", "fusion", "resampler")
TILE = 512
"""Pixels; the side of a tile of the VAE's, if it must."""


def roots(pipeline: CharacterPipelineMixin) -> dict[str, list[nn.Module]]:
    """The pipeline's modules that run by themselves, under the names of their components."""
    found: dict[str, list[nn.Module | None]] = {
        "text_encoder": [pipeline.text_encoder],
        "text_encoder_2": [pipeline.text_encoder_2],
        "vae": [getattr(pipeline.vae, name, None) for name in ("encoder", "quant_conv", "post_quant_conv", "decoder")],
        "transformer": [pipeline.transformer],
    }
    if encoder := pipeline.character_encoder:
        found |= {"siglip": [encoder.siglip], "dinov2": [encoder.dinov2]}
    adapter = None if pipeline.adapter_host else pipeline.character_adapter
    if adapter:
        found["resampler"] = [adapter.projector.resampler]
    if encoder and adapter:
        fusion = [part for name, part in adapter.projector.named_children() if name != "resampler"]
        lists = [list(part) if isinstance(part, nn.ModuleList) else [part] for part in fusion]
        found["fusion"] = [module for modules in lists for module in modules]
    present = {
        name: [module for module in found[name] if module is not None] for name in ACTIVATION_BYTES if name in found
    }
    return {name: modules for name, modules in present.items() if modules}


def measure(pipeline: CharacterPipelineMixin) -> Components:
    """The sizes of a pipeline's models as they are loaded, LoRAs and all."""
    return {name: _component(name, modules) for name, modules in roots(pipeline).items()}


def _component(name: str, modules: Sequence[nn.Module]) -> Component:
    parts, layer = [], 0
    for module in modules:
        blocks = tuple(map(_size, blocks_of(name, module)))
        parts.append(ModuleSize(_size(module) - sum(blocks), blocks))
        layer = max(layer, *(_size(leaf) for leaf in module.modules() if not any(leaf.children())))
    dtypes = [str(parameter.dtype).removeprefix("torch.") for module in modules for parameter in module.parameters()]
    work, per_pixel = ACTIVATION_BYTES[name]
    return Component(PHASE[name], tuple(parts), layer, work, per_pixel, max(set(dtypes), key=dtypes.count))


def blocks_of(name: str, module: nn.Module) -> list[nn.Module]:
    """The blocks of a component's module that can stream, in the order in which they run."""
    if name not in STREAMING:
        return []
    lists: list[nn.ModuleList] = []
    for part in module.modules():
        if isinstance(part, nn.ModuleList) and not any(part in inner.modules() for inner in lists):
            lists.append(part)
    return [block for blocks in lists for block in blocks]


def _size(module: nn.Module) -> int:
    tensors = dict.fromkeys([*module.parameters(), *module.buffers()])
    return sum(tensor.nbytes for tensor in tensors)


class Offloader:
    """A pipeline whose weights are where a plan has them, and the others come when they are needed.

    ``model`` and ``sequential`` are diffusers' and accelerate's; the character's encoders and projector, which those
    do not know, visit the device in every plan in which they do not stay.

    Attributes:
        plan: the plan now: a smaller one for pictures that it has too little room for, or after the device was out of
            memory.
        device: where the pipeline runs.

    Raises:
        torch.OutOfMemoryError: there is no room for the weights of this plan, or of any smaller one.
    """

    def __init__(self, plan: MemoryPlan, pipeline: CharacterPipelineMixin, device: torch.device) -> None:
        self.plan = self._asked = plan
        self.device = device
        self._pipeline_there = weakref.ref(pipeline)
        self._visitors: list[OffloadedModule] = []
        self._vae_before: dict[str, Any] = {}
        self._reduced = False
        self._in_place = False
        self._arrange_or_less()

    @property
    def _pipeline(self) -> Any:
        return self._pipeline_there()

    @property
    def retries_module(self) -> bool:
        """Whether what ran out of memory is run again by itself; otherwise the whole picture must be."""
        return self.plan.strategy in ("none", "stream")

    def begin(self, resolution: tuple[int, int], batch: int) -> None:
        """Make the plan one for these pictures, and allow it another step back."""
        self._reduced = False
        same = dataclasses.replace(self.plan, resolution=resolution, batch=batch)
        self.plan = self._asked.for_pictures(resolution, batch)
        if self.plan != same:
            logger.info("the memory plan is now\n%s", self.plan)
            self.undo()
        if not self._in_place:
            self._arrange_or_less()

    def reduce_memory(self, reason: str) -> None:
        """Take the next smaller plan that fits, once for a picture.

        Raises:
            torch.OutOfMemoryError: there is none, or it was taken before.
        """
        self._take_smaller(None if self._reduced else self.plan.smaller(), reason)
        self._reduced = True
        self.undo()
        self._arrange_or_less()

    def _take_smaller(self, smaller: MemoryPlan | None, reason: str) -> None:
        reason = reason.splitlines()[0]
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"out of GPU memory under the smallest plan that was tried, {self.plan.name}. Draw smaller or fewer "
                f"pictures at once, or close what else uses the GPU. ({reason})"
            )
        logger.warning(
            "out of GPU memory under the plan %s: going on with %s. (%s)", self.plan.name, smaller.name, reason
        )
        self.plan = self._asked = smaller

    def staying(self) -> list[nn.Module]:
        """The modules whose weights stay on the device, for a host that keeps count of such."""
        modules: list[nn.Module] = []
        for name, found in roots(self._pipeline).items():
            if name == "transformer" and name in self.plan.staying:
                (transformer,) = found
                blocks = blocks_of(name, transformer)
                modules += [child for child in transformer.children() if not isinstance(child, nn.ModuleList)]
                modules += [block for i, block in enumerate(blocks) if i not in self.plan.streamed]
            elif name in self.plan.staying:
                modules += found
        return modules

    def undo(self) -> None:
        """Leave the modules alone; the weights stay where they are."""
        if self.device.type != "cpu":  # which may still copy from what is let go of
            torch.get_device_module(self.device).synchronize()
        for visitor in self._visitors:
            visitor.remove()
        self._visitors = []
        self._pipeline.remove_all_hooks()
        vars(self._pipeline.vae).update(self._vae_before)
        self._in_place = False

    def _arrange_or_less(self) -> None:
        """Carry the plan out, or else the first smaller one whose weights there is room for.

        Raises:
            torch.OutOfMemoryError: there is none; the modules are then left alone.
        """
        while True:
            try:
                self._arrange()
                self._in_place = True
                return
            except torch.OutOfMemoryError as error:
                reason = str(error)
            except BaseException:
                self._bring_home()
                raise
            self._bring_home()
            self._take_smaller(self.plan.smaller(), reason)

    def _bring_home(self) -> None:
        """Undo what was placed, and give the device's memory back."""
        self.undo()
        for module in chain.from_iterable(roots(self._pipeline).values()):
            module.to("cpu")

    def _arrange(self) -> None:
        leaving_first = sorted(roots(self._pipeline).items(), key=lambda item: item[0] in self.plan.staying)
        accelerated = self.plan.strategy in ("model", "sequential")
        for name, modules in leaving_first:
            if not accelerated or name in ACCELERATE_DOES_NOT_KNOW:
                for module in modules:
                    self._visitors.append(self._visitor(name, module))
        pipeline = self._pipeline
        if self.plan.strategy == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif self.plan.strategy == "sequential" and self.device.type != "cpu":  # from where to where?
            pipeline.enable_sequential_cpu_offload(device=self.device)
        self._decode_piecemeal(pipeline.vae, pipeline.vae_scale_factor)

    def _decode_piecemeal(self, vae: Any, scale_factor: int) -> None:
        """Have the VAE decode one picture at a time, and in tiles if it must, until the plan is undone."""
        changed: dict[str, Any] = {"use_slicing": True} if self.plan.strategy != "none" else {}
        if self.plan.tiled:
            changed |= {"use_tiling": True, "tile_sample_min_size": TILE, "tile_latent_min_size": TILE // scale_factor}
        self._vae_before = {name: vars(vae)[name] for name in changed}
        vars(vae).update(changed)

    def _visitor(self, name: str, module: nn.Module) -> OffloadedModule:
        stays, streamed = name in self.plan.staying, blocks_of(name, module)
        if stays:
            streamed = [streamed[i] for i in self.plan.streamed] if name == "transformer" else []
        return OffloadedModule(module, streamed, self.device, stays, self.plan.pinned, _weakly(self.reduce_memory))


def _weakly(reduce_memory: Callable[[str], None]) -> Callable[[str], None]:
    """An arrangement's :meth:`reduce_memory` that does not keep it: visitors and it would keep each other."""
    there = weakref.WeakMethod(reduce_memory)

    def call(reason: str) -> None:
        if (method := there()) is None:
            raise torch.OutOfMemoryError(reason)
        method(reason)

    return call


def default_device() -> torch.device:
    """Where pictures are drawn unless somebody says otherwise: the GPU, a Mac's too, if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def shares_memory(device: torch.device) -> bool:
    """Whether a device computes in the host's own memory, so that moving weights to it frees nothing."""
    return device.type in ("cpu", "mps")


def free_memory(device: torch.device, pipeline: CharacterPipelineMixin) -> int:
    """Bytes that a pipeline could use on a device now, what it has there included."""
    if shares_memory(device):
        return psutil.virtual_memory().total
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    modules = chain.from_iterable(roots(pipeline).values())
    ours = dict.fromkeys(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    there = sum(tensor.nbytes for tensor in ours if tensor.device.type == device.type)
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)
    return free + cached + there


def host_memory() -> int:
    """Bytes of host memory for weights, what this process holds already included; a container's limit counts."""
    own = psutil.Process().memory_info()
    free = min(psutil.virtual_memory().available, _left_in_container())
    return free + own.rss - getattr(own, "shared", 0)


def _left_in_container(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes until this process's control group, or one above it, is at its limit; its file cache can go."""
    left = psutil.virtual_memory().total
    try:
        names = [line.split("::", 1)[1].strip("/") for line in own.read_text().splitlines() if line.startswith("0::")]
    except OSError:  # not Linux
        return left
    for group in {root, *(above for name in names for above in (root / name, *(root / name).parents))}:
        try:
            limit = (group / "memory.max").read_text().strip()
            counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(counted["file"])
        except (OSError, KeyError, ValueError):  # no such group, or one without a limit
            continue
        if limit != "max":
            left = min(left, int(limit) - used)
    return max(left, 0)
