"""Devices, and how much memory they and the host have."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..values import shown
from .sizes import tensors_of

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def default_device() -> torch.device:
    """The device that pictures are generated on if none is given: the GPU, a Mac's too, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def as_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; :func:`default_device` if not given.

    ``"cuda"`` is the GPU that is the current one now: another may be so in the thread, or at the time, of a run.

    Raises:
        ValueError: no device that torch knows.
    """
    try:
        found = default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device is {shown(device)}; expected one of torch's, such as 'cuda' or 'cpu'") from error
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def shares_memory(device: torch.device) -> bool:
    """Whether a device computes in the host's own memory, so that moving weights to it frees nothing."""
    return device.type in ("cpu", "mps")


def synchronize(device: torch.device) -> None:
    """Wait for all that a device is doing."""
    if device.type == "mps":  # there is one
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager in which a device is the current one: torch's streams, and CUDA's calls, leave others alone."""
    backend: Any = getattr(torch, device.type, None)
    return backend.device(device) if hasattr(backend, "device") else nullcontext()


def free_memory(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """Bytes that modules could use on a device now, those that they already use there included."""
    if shares_memory(device):
        return psutil.virtual_memory().total
    backend = torch.get_device_module(device)
    free, _ = backend.mem_get_info(device)
    cached = backend.memory_reserved(device) - backend.memory_allocated(device)
    return free + cached + sum(t.nbytes for t in tensors_of(*modules) if same_device(t.device, device))


def host_memory() -> int:
    """Bytes of host memory for weights, those that this process holds included. A container's limit counts.

    The processes that ``torchrun`` or ``accelerate launch`` start on one machine share what is free.
    """
    own = psutil.Process().memory_info()
    free = min(psutil.virtual_memory().available, container_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return free + own.rss - getattr(own, "shared", 0)


def container_memory(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUPS) -> int:
    """Bytes until this process's control group (cgroup v2), or one above it, is at its limit.

    A group's file cache does not count as used: Linux drops it when memory is needed. Without a limit, or on another
    system, this is the machine's memory.

    Args:
        root: where the control groups are mounted.
        own: the file that names this process's groups.
    """
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


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one; a device without an index is the current one of its type."""
    if one.type != other.type or one.index == other.index or shares_memory(one):
        return one.type == other.type
    current = torch.get_device_module(one).current_device()
    return (current if one.index is None else one.index) == (current if other.index is None else other.index)
