"""Dequantisation of ComfyUI's scaled fp8 weights.

Its files have three layouts: ``scaled_fp8`` with a ``scale_weight`` for each layer; a ``weight_scale`` for each layer
with the format's name as JSON in ``comfy_quant``; and a ``weight_scale`` for each with all names in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import first_line, quoted
from .reading import check_finite

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""Formats that :func:`dequantize` reads, by ComfyUI's names."""
SCALES = ("scale_weight", "weight_scale")
AUXILIARY = (*SCALES, "weight_scale_2", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")
"""Keys beside the weights, dropped after dequantisation. Activations are not quantised, so their scales are unused."""


def check_formats(state: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Raise ``ValueError`` for weights in a format that :func:`dequantize` does not read.

    Args:
        state: of the file, auxiliary keys included.
        metadata: of the file.
        path: of the file, for the error.
    """
    try:
        formats = {key: "nvfp4" for key in state if key.endswith(".weight_scale_2")}
        texts = {key: bytes(tensor.tolist()) for key, tensor in state.items() if key.endswith(".comfy_quant")}
        formats |= {key: str(json.loads(text)["format"]) for key, text in texts.items()}
        layers = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        formats |= {layer: str(settings["format"]) for layer, settings in layers.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say how its weights are stored ({first_line(error)}): take it in 16 bits"
        ) from error
    if other := {layer: name for layer, name in formats.items() if name not in FORMATS}:
        layer, name = next(iter(other.items()))
        raise ValueError(
            f"{path} is stored as {quoted(name)} ({quoted(layer)}), which only ComfyUI's own loaders read: take it in "
            "16 bits, in plain fp8 or in scaled fp8"
        )


def dequantize(state: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> dict[str, Tensor]:
    """Weights multiplied with their scales, one at a time; others unchanged; auxiliary keys dropped.

    Args:
        state: of the file.
        dtype: of the dequantised weights.
        path: of the file, for errors.

    Raises:
        ValueError: a scale of a weight that is not fp8, or one that is neither per tensor nor per row.
    """
    weights = {}
    for key, weight in state.items():
        layer, _, kind = key.rpartition(".")
        if kind in AUXILIARY:
            continue
        scale = next((state[f"{layer}.{name}"] for name in SCALES if f"{layer}.{name}" in state), None)
        weights[key] = weight if scale is None or kind != "weight" else _scaled(weight, scale, dtype, f"{path}: {key}")
    return weights


def _scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """An fp8 weight times its scale; ``name`` is for the error."""
    rows = len(weight) if weight.ndim else 1
    if weight.dtype not in FORMATS.values() or scale.numel() not in (1, rows) or not scale.is_floating_point():
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)} with a scale of {list(scale.shape)}; expected fp8 with one "
            "scale, or one for each row: take it in 16 bits"
        )
    check_finite(scale, f"{name} has scales", "the file is damaged: fetch it again")
    if scale.numel() == 1:
        return weight.to(dtype).mul_(scale.item())  # exact before it is scaled, without a float32 copy
    return (weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))).to(dtype)
