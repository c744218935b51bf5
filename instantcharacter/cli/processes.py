"""The processes of ``torchrun`` or ``accelerate launch`` that run a command together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .options import PictureOptions

if TYPE_CHECKING:
    from accelerate import PartialState

_Options = TypeVar("_Options", bound=PictureOptions)


def started() -> int:
    """The number of processes that were started."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(options: _Options) -> Iterator[tuple[_Options, PartialState]]:
    """Context manager: the options with this process's own device, and the process among the others.

    Raises:
        ValueError: a device for several processes, one process for ``--parallel``, or processes that accelerate does
            not connect.
    """
    from huggingface_hub.utils import disable_progress_bars

    from ..batch.processes import join

    if options.parallel and started() == 1:
        raise ValueError(
            f"--parallel {options.parallel} is for several processes, each with a GPU: start the same command by "
            "torchrun --nproc-per-node GPUS -m instantcharacter"
        )
    state = join(options.device)
    if state.num_processes > 1:
        options = replace(options, device=str(state.device))
    if not state.is_main_process:
        disable_progress_bars()
    yield options, state
    if state.num_processes > 1:
        state.destroy_process_group()
