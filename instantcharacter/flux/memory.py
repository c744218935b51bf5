"""Where a FLUX pipeline's models are and how they compute: offloading, compiling, 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch

from ..offload.devices import as_device
from ..offload.offloader import Offloader
from ..offload.planning import MemoryPlan, Strategy
from ..offload.sizes import ComponentModules
from .attn_processor import compute_dtype
from .compile import compile_blocks
from .components import components_of
from .fp8 import check_fp8_arithmetic, compute_in_fp8
from .hooks import drop_empty_registry
from .model_changes import ModelChangesMixin
from .offloading import OffloadRequest
from .shared import SharedState
from .turns import Turns, turns_at


class MemoryMixin(ModelChangesMixin):
    """Moves the models of a diffusers FLUX pipeline, in turns with its runs and with those of others of its models."""

    _first: MemoryMixin | None = None
    """The pipeline that this one shares its state with."""

    @cached_property
    def _state(self) -> SharedState:
        return SharedState()

    @property
    def _turns(self) -> Turns:
        return turns_at(self.transformer)

    @property
    def offloader(self) -> Offloader | None:
        """The offloader of :meth:`enable_character_offload`; None if it is not enabled."""
        return self._state.offload.offloader

    def enable_character_offload(
        self, strategy: Strategy = "auto", vram_gb: float | None = None, device: str | torch.device | None = None
    ) -> MemoryPlan:
        """Keep on the GPU the weights that fit, and move the others there when they are needed.

        It takes the place of diffusers' offloading. The plan follows changes of the pipeline: another adapter or
        encoder, LoRAs, larger pictures. If the GPU is out of memory all the same, the module that failed is run again
        under the next smaller plan, with a warning.

        Args:
            strategy: ``"auto"``: as many weights stay on the GPU as fit. ``"none"``: all. ``"stream"``: as few as
                streaming can. ``"model"``: one model at a time, by diffusers. ``"sequential"``: one layer at a time,
                by accelerate: the least memory, and by far the slowest.
            vram_gb: GiB of GPU memory to use at most; all that is free now, but for what a desktop needs, if not given.
            device: where to run, such as ``"cuda:1"``; if not given, the GPU that the pipeline is on, or else
                :func:`~.default_device`. On a Mac, whose GPU computes in host memory, all weights stay.

        Returns:
            The plan; print it.

        Raises:
            ValueError: another strategy, or too little memory for any plan.
            RuntimeError: another pipeline offloads the same models, and does not share its state with this one.
            torch.OutOfMemoryError: not even the smallest plan's weights fit; nothing is offloaded then.
        """
        request = OffloadRequest(strategy, vram_gb, self._device_or_own(device))
        with self._turns.one(changes=True):
            return self._state.offload.enable(self._first or self, self._components(), request)

    def disable_character_offload(self) -> None:
        """Leave the weights where they are now."""
        with self._turns.one(changes=True):
            self._state.offload.disable()

    def enable_character_compile(self) -> bool:
        """Have torch compile FLUX's blocks, with the character in them, at their first run; see :mod:`.compile`.

        Returns:
            Whether they will be; a warning says why not. If compiling fails later, a warning says so, and FLUX runs
            without it.
        """
        with self._turns.one(changes=True):
            return compile_blocks(self.transformer)

    def enable_character_fp8(self, device: str | torch.device | None = None) -> None:
        """Have FLUX's large layers multiply in 8 bits, and the character's; it cannot be undone.

        Half of the memory for these layers; steps are faster above all with :meth:`enable_character_compile`, and
        pictures are slightly different. LoRAs, adapters and offloading may come before or after it.

        Args:
            device: where FLUX is to run, see :meth:`enable_character_offload`.

        Raises:
            ValueError: the device has no 8-bit arithmetic, or FLUX is quantised or offloaded by others.
        """
        target = self._device_or_own(device)
        by_rows = check_fp8_arithmetic(target)
        with self._changing():
            compute_in_fp8(self.transformer, compute_dtype(self.transformer), by_rows, target)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the models, as the diffusers pipeline does.

        It ends the offloading of :meth:`enable_character_offload`, but for ``"model"`` and ``"sequential"``, which
        are diffusers' own and follow its rules.
        """
        if self.offloader and self.offloader.retries_module:
            self.disable_character_offload()
        return super().to(*args, **kwargs)

    def maybe_free_model_hooks(self) -> None:
        """Move models that diffusers offloads to host memory, as the diffusers pipeline does after each call."""
        super().maybe_free_model_hooks()
        drop_empty_registry(self.transformer)

    @property
    def _execution_device(self) -> torch.device:
        return self.offloader.device if self.offloader else super()._execution_device

    def _device_or_own(self, device: str | torch.device | None) -> torch.device:
        """A device by its name; without a name the GPU that the pipeline is on, or else :func:`~.default_device`."""
        if device is None and (own := self._execution_device).type not in ("cpu", "meta"):
            return as_device(own)
        return as_device(device)

    def _components(self) -> ComponentModules:
        adapter = None if self._state.host else self._state.adapter
        return components_of(self, self._state.encoder, adapter)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Context manager in which the models may be changed; afterwards they are offloaded as before."""
        with self._turns.one(changes=True), self._offload_suspended():
            yield

    @contextmanager
    def models_changing(self) -> Iterator[None]:
        """Context manager in which the models may be changed; afterwards they are offloaded as before."""
        with self._turns.one(), self._offload_suspended():
            self._state.prompts.clear()
            yield

    def _offload_suspended(self) -> AbstractContextManager[None]:
        return self._state.offload.suspended(self._first or self, self._components)
