"""What the pack reads of ComfyUI's internals, one function each.

ComfyUI documents none of these, and may change them. ``tests/comfyui/inside/test_internals.py`` then fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor, nn

MANUAL_CAST_DTYPE = "manual_cast_dtype"
"""The MODEL's attribute that the node Model Compute Dtype sets."""


def loaded_models() -> list[Any]:
    """ComfyUI's records of the models on a device; each has its ``ModelPatcher`` as ``model``."""
    return management.current_loaded_models


def unload(patcher: Any) -> None:
    """Move the weights of a ``ModelPatcher`` off its device now."""
    others = [loaded for loaded in loaded_models() if loaded.model is not patcher]
    management.free_memory(1e30, patcher.load_device, keep_loaded=others)


def free_memory_for_models(device: torch.device) -> int:
    """Bytes on a device that models may fill; ComfyUI reserves the rest."""
    return management.get_free_memory(device) - management.extra_reserved_memory()


def free_memory_beside(model: Any, latents_shape: Sequence[int]) -> float:
    """Bytes on a MODEL's device that neither its weights, loaded or not, nor its activations need.

    ComfyUI runs prompts in one batch if 1.5 times their activations fit.
    """
    absent = model.model_size() - model.loaded_size()
    return free_memory_for_models(model.load_device) - absent - 1.5 * model.memory_required(list(latents_shape))


def pins_memory() -> bool:
    """Whether ComfyUI may lock host memory in place, which ``--disable-pinned-memory`` forbids."""
    return management.MAX_PINNED_MEMORY > 0


def load_background_removal(path: Path) -> Callable[[Tensor], Tensor] | None:
    """A background removal model from its file: a function from IMAGE to MASK, white for the foreground.

    None for a file that is no such model for ComfyUI. ComfyUI loads the weights onto its device when the function is
    called, and unloads them for other models.
    """
    from comfy.bg_removal_model import load  # ComfyUI's since it has the folder

    model = load(str(path))
    return model and model.encode_image


def query_norms(flux: Any) -> Iterator[nn.Module]:
    """The norm of the image's query in each block of ComfyUI's ``Flux``, double blocks first."""
    yield from (block.img_attn.norm.query_norm for block in flux.double_blocks)
    yield from (block.norm.query_norm for block in flux.single_blocks)


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype that a MODEL computes in. The node Model Compute Dtype changes it when the MODEL is loaded."""
    return model.get_model_object(MANUAL_CAST_DTYPE) or model.model.get_dtype()


def block_and_image_start(extra_options: dict[str, Any], double_blocks: int) -> tuple[int, int]:
    """The block that an attention patch is called in, double blocks first, and its first image token."""
    offset = double_blocks if extra_options["block_type"] == "single" else 0
    return extra_options["block_index"] + offset, extra_options["img_slice"][0]


def apply_model_options(executor: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's transformer options among the arguments of an ``APPLY_MODEL`` wrapper."""
    return transformer_options(executor, args[2:], kwargs)


def is_compiled(options: dict[str, Any]) -> bool:
    """Whether the node TorchCompileModel, or another that does as it does, compiles the MODEL of these options."""
    return COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def transformer_options(executor: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's transformer options among the arguments of a ``DIFFUSION_MODEL`` wrapper after latents and timestep.

    ComfyUI passes them by position or by name.
    """
    position = _options_position(executor)
    return args[position] if position < len(args) else kwargs["transformer_options"]


def with_transformer_options(
    executor: Any, args: tuple, kwargs: dict[str, Any], options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with other transformer options."""
    position = _options_position(executor)
    if position < len(args):
        return (*args[:position], options, *args[position + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": options}


def _options_position(executor: Any) -> int:
    return list(inspect.signature(executor.original).parameters).index("transformer_options") - 2


def has_inner_wrappers(executor: Any) -> bool:
    """Whether other wrappers run inside of this one; they may skip the call of FLUX."""
    return executor.idx + 1 < len(executor.wrappers)
