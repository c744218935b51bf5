"""What stays on the GPU, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def lent(module: Module, device: torch.device) -> Iterator[Module]:
    """A module on a device for as long as the block lasts; afterwards its weights are where they were.

    Nothing is copied back: the weights at home, memory-mapped or not, are kept while the module is away. On the
    device already, it simply stays.
    """
    parameters = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(owner, name, buffer) for owner in module.modules() for name, buffer in owner._buffers.items()]
    try:
        yield module.to(device)
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
