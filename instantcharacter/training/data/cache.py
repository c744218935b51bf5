"""Caches what a frozen model computes of a part of a sample: in memory, in files."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...files.fingerprint import content_digest
from ...files.reading import read_safetensors
from ...files.writing import write_safetensors

Input = TypeVar("Input", bound="Path | bytes | str")
Tensors = dict[str, Tensor]


class MemoryCache:
    """Tensors in memory by key, until it is full; nothing is evicted.

    Args:
        capacity: bytes.
        device: where the tensors are; those of another device are moved.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._entries: dict[Hashable, Tensors] = {}
        self._free = capacity
        self._device = device

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensors | None:
        return self._entries.get(key)

    def add(self, key: Hashable, tensors: Tensors) -> Tensors:
        """Store tensors if there is room; returns the stored ones, or the argument if they are not stored."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if key in self._entries or size > self._free:
            return tensors
        self._entries[key] = to_device(tensors, self._device)
        self._free -= size
        return self._entries[key]


class PendingItem(NamedTuple):
    """An input on its way through a :class:`CachedEncoder`: ``tensors`` from a cache, or ``prepared`` for the model.

    ``file`` is where the tensors go once they are computed.
    """

    key: Hashable
    file: Path | None
    tensors: Tensors | None
    prepared: Any


class CachedEncoder(Generic[Input]):
    """A frozen model whose outputs are computed once.

    Args:
        name: names the model, its weights and its settings; the key of both caches.
        folder: parent of the folder ``name`` with the cache files; without it there are none.
        memory: cache in memory, shared with other encoders.
        prepare: decodes an input, in any thread. Raises ``BadSample``.
        compute: runs the model on several decoded inputs; returns the tensors of each.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        memory: MemoryCache,
        prepare: Callable[[Input], Any],
        compute: Callable[[list[Any]], list[Tensors]],
    ) -> None:
        self.name = name
        self._folder = folder / name if folder else None
        self._memory = memory
        self._prepare = prepare
        self._compute = compute

    def begin(self, value: Input) -> PendingItem:
        """Look an input up in both caches, and decode it if neither has it; for reader threads."""
        key = (self.name, value)
        if tensors := self._memory.get(key):
            return PendingItem(key, None, tensors, None)
        file = None
        if self._folder:
            file = self._folder / f"{content_digest(value)}.safetensors"
            if tensors := _read(file):
                return PendingItem(key, file, tensors, None)
        return PendingItem(key, file, None, self._prepare(value))

    def finish(self, items: list[PendingItem]) -> list[Tensors]:
        """The tensors of each item; those that no cache has are computed in one batch, and cached."""
        missing = [item for item in items if item.tensors is None]
        computed = iter(self._compute([item.prepared for item in missing]) if missing else [])
        return [
            self._memory.add(item.key, self._save(item, next(computed)) if item.tensors is None else item.tensors)
            for item in items
        ]

    def encode(self, value: Input) -> Tensors:
        """The tensors of one input."""
        return self.finish([self.begin(value)])[0]

    def _save(self, item: PendingItem, tensors: Tensors) -> Tensors:
        if item.file:
            write_safetensors(item.file, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        return tensors


def to_device(tensors: Tensors, device: torch.device) -> Tensors:
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def stack(items: list[Tensors], device: torch.device) -> Tensors:
    """One batch of the tensors of several items, which may be on different devices."""
    return {key: _stack([item[key] for item in items], device) for key in items[0]}


def _stack(tensors: list[Tensor], device: torch.device) -> Tensor:
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.to(device) for tensor in tensors]
    return torch.stack(tensors).to(device)


def _read(file: Path) -> Tensors | None:
    """A cache file's tensors; None for a missing, cut off or unreadable file, which is then computed again."""
    try:
        return read_safetensors(file, "a file of the training's cache")[0]
    except (OSError, ValueError):
        return None
