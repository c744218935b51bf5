"""Carries out a memory plan: resident weights on the device, the others moved there when their modules run."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Protocol

import torch
from torch import nn

from .devices import synchronize
from .host_weights import HostWeightsCache
from .planning import MemoryPlan
from .sizes import OUTSIDE_THE_PIPELINE, ComponentModules, blocks_of
from .streaming import OffloadedModule, check_not_offloaded

logger = logging.getLogger(__name__)


class LibraryControls(Protocol):
    """What the library that runs the modules does for a plan by itself."""

    def apply(self, plan: MemoryPlan, device: torch.device) -> None:
        """Offload whole models (``"model"``) or layers (``"sequential"``), and decode sliced and tiled."""

    def undo(self) -> None:
        """Undo :meth:`apply`; the weights are then in host memory, or where they were."""


class Offloader:
    """Keeps the weights of components where a memory plan has them, from :meth:`apply` to :meth:`undo`.

    The ``"model"`` and ``"sequential"`` strategies are diffusers' and accelerate's. The components that those do not
    know are offloaded between their runs in every plan in which they are not resident.

    Args:
        plan: where weights are to be.
        components: the modules of each component in the plan.
        device: where the modules run.
        controls: of the library that runs them.
        host_weights: from an earlier offloader of the same modules, so that they need not be pinned again.

    Attributes:
        plan: the current plan; a smaller one than before for pictures that need more memory for activations, or after
            the device was out of memory.
        device: where the modules run.
        host_weights: weights of offloaded modules in host memory.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        components: ComponentModules,
        device: torch.device,
        controls: LibraryControls,
        host_weights: HostWeightsCache | None = None,
    ) -> None:
        self.plan = self._requested = plan
        self.device = device
        self.host_weights = host_weights or HostWeightsCache()
        self._components = components
        self._controls = controls
        self._offloaded: dict[nn.Module, OffloadedModule] = {}
        self._reduced = False
        self._applied = False

    @property
    def retries_module(self) -> bool:
        """Whether a module that ran out of memory is run again by itself; otherwise the whole picture must be."""
        return self.plan.strategy in ("none", "stream")

    def manages(self, module: nn.Module) -> bool:
        """Whether the offloader moves the weights of a component's module, or keeps them on the device."""
        return module in self._offloaded

    def resident_modules(self) -> list[nn.Module]:
        """The modules whose weights are on the device all the time: whole components, and FLUX without what streams."""
        modules: list[nn.Module] = []
        for name, found in self._components.items():
            if name == "transformer" and name in self.plan.resident_components:
                (transformer,) = found
                blocks = blocks_of(name, transformer)
                modules += [child for child in transformer.children() if not isinstance(child, nn.ModuleList)]
                modules += [block for i, block in enumerate(blocks) if i not in self.plan.streamed]
            elif name in self.plan.resident_components:
                modules += found
        return modules

    def apply(self) -> None:
        """Carry the plan out, or the first smaller one whose weights fit.

        Raises:
            torch.OutOfMemoryError: none fits; the modules are then as they were, in host memory.
            RuntimeError: another offloader manages one of the modules; nothing is moved then.
        """
        for module in chain.from_iterable(self._components.values()):
            check_not_offloaded(module)
        while True:
            try:
                self._place_weights()
                self._applied = True
                return
            except torch.OutOfMemoryError as error:
                reason = str(error)
            except BaseException:
                self._move_to_host()
                raise
            self._move_to_host()
            self._take_smaller_plan(self.plan.smaller(), reason)

    def prepare(self, resolution: tuple[int, int], batch: int, may_reduce: bool = True) -> None:
        """Take the plan for the next pictures; :meth:`reduce_memory` may then be called once more.

        Args:
            resolution: width and height in pixels.
            batch: pictures at once.
            may_reduce: whether it may.
        """
        self._reduced = not may_reduce
        current = dataclasses.replace(self.plan, resolution=resolution, batch=batch)
        self.plan = self._requested.for_pictures(resolution, batch)
        if self.plan != current:
            logger.info("the memory plan is now\n%s", self.plan)
            self.undo()
        if not self._applied:
            self.apply()

    def reduce_memory(self, reason: str) -> None:
        """Apply the next smaller plan that fits, once for a picture.

        Args:
            reason: torch's message.

        Raises:
            torch.OutOfMemoryError: there is no smaller plan, or one was taken for this picture already.
        """
        self._take_smaller_plan(None if self._reduced else self.plan.smaller(), reason)
        self._reduced = True
        self.undo()
        self.apply()

    def undo(self) -> None:
        """Stop offloading; the weights stay where they are between the modules' runs."""
        synchronize(self.device)  # it may still copy from memory that is freed here
        for offloaded in self._offloaded.values():
            offloaded.remove()
        self._offloaded = {}
        self._controls.undo()
        self._applied = False

    def _place_weights(self) -> None:
        resident = self.plan.resident_components
        library_offloads = self.plan.strategy in ("model", "sequential")
        for name, modules in sorted(self._components.items(), key=lambda item: item[0] in resident):
            if not library_offloads or name in OUTSIDE_THE_PIPELINE:
                for module in modules:
                    self._offloaded[module] = self._offload(name, module)
        self._controls.apply(self.plan, self.device)

    def _offload(self, name: str, module: nn.Module) -> OffloadedModule:
        resident, streamed = name in self.plan.resident_components, blocks_of(name, module)
        if resident:
            streamed = [streamed[i] for i in self.plan.streamed] if name == "transformer" else []
        return OffloadedModule(
            module, streamed, self.device, resident, self.plan.pinned, _weak(self.reduce_memory), self.host_weights
        )

    def _move_to_host(self) -> None:
        """Undo what was placed, and free the device's memory."""
        self.undo()
        for module in chain.from_iterable(self._components.values()):
            module.to("cpu")

    def _take_smaller_plan(self, smaller: MemoryPlan | None, reason: str) -> None:
        reason = reason.splitlines()[0]
        if smaller is None:
            raise torch.OutOfMemoryError(
                f"out of GPU memory under the smallest plan that was tried, {self.plan.name}. Draw smaller or fewer "
                f"pictures at once, or close what else uses the GPU. ({reason})"
            )
        logger.warning(
            "out of GPU memory under the plan %s: going on with %s. (%s)", self.plan.name, smaller.name, reason
        )
        self.plan = self._requested = smaller


def _weak(reduce_memory: Callable[[str], None]) -> Callable[[str], None]:
    """An offloader's :meth:`~Offloader.reduce_memory`, by a weak reference.

    Modules and offloader would otherwise form a cycle, which keeps gigabytes until Python's garbage collection.
    """
    reference = weakref.WeakMethod(reduce_memory)

    def call(reason: str) -> None:
        if (method := reference()) is None:
            raise torch.OutOfMemoryError(reason)
        method(reason)

    return call
