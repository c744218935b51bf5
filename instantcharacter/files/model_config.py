"""The ``config.json`` of a model, checked before a model is built by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from torch import nn

from .errors import first_line, quoted
from .reading import UNREADABLE, read_json, unexpected

LARGEST_NUMBER = 1 << 20
"""The largest number of a config; vocabularies have 50,000 words."""
MOST_LAYERS = 200
"""Layers are modules: a number from a file must not fill the memory with them before its weights are counted."""
WEIGHTS = ("*.safetensors", "*.bin")
NAME = "config.json"
IN_CONFIG = (*UNREADABLE, ArithmeticError, AssertionError, getattr(hub_errors, "StrictDataclassError", ValueError))
"""Errors of diffusers and transformers for configs and weights that do not fit."""


def read_config(path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a JSON file of a model or a scheduler.

    Args:
        path: the file.
        defaults: settings → values of the right kind; None stands for any.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is no JSON object, or has a number that is not finite, a huge one, or a value of another kind.
    """
    return read_settings(read_json(path), path, defaults)


def read_settings(config: Any, path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model that are a part of a JSON file; see :func:`read_config`."""
    if not isinstance(config, dict):
        raise unexpected(path, f"has {quoted(config)} for a model's settings", "an object")
    for key, value in config.items():
        for number in _numbers(value):
            most = MOST_LAYERS if "layers" in key and "id" not in key else LARGEST_NUMBER
            if not math.isfinite(number) or abs(number) > most:
                raise unexpected(path, f"has {quoted(key)}: {quoted(number)}", f"numbers up to {most}")
        default = defaults.get(key)
        if default is not None and value is not None and _kind(value) != _kind(default):
            raise unexpected(path, f"has {quoted(key)}: {quoted(value)}", f"a value like {quoted(default)}")
    return config


def check_size(build: Callable[[], nn.Module], source: Path, expected: str) -> None:
    """Check that a model has no more weights than its files have bytes, before memory is taken for it.

    Args:
        build: makes the model.
        source: a file of weights, or a folder with them.
        expected: description of the expected model, for the error.

    Raises:
        ValueError: a folder without weights, a config that no model can be built by, or a larger model.
    """
    files = [path for kind in WEIGHTS for path in source.glob(kind)] if source.is_dir() else [source]
    if not files:
        raise unexpected(source, "has no weights", expected)
    with fitting(source, expected), torch.device("meta"):
        model = build()
    count, length = sum(_sizes(model)), sum(path.stat().st_size for path in files)
    if count > length:
        raise unexpected(source, f"has {length} bytes, its {NAME} states {count} weights", expected)


@contextmanager
def fitting(source: str | Path, expected: str) -> Iterator[None]:
    """Context manager that turns errors of other libraries, for files that do not fit, into ``ValueError``."""
    try:
        yield
    except (*IN_CONFIG, OSError) as error:
        if isinstance(error, OSError) and not Path(source).exists():  # of the hub, which says what is wrong with it
            raise
        raise unexpected(source, f"does not fit ({first_line(error)})", expected) from error


def _sizes(model: nn.Module) -> Iterator[int]:
    yield from (parameter.numel() for parameter in model.parameters())
    yield from (buffer.numel() for buffer in model.buffers())


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a setting, and the length of each list in it."""
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, list):
        yield len(value)
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _kind(value: Any) -> str:
    """What a value of a config is to its reader; a list may be a tuple, and a number whole or not."""
    if isinstance(value, bool):
        return "bool"
    kinds: Iterable[tuple[str, Any]] = (("number", (int, float)), ("list", (list, tuple)), ("dict", dict))
    return next((name for name, kind in kinds if isinstance(value, kind)), "text")
