"""The model of a kind that was loaded last, for all nodes of a workflow that load such models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

M = TypeVar("M")


class ModelCache:
    """One model and the settings that it was loaded with.

    Attributes:
        model: the model, None before the first one.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self._key: Hashable = None

    def get(self, key: Hashable, load: Callable[[], M]) -> M:
        """The cached model if its key is this one; otherwise a loaded one, after the cached one is freed."""
        if self.model is None or key != self._key:
            self.model = None
            gc.collect()  # a pipeline that has run is part of reference cycles
            self.model, self._key = load(), key
        return self.model


_shared: WeakValueDictionary[str, ModelCache] = WeakValueDictionary()


def shared_cache(kind: str) -> ModelCache:
    """The cache that all nodes of a workflow hold that load models of one kind.

    ComfyUI frees a node's output before it runs the node with other settings. It keeps the node itself, and with it
    this cache, until the node is deleted from the workflow or ComfyUI frees memory.

    Args:
        kind: any name, the same for the same cache.
    """
    return _shared.setdefault(kind, ModelCache())
