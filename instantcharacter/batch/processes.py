"""The processes of a job, by accelerate: one alone, or those of ``accelerate launch`` or ``torchrun``."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..offload.devices import default_device

Value = TypeVar("Value")

PATIENCE = timedelta(days=30)
"""How long processes wait for each other: as long as the one with the most to do needs."""


def join(device: str | None = None) -> PartialState:
    """This process among the others; each has a device of its own.

    Args:
        device: a device's name, such as ``cpu``; chosen by accelerate if not given.

    Raises:
        ValueError: a device for several processes, or processes that accelerate does not connect.
    """
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = asked_for_cpu or str(device or default_device()) == "cpu"
    started = int(os.environ.get("WORLD_SIZE", 1))
    state = PartialState(cpu=cpu, **({"timeout": PATIENCE} if started > 1 else {}))
    if state.num_processes != started:
        raise ValueError(
            f"{started} processes are started, but accelerate connects {state.num_processes} on this kind of device: "
            "start one"
        )
    if started > 1 and ":" in (device or ""):
        raise ValueError(f"--device {device} for {started} processes: leave it out, each takes a device of its own")
    return state


def on_main(compute: Callable[[], Value]) -> Value:
    """What the main process computes, in every process.

    Raises:
        ValueError, OSError: those of ``compute``, in the main process.
        SystemExit: in the others then, with status 2, so that the error is printed once.
    """
    state = PartialState()
    if not state.is_main_process:
        [outcome] = broadcast_object_list([None])
        if outcome is None:
            raise SystemExit(2)
        return outcome[0]
    try:
        outcome = (compute(),)
    except (ValueError, OSError):
        broadcast_object_list([None])
        raise
    broadcast_object_list([outcome])
    return outcome[0]
