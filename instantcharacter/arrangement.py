"""A pipeline whose weights are where a plan of :mod:`.memory` has them."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from .memory import PHASE, WORK, Component, Components, MemoryPlan, Part
from .streaming import Visitor

if TYPE_CHECKING:
    from .pipeline import CharacterPipelineMixin

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
    if adapter := pipeline.character_adapter:
        found["resampler"] = [adapter.projector.resampler]
    if encoder and adapter:
        fusion = [part for name, part in adapter.projector.named_children() if name != "resampler"]
        lists = [list(part) if isinstance(part, nn.ModuleList) else [part] for part in fusion]
        found["fusion"] = [module for modules in lists for module in modules]
    present = {name: [module for module in found[name] if module is not None] for name in WORK if name in found}
    return {name: modules for name, modules in present.items() if modules}


def measure(pipeline: CharacterPipelineMixin) -> Components:
    """The sizes of a pipeline's models as they are loaded, LoRAs and all."""
    return {name: _component(name, modules) for name, modules in roots(pipeline).items()}


def _component(name: str, modules: Sequence[nn.Module]) -> Component:
    parts, layer = [], 0
    for module in modules:
        blocks = tuple(map(_size, blocks_of(name, module)))
        parts.append(Part(_size(module) - sum(blocks), blocks))
        layer = max(layer, *(_size(leaf) for leaf in module.modules() if not any(leaf.children())))
    dtypes = [str(parameter.dtype).removeprefix("torch.") for module in modules for parameter in module.parameters()]
    work, per_pixel = WORK[name]
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


class Arrangement:
    """A pipeline whose weights are where a plan has them; what :func:`~instantcharacter.memory.apply` returns.

    Attributes:
        plan: the plan now: a smaller one for pictures that it has too little room for, or after the device was out of
            memory.
        device: where the pipeline runs.
    """

    def __init__(self, plan: MemoryPlan, pipeline: CharacterPipelineMixin, device: torch.device) -> None:
        self.plan = self._asked = plan
        self.device = device
        self._pipeline_there = weakref.ref(pipeline)
        self._visitors: list[Visitor] = []
        self._vae_before: dict[str, Any] = {}
        self._stepped_back = False
        self._arrange()

    @property
    def _pipeline(self) -> Any:
        return self._pipeline_there()

    @property
    def steps_back_alone(self) -> bool:
        """Whether what ran out of memory is run again by itself; otherwise the whole picture must be."""
        return self.plan.strategy in ("none", "stream")

    def begin(self, resolution: tuple[int, int], batch: int) -> None:
        """Make the plan one for these pictures, and allow it another step back."""
        self._stepped_back = False
        if (changed := self._asked.for_pictures(resolution, batch)) != self.plan:
            same = dataclasses.replace(self.plan, resolution=changed.resolution, batch=changed.batch)
            self.plan = changed
            if changed != same:
                logger.info("the memory plan is now\n%s", changed)
                self.undo()
                self._arrange()

    def step_back(self, reason: str) -> None:
        """Take the next smaller plan, once for a picture.

        Raises:
            torch.OutOfMemoryError: there is none, or it was taken before.
        """
        smaller = None if self._stepped_back else self.plan.smaller()
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"out of GPU memory under the smallest plan that was tried, {self.plan.name}. Draw smaller or fewer "
                f"pictures at once, or close what else uses the GPU. ({reason.splitlines()[0]})"
            )
        logger.warning(
            "out of GPU memory under the plan %s: going on with %s. (%s)",
            self.plan.name,
            smaller.name,
            reason.splitlines()[0],
        )
        self._stepped_back = True
        self.undo()
        self.plan = self._asked = smaller
        self._arrange()

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
        for visitor in self._visitors:
            visitor.remove()
        self._visitors = []
        self._pipeline.remove_all_hooks()
        vars(self._pipeline.vae).update(self._vae_before)

    def _arrange(self) -> None:
        leaving_first = sorted(roots(self._pipeline).items(), key=lambda item: item[0] in self.plan.staying)
        accelerated = self.plan.strategy in ("model", "sequential")
        for name, modules in leaving_first:
            if not accelerated or name in ACCELERATE_DOES_NOT_KNOW:
                self._visitors += [self._visitor(name, module) for module in modules]
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

    def _visitor(self, name: str, module: nn.Module) -> Visitor:
        stays, streamed = name in self.plan.staying, blocks_of(name, module)
        if stays:
            streamed = [streamed[i] for i in self.plan.streamed] if name == "transformer" else []
        return Visitor(module, streamed, self.device, stays, self.plan.pinned, _weakly(self.step_back))


def _weakly(step_back: Callable[[str], None]) -> Callable[[str], None]:
    """An arrangement's :meth:`step_back` that does not keep it: visitors and it would keep each other."""
    there = weakref.WeakMethod(step_back)

    def call(reason: str) -> None:
        if (method := there()) is None:
            raise torch.OutOfMemoryError(reason)
        method(reason)

    return call


def free_memory(device: torch.device, pipeline: CharacterPipelineMixin) -> int:
    """Bytes that a pipeline could use on a device now, what it has there included."""
    if device.type == "cpu":
        return psutil.virtual_memory().total
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    modules = chain.from_iterable(roots(pipeline).values())
    ours = dict.fromkeys(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    there = sum(tensor.nbytes for tensor in ours if tensor.device.type == device.type)
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)
    return free + cached + there


def host_memory() -> int:
    """Bytes of host memory for weights, what this process holds already included."""
    own = psutil.Process().memory_info()
    return psutil.virtual_memory().available + own.rss - getattr(own, "shared", 0)
