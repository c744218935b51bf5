"""What a FLUX pipeline with a character consists of, and how diffusers moves and runs its models for a memory plan."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..offload.planning import MemoryPlan
from ..offload.sizes import PHASE, ComponentModules
from .hooks import restart_caches

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..character.encoders import CharacterEncoder
    from ..model.adapter import CharacterAdapter

VAE_TILE = 512
"""Side of the tiles that the VAE decodes under a plan that has it decode in tiles, in pixels."""


def components_of(
    models: Any, encoder: CharacterEncoder | None = None, adapter: CharacterAdapter | None = None
) -> ComponentModules:
    """The modules that run by themselves, by component, in the order of :data:`~instantcharacter.offload.sizes.PHASE`.

    Args:
        models: a FLUX pipeline, or anything with its ``text_encoder``, ``text_encoder_2``, ``vae`` and ``transformer``.
        encoder: of reference pictures, if there is one.
        adapter: whose projector makes characters and their tokens, if there is one.
    """
    vae = [getattr(models.vae, name, None) for name in ("encoder", "quant_conv", "post_quant_conv", "decoder")]
    found: dict[str, list[nn.Module | None]] = {
        "text_encoder": [models.text_encoder],
        "text_encoder_2": [models.text_encoder_2],
        "siglip": [encoder and encoder.siglip],
        "dinov2": [encoder and encoder.dinov2],
        "fusion": _fusion_modules(adapter) if encoder and adapter else [],
        "resampler": [adapter and adapter.projector.resampler],
        "transformer": [models.transformer],
        "vae": vae,
    }
    present = {name: [module for module in found[name] if module is not None] for name in PHASE}
    return {name: modules for name, modules in present.items() if modules}


def _fusion_modules(adapter: CharacterAdapter) -> list[nn.Module | None]:
    """The modules of the projector's fusion, which run one after another."""
    children = [child for name, child in adapter.projector.named_children() if name != "resampler"]
    return [module for child in children for module in (child if isinstance(child, nn.ModuleList) else [child])]


class DiffusersControls:
    """What diffusers does for a memory plan: see :class:`~instantcharacter.offload.offloader.LibraryControls`.

    Args:
        pipeline: referenced weakly, since it owns the offloader that these controls are for.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._reference = weakref.ref(pipeline)
        self._decoding: PiecewiseDecoding | None = None

    @property
    def _pipeline(self) -> Any:
        return self._reference()

    def apply(self, plan: MemoryPlan, device: torch.device) -> None:
        """Use diffusers' own offloading if the plan does, and decode one picture, or one tile, at a time."""
        pipeline = self._pipeline
        forget_gpu(pipeline)
        if plan.strategy == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif plan.strategy == "sequential" and device.type != "cpu":  # accelerate cannot offload from the CPU
            pipeline.enable_sequential_cpu_offload(device=device)
        self._decoding = PiecewiseDecoding(pipeline.vae, pipeline.vae_scale_factor)
        self._decoding.apply(sliced=plan.strategy != "none", tiled=plan.tiled)
        restart_caches(pipeline.transformer)  # the step in which memory ran out is computed again

    def undo(self) -> None:
        """Remove diffusers' offloading, and have the VAE decode as before."""
        self._pipeline.remove_all_hooks()
        if self._decoding:
            self._decoding.undo()
            self._decoding = None


def forget_gpu(pipeline: DiffusionPipeline) -> None:
    """Have diffusers offload from the GPU that it is told: in place of the first one it takes that of the last time."""
    vars(pipeline).pop("_offload_gpu_id", None)


class PiecewiseDecoding:
    """Has a VAE decode one picture at a time, or one tile, until :meth:`undo`.

    Args:
        vae: of diffusers.
        scale_factor: pixels of a picture to one of its latents.
    """

    def __init__(self, vae: Any, scale_factor: int) -> None:
        self._vae = vae
        self._tile = {"tile_sample_min_size": VAE_TILE, "tile_latent_min_size": VAE_TILE // scale_factor}
        self._before = {name: getattr(vae, name) for name in self._tile if hasattr(vae, name)}
        self._sliced, self._tiled = getattr(vae, "use_slicing", False), getattr(vae, "use_tiling", False)

    def apply(self, sliced: bool, tiled: bool) -> None:
        """Decode sliced and tiled, where that is asked for or was so before."""
        if sliced:
            self._vae.enable_slicing()
        if tiled:
            self._vae.enable_tiling()
            for name in self._before:
                setattr(self._vae, name, self._tile[name])

    def undo(self) -> None:
        """Decode as before."""
        if not self._sliced:
            self._vae.disable_slicing()
        if not self._tiled:
            self._vae.disable_tiling()
        for name, value in self._before.items():
            setattr(self._vae, name, value)
