"""Checks of ComfyUI and of a MODEL before a character is applied to it."""

from __future__ import annotations

from typing import Any

import comfy.ldm.flux.model
import comfyui_version

from ..flux.variants import variant
from .hosting import HostedAdapter
from .internals import query_norms

REQUIRED_COMFYUI = (0, 17)


def check_comfyui() -> None:
    """Raise ``RuntimeError`` if ComfyUI is too old to have the patch points of Apply."""
    if tuple(int(number) for number in comfyui_version.__version__.split(".")[:2]) < REQUIRED_COMFYUI:
        raise RuntimeError(
            f"InstantCharacter Apply needs ComfyUI {'.'.join(map(str, REQUIRED_COMFYUI))} or newer, this is "
            f"{comfyui_version.__version__}: update ComfyUI, or use InstantCharacter Sampler"
        )


def check_flux(flux: Any, adapter: HostedAdapter) -> None:
    """Raise ``ValueError`` unless a MODEL's diffusion model is FLUX.1 of the adapter's size."""
    kind = variant({name: weight.shape for name, weight in flux.named_parameters()})
    if kind and not kind.native:
        raise ValueError(f"this MODEL is {kind.name}: {kind.advice}")
    if not isinstance(flux, comfy.ldm.flux.model.Flux) or flux.params.global_modulation:
        raise ValueError(
            f"this MODEL is {type(flux).__name__}; InstantCharacter needs FLUX.1 (dev, schnell, Krea, Kontext) "
            "from a loader that builds ComfyUI's own, such as Load Diffusion Model or ComfyUI-GGUF's"
        )
    adapter.adapter.check_fits(flux.hidden_size, flux.num_heads, len(list(query_norms(flux))))
