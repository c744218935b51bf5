"""What stays on the GPU, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def lent(module: Module, device: torch.device) -> Iterator[Module]:
    """A module on a device for as long as the block lasts; afterwards its weights are where they were.

    Nothing is copied back: the weights at home, memory-mapped or not, are kept while the module is away. On the
    device already, it simply stays.
    """
    home: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (table, name, tensor, tensor.data)
        for owner in module.modules()
        for table in (vars(owner)["_parameters"], vars(owner)["_buffers"])
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        yield module.to(device)
    finally:
        for table, name, tensor, data in home:
            tensor.data = data
            table[name] = tensor
