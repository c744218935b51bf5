"""Offloading of a FLUX pipeline: the request, the offloader that serves it, and runs of the pipeline under its plan."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..offload.devices import free_memory, host_memory, shares_memory
from ..offload.host_weights import HostWeightsCache
from ..offload.offloader import Offloader
from ..offload.planning import MAX_BYTES, RESERVED_FOR_DESKTOP, STRATEGIES, MemoryPlan, Strategy, plan
from ..offload.sizes import GIB, ComponentModules, measure
from ..values import check_choice, check_number
from .components import DiffusersControls
from .schedule import as_list

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


class OffloadRequest(NamedTuple):
    """How a pipeline is to be offloaded, see :meth:`CharacterPipelineMixin.enable_character_offload`.

    Attributes:
        strategy: which weights stay on the device.
        vram_gb: GiB of GPU memory to use at most; None for all that is free, but for what a desktop needs.
        device: where the pipeline runs.
    """

    strategy: Strategy
    vram_gb: float | None
    device: torch.device

    def check(self) -> None:
        """Raise ``ValueError`` for an unknown strategy, or memory that is no positive number."""
        check_choice("the offload strategy", self.strategy, STRATEGIES)
        if self.vram_gb is not None:
            check_number("vram_gb", self.vram_gb, 1e-6, MAX_BYTES / GIB)


class PipelineOffload:
    """The offloading of one pipeline, or of several that share their models.

    Attributes:
        offloader: the current one; None if nothing is offloaded.
    """

    def __init__(self) -> None:
        self.offloader: Offloader | None = None
        self._request: OffloadRequest | None = None
        self._host_weights = HostWeightsCache()

    def enable(self, pipeline: DiffusionPipeline, components: ComponentModules, request: OffloadRequest) -> MemoryPlan:
        """Offload a pipeline, in place of any offloading before, diffusers' own included.

        Args:
            pipeline: referenced weakly.
            components: its modules, see :func:`~.components.components_of`.
            request: how.

        Returns:
            The plan, for pictures of 1024×1024.

        Raises:
            ValueError: an unknown strategy, or too little memory for any plan.
            torch.OutOfMemoryError: the weights of no plan fit; nothing is offloaded then.
        """
        request.check()
        self.disable()
        controls = DiffusersControls(pipeline)
        controls.undo()
        memory_plan = plan_request(components, request)
        offloader = Offloader(memory_plan, components, request.device, controls, self._host_weights)
        offloader.apply()
        self.offloader, self._request = offloader, request
        return offloader.plan

    def disable(self) -> None:
        """Stop offloading; the weights stay where they are between runs."""
        if self.offloader:
            self.offloader.undo()
            self.offloader = self._request = None

    @contextmanager
    def suspended(self, pipeline: DiffusionPipeline, components: Callable[[], ComponentModules]) -> Iterator[None]:
        """Context manager in which the models may be changed; afterwards they are offloaded as before.

        Args:
            pipeline: see :meth:`enable`.
            components: makes the components after the change.
        """
        request = self._request
        self.disable()
        try:
            yield
        except BaseException:
            if request:
                self._try_enable(pipeline, components, request)
            raise
        if request:
            self.enable(pipeline, components(), request)

    def run(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        default_side: int,
        may_retry: bool = True,
    ) -> Any:
        """Call a pipeline under a plan for the pictures of this call.

        If the device is out of memory all the same, a smaller plan is applied and the module runs again, or, under
        diffusers' offloading, the call with its generators as they were.

        Args:
            call: diffusers' ``__call__`` of the pipeline.
            args: its arguments.
            kwargs: its arguments.
            default_side: of pictures whose size is not among the arguments, in pixels.
            may_retry: whether a smaller plan may be applied. Not in one of several processes: what it runs again would
                exchange tensors with what the others go on with.
        """
        offloader = self.offloader
        if offloader is None:
            return call(*args, **kwargs)
        arguments = inspect.signature(call).bind(*args, **kwargs).arguments
        offloader.prepare(*picture_sizes(arguments, default_side), may_retry)
        if offloader.retries_module:
            return call(*args, **kwargs)
        generators = [generator for generator in as_list(arguments.get("generator")) if generator]
        states = [generator.get_state() for generator in generators]
        try:
            return call(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        offloader.reduce_memory(reason)  # here, since the error's traceback would keep the failed run's activations
        for generator, state in zip(generators, states):
            generator.set_state(state)
        return call(*args, **kwargs)

    def _try_enable(
        self, pipeline: DiffusionPipeline, components: Callable[[], ComponentModules], request: OffloadRequest
    ) -> None:
        """Offload again after a change failed; a warning says if that fails too, so that the first error is raised."""
        try:
            self.enable(pipeline, components(), request)
        except Exception:
            logger.warning("the pipeline is no longer offloaded: enable_character_offload failed", exc_info=True)


def plan_request(components: ComponentModules, request: OffloadRequest) -> MemoryPlan:
    """The plan for a request, of the memory that is free now."""
    strategy, vram_gb, device = request
    free = free_memory(device, chain.from_iterable(components.values()))
    free = max(free - (0 if shares_memory(device) else RESERVED_FOR_DESKTOP), 1)
    vram = free if vram_gb is None else min(free, int(vram_gb * GIB))
    if device.type == "mps" and strategy in ("auto", "stream"):  # its GPU computes in host memory
        strategy = "none"
    return plan(measure(components), vram, host_memory(), strategy=strategy)


def picture_sizes(arguments: Mapping[str, Any], default_side: int) -> tuple[tuple[int, int], int]:
    """Width and height in pixels, and the number of pictures, that a call of a FLUX pipeline generates.

    Args:
        arguments: of the call, without defaults; None stands for the default.
        default_side: see :meth:`PipelineOffload.run`.
    """
    prompt = arguments.get("prompt")
    prompts = prompt if isinstance(prompt, list) else arguments.get("prompt_embeds")
    count = (1 if prompts is None else len(prompts)) * (arguments.get("num_images_per_prompt") or 1)
    return (arguments.get("width") or default_side, arguments.get("height") or default_side), count
