"""Caches of recent results: characters by their picture, embeddings by their prompt."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ..model.character import Character

Value = TypeVar("Value")

RECENT = 4
"""Number of characters, and of prompts' embeddings, that a pipeline caches."""


class RecentCache(Generic[Value]):
    """A cache of the most recently used values.

    Args:
        size: number of values.
    """

    def __init__(self, size: int = RECENT) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """The cached value of a key, or else a computed one, which replaces the least recently used one."""
        if key not in self._values:
            self._values[key] = compute()
        self._values.move_to_end(key)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return self._values[key]

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()


class CharacterCache:
    """Characters by the pixels of their reference picture and the way it was made a square."""

    def __init__(self) -> None:
        self._recent: RecentCache[Character] = RecentCache()

    def get(self, image: Image.Image, fit: str, create: Callable[[], Character]) -> Character:
        """The cached character of a picture, or else a created one."""
        return self._recent.get((hashlib.blake2b(image.tobytes()).digest(), image.size, fit), create)

    def clear(self) -> None:
        """Drop all characters."""
        self._recent.clear()


class PromptCache:
    """Results of a pipeline's ``encode_prompt`` by its arguments, the device, and the text encoders' state.

    The tensors are shared between calls: do not change them in place.
    """

    def __init__(self) -> None:
        self._recent: RecentCache[Any] = RecentCache()

    def encode(self, encode: Callable[..., Any], call: inspect.BoundArguments, encoders: Any, device: Any) -> Any:
        """The cached result of a call, or else the computed one. Calls with tensors among their arguments do not count.

        Args:
            encode: the pipeline's ``encode_prompt``.
            call: its arguments, defaults applied.
            encoders: its text encoders; None for one that is not loaded.
            device: where they run.
        """
        if any(isinstance(value, Tensor) for value in call.arguments.values()):
            return encode(*call.args, **call.kwargs)
        key = (repr(sorted(call.arguments.items())), str(device), *map(encoder_state, encoders))
        return self._recent.get(key, lambda: encode(*call.args, **call.kwargs))

    def clear(self) -> None:
        """Drop all embeddings."""
        self._recent.clear()


def encoder_state(text_encoder: torch.nn.Module | None) -> tuple:
    """What a text encoder's output depends on beside its input: the object, its dtype, its LoRAs and their scales."""
    if text_encoder is None:
        return ()
    layers: list[Any] = [module for module in text_encoder.modules() if hasattr(module, "lora_A")]
    loras: list[Mapping[str, Any] | tuple] = [
        (layer.active_adapters, layer.scaling, layer.disable_adapters, layer.merged) for layer in layers
    ]
    return weakref.ref(text_encoder), text_encoder.dtype, repr(loras)
