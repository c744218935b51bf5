"""Weights that ComfyUI stores in 8 bits with a scale beside each, made numbers again.

Its files come in three generations, which say the same: ``scaled_fp8`` with a ``scale_weight`` for each layer;
``weight_scale`` with the form's name as JSON in ``comfy_quant``; and ``weight_scale`` with all names in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FORMS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Those that are read, by ComfyUI's names."""
SCALES = ("scale_weight", "weight_scale")
BESIDE = (*SCALES, "weight_scale_2", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")
"""What there is beside the weights; inputs are not quantised here, so that their scales do not count."""


def check_forms(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Raise ``ValueError`` for weights in a form that :func:`dequantised` does not read.

    Args:
        state: weights, and what is beside them.
        metadata: their file's.
        path: their file, for the error.
    """
    try:
        forms = {key: "nvfp4" for key in state if key.endswith(".weight_scale_2")}
        told = {key: bytes(tensor.tolist()) for key, tensor in state.items() if key.endswith(".comfy_quant")}
        forms |= {key: str(json.loads(text)["format"]) for key, text in told.items()}
        layers = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        forms |= {layer: str(settings["format"]) for layer, settings in layers.items()}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} does not say how its weights are stored ({error}): take it in 16 bits") from error
    if other := {layer: form for layer, form in forms.items() if form not in FORMS}:
        layer, form = next(iter(other.items()))
        raise ValueError(
            f"{path} is stored as {form} ({layer}), which only ComfyUI's own loaders read: take it in 16 bits, in "
            "plain fp8 or in scaled fp8"
        )


def dequantised(state: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> dict[str, Tensor]:
    """The weights times their scales, one at a time; the others as they are, and nothing of what is beside them.

    Args:
        state: weights, each with its scale, if it has one.
        dtype: what weights that have a scale become.
        path: their file, for errors.

    Raises:
        ValueError: a scale of a weight that is not in fp8, or one that is neither for all of it nor for each row.
    """
    numbers = {}
    for key, weight in state.items():
        layer, _, kind = key.rpartition(".")
        if kind in BESIDE:
            continue
        scale = next((state[f"{layer}.{name}"] for name in SCALES if f"{layer}.{name}" in state), None)
        numbers[key] = weight if scale is None or kind != "weight" else _scaled(weight, scale, dtype, f"{path}: {key}")
    return numbers


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if weight.dtype not in FORMS.values() or scale.numel() not in (1, len(weight)):
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)} with a scale of {list(scale.shape)}; expected fp8 with one "
            "scale, or one for each row: take it in 16 bits"
        )
    if scale.numel() == 1:
        return weight.to(dtype).mul_(scale.item())  # exact until it is scaled, and nothing larger on the way
    return (weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
