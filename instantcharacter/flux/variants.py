"""Kinds of FLUX, and forms to store it in, that Load FLUX does not support, by their keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files.errors import escaped

Shapes = Mapping[str, Sequence[int]]
"""A model's keys, without a prefix, each with its tensor's shape."""
INPUT = ("img_in.weight", "x_embedder.weight")
NATIVE = "take ComfyUI's Load Diffusion Model and InstantCharacter Apply with KSampler"
FLUX_1 = "take FLUX.1 dev, schnell, Krea or Kontext"


class Variant(NamedTuple):
    """A kind of FLUX, or a form to store it in, that Load FLUX refuses.

    Attributes:
        name: as in "this is …".
        matches: whether a model is of this kind.
        advice: the reason for the refusal, and what to do instead.
        native: whether InstantCharacter Apply supports it, on a MODEL of ComfyUI's own loaders.
    """

    name: str
    matches: Callable[[Shapes], bool]
    advice: str
    native: bool = False


def _has(*parts: str) -> Callable[[Shapes], bool]:
    """Whether one of these parts is in a key."""
    return lambda shapes: any(part in key for key in shapes for part in parts)


def _takes(channels: int) -> Callable[[Shapes], bool]:
    """Whether the model has this many input channels."""
    return lambda shapes: input_channels(shapes) == channels


def input_channels(shapes: Shapes) -> int | None:
    """The number of input channels; None for a model that is no FLUX, and for packed weights."""
    shape = next((shapes[key] for key in INPUT if key in shapes), ())
    return shape[1] if len(shape) == 2 else None


VARIANTS = (
    Variant(
        "FLUX.2",
        _has("double_stream_modulation_img."),
        f"InstantCharacter's adapter is made for FLUX.1: {FLUX_1}",
    ),
    Variant(
        "Chroma",
        _has("distilled_guidance_layer."),
        f"InstantCharacter's adapter is made for FLUX.1: {FLUX_1}",
    ),
    Variant(
        "FLUX in NF4 (bitsandbytes)",
        _has("bitsandbytes__", ".weight.absmax", ".weight.quant_map"),
        f"InstantCharacter does not read NF4: {FLUX_1} in GGUF, which is as small",
    ),
    Variant(
        "FLUX for Nunchaku (SVDQuant)",
        _has(".qweight", ".wscales", ".smooth_factor"),
        f"only Nunchaku's own nodes read it, with which InstantCharacter does not work: {FLUX_1} in GGUF or plain fp8",
    ),
    Variant(
        "FLUX.1 Fill (384 input channels)",
        _takes(384),
        f"it needs a picture and a mask, which the Sampler does not give it: {NATIVE} and InpaintModelConditioning, "
        f"or {FLUX_1}",
        native=True,
    ),
    Variant(
        "FLUX.1 Canny or Depth (128 input channels)",
        _takes(128),
        f"it needs a control picture, which the Sampler does not give it: {NATIVE} and InstructPixToPixConditioning, "
        f"or {FLUX_1}",
        native=True,
    ),
    Variant(
        "in scaled fp8, or in another quantised form of ComfyUI's",
        _has("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant"),
        f"only ComfyUI's own loaders read that: {NATIVE}, or {FLUX_1} in bf16, fp16, plain fp8 or GGUF",
        native=True,
    ),
)
"""The first match counts. Forms to store FLUX in come last, since FLUX.2 is FLUX.2 in every form."""


def variant(shapes: Shapes) -> Variant | None:
    """The one of :data:`VARIANTS` that a model is; None for FLUX.1 as Load FLUX supports it, and for other models.

    Args:
        shapes: the keys of a file or of a loaded model, in the released layout, ComfyUI's or diffusers'.
    """
    return next((kind for kind in VARIANTS if kind.matches(shapes)), None)


def check_variant(shapes: Shapes, path: Path) -> None:
    """Raise ``ValueError`` for an unsupported kind of FLUX, or an unsupported form to store it in."""
    if kind := variant(shapes):
        raise ValueError(f"{escaped(path)} is {kind.name}; {kind.advice}")
