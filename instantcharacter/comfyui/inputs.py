"""Checks of what a prompt gives to a node: each input has the kind, and the range, that the node's schema declares.

ComfyUI passes any JSON that stands in place of a link, compares no number from a link with its range, and takes NaN for
one. Messages repeat no text that was typed: it may be a secret, or what no log can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

OWN_TYPES = {
    "FLUX_PIPE": "sampler.StyledPipeline",
    "CHARACTER_ENCODER": "patchers.HostedPatcher",
    "CHARACTER_ADAPTER": "hosting.HostedAdapter",
    "CHARACTER": "hosting.HostedCharacter",
    "CHARACTER_STRENGTH": "strengths.Strength",
    "INSTANTCHAR_PIPE": "nodes.deprecated.InstantCharPipe",
}
"""The pack's own types → module and class of their values. A module is imported when a node with its type runs."""


def check_inputs(declared: Iterable[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A node's inputs by their names, checked.

    Args:
        declared: the inputs in the node's schema.
        values: what ComfyUI passes. None for an optional input is as if it was not connected.

    Raises:
        ValueError: a value of another kind, or out of its range.
    """
    by_name = {each.id: each for each in declared}
    there = {name: value for name, value in values.items() if value is not None or not by_name[name].optional}
    return {name: _checked(by_name[name], value) for name, value in there.items()}


def images(value: Any, name: str = "image") -> Tensor:
    """An input as IMAGE, [B, H, W, C] in float32; values outside of 0 to 1 are clipped.

    Args:
        value: the input's value.
        name: the input's name, for the error.

    Raises:
        ValueError: not a tensor, not [B, H, W, C] with 1, 3 or 4 channels, empty, of integers, or not finite.
    """
    expected = "an IMAGE, [pictures, height, width, 3]"
    tensor = _tensor(value, name, expected)
    if tensor.ndim != 4 or tensor.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{name} is {list(tensor.shape)}; expected {expected}")
    return _clipped(tensor, name, expected)


def masks(value: Any, name: str = "mask") -> Tensor:
    """An input as MASK, [B, H, W] in float32; values outside of 0 to 1 are clipped.

    [H, W] and [B, 1, H, W] are converted. Arguments and errors are those of :func:`images`.
    """
    expected = "a MASK, [masks, height, width]"
    tensor = _tensor(value, name, expected)
    one_channel = tensor.ndim == 4 and tensor.shape[1] == 1
    if not (tensor.ndim in (2, 3) or one_channel):
        raise ValueError(f"{name} is {list(tensor.shape)}; expected {expected}")
    return _clipped(tensor.reshape(-1, *tensor.shape[-2:]), name, expected)


def _checked(declared: Any, value: Any) -> Any:
    name, kind = declared.id, declared.io_type
    if check := CHECKS.get(kind):
        return check(value, name)
    if kind in ("INT", "FLOAT"):
        return _number(value, declared)
    if kind == "COMBO":
        if not isinstance(value, str) or value not in declared.options:
            raise ValueError(f"{name} is not in its list: choose one there (reload the page with R to see new files)")
        return value
    module, class_name = OWN_TYPES[kind].rsplit(".", 1)
    if not isinstance(value, getattr(import_module(f".{module}", __package__), class_name)):
        raise _wrong_kind(value, name, f"a {kind}")
    return value


def _number(value: Any, declared: Any) -> int | float:
    whole = declared.io_type == "INT"
    wanted: Any = Integral if whole else Real
    if not isinstance(value, wanted):
        raise _wrong_kind(value, declared.id, "a whole number" if whole else "a number")
    if not declared.min <= value <= declared.max:  # false for NaN
        raise ValueError(f"{declared.id} is {value}; expected {declared.min} to {declared.max}")
    return int(value) if whole else float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_kind(value, name, "a text")
    if value.encode("utf-8", "ignore").decode() != value:
        raise ValueError(f"{name} has letters that are not UTF-8: type it again")
    return value


def _switch(value: Any, name: str) -> bool:
    if not isinstance(value, Integral):  # a bool is one
        raise _wrong_kind(value, name, "a BOOLEAN")
    return bool(value)


def _model(value: Any, name: str) -> Any:
    from comfy.model_patcher import ModelPatcher

    if not isinstance(value, ModelPatcher) or not hasattr(value.model, "diffusion_model"):
        raise _wrong_kind(value, name, "a MODEL")
    return value


def _latent(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("samples"), Tensor):
        raise _wrong_kind(value, name, "a LATENT")
    _check_finite(_tensor(value["samples"], name, "a LATENT"), name)
    return value


def _conditioning(value: Any, name: str) -> list[Any]:
    def is_prompt(item: Any) -> bool:
        return isinstance(item, (list, tuple)) and len(item) == 2 and isinstance(item[1], dict)

    expected = "a CONDITIONING"
    if not isinstance(value, list) or not value or not all(map(is_prompt, value)):
        raise _wrong_kind(value, name, expected)
    for embeddings, extra in value:
        pooled = extra.get("pooled_output")
        for tensor in (embeddings, *(() if pooled is None else (pooled,))):
            _check_finite(_tensor(tensor, name, expected), name)
    return value


def _tensor(value: Any, name: str, expected: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise _wrong_kind(value, name, expected)
    if not (value.is_floating_point() or value.dtype == torch.bool) or value.layout != torch.strided:
        raise ValueError(f"{name} is of {value.dtype}; expected {expected} of floats from 0 to 1")
    if not value.numel():
        raise ValueError(f"{name} is empty, {list(value.shape)}; expected {expected}")
    return value.float()


def _clipped(tensor: Tensor, name: str, expected: str) -> Tensor:
    """A tensor within 0 to 1: itself if it is so already, since a copy of a large picture takes memory."""
    low, high = _check_finite(tensor, name)
    return tensor if low >= 0 and high <= 1 else tensor.clamp(0, 1)


def _check_finite(tensor: Tensor, name: str) -> tuple[float, float]:
    """The least and the greatest value."""
    low, high = (bound.item() for bound in tensor.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} contains NaN or infinity: the node before it failed")
    return low, high


def _wrong_kind(value: Any, name: str, expected: str) -> ValueError:
    return ValueError(f"{name} is a {type(value).__name__}; expected {expected}: connect a node's output")


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "IMAGE": images,
    "MASK": masks,
    "LATENT": _latent,
    "CONDITIONING": _conditioning,
    "MODEL": _model,
    "STRING": _text,
    "BOOLEAN": _switch,
}
