"""Reads a training's YAML file into a :class:`~instantcharacter.training.config.TrainingConfig`.

Not by pydantic, which ComfyUI ships: its lax mode takes ``steps: true`` for 1 and ignores unknown settings, its strict
mode refuses a mapping for a dataclass (2.14), and rewording its messages takes as many lines as the code here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .config import TrainingConfig


def read_config(path: str | Path) -> TrainingConfig:
    """Read a training's YAML file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is not YAML, or a setting is missing, unknown, of another type or out of its range.
    """
    try:
        content = yaml.safe_load(Path(path).read_bytes())  # bytes: YAML tells UTF-8 and UTF-16 by their marks
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return _to_dataclass(TrainingConfig, content, str(path))


def _to_dataclass(kind: Any, settings: Any, where: str) -> Any:
    """An instance of the dataclass ``kind``; ``where`` begins every error message."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where}: expected settings, found {settings!r}")
    hints = get_type_hints(kind)
    if unknown := [name for name in settings if name not in hints]:
        raise ValueError(f"{where}: there is no setting {unknown[0]!r}; expected some of {', '.join(hints)}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in settings]:
        raise ValueError(f"{where}: {missing[0]} is missing")
    values = {name: _to_type(hints[name], value, f"{where}: {name}") for name, value in settings.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _to_type(kind: Any, value: Any, where: str) -> Any:
    """The value as an annotation asks for it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _to_type(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; expected a list")
        return tuple(_to_type(arguments[0], item, f"{where} {i}") for i, item in enumerate(value))
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}; expected {' or '.join(arguments)}")
        return value
    if hasattr(kind, "__dataclass_fields__"):
        return _to_dataclass(kind, value, where)
    accepted = {int: (int,), float: (int, float, str), str: (str,), bool: (bool,), Path: (str,)}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}")
    try:
        return kind(value)  # YAML reads 1e-4 as a string
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where} is {value!r}; expected {kind.__name__}") from error
