"""FLUX in 8 bits (e4m3): its large layers stored in them, or their products computed in them too.

The large layers are the linear layers of FLUX's blocks, an attached character's among them: not those of modulations,
which are sensitive and have one row for each picture, and not those of LoRAs.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ..files.errors import first_line
from ..offload.sizes import blocks_of
from .fp8_layers import FP8, MULTIPLE, Fp8Linear, StoredLinear, find_kernel
from .hooks import has_diffusers_hooks

WeightDtype: TypeAlias = Literal["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"]
"""FLUX's weights, by ComfyUI's names: in the dtype of the arithmetic; stored in 8 bits; computed in 8 bits."""
CAPABILITY = (8, 9)
"""The first compute capability of NVIDIA's GPUs that multiply in 8 bits."""
NEEDED = (
    "8-bit arithmetic needs an NVIDIA GPU of compute capability 8.9 or later (GeForce RTX 40 and 50, L40, H100, B200)"
)
INSTEAD = "Choose fp8_e4m3fn (--fp8), which stores weights in 8 bits, or default"
NOT_LARGE = ("norm", "lora_")
"""Parts of the names of linear layers that are a modulation's or a LoRA's."""


def check_fp8_arithmetic(device: torch.device) -> bool:
    """Whether a device's product in 8 bits takes a scale for each row; see :class:`~.fp8_layers.Fp8Linear`.

    torch's product takes them on data centre GPUs and on Linux. On Windows, and on GeForce RTX 50 under some versions,
    it takes a scale for each matrix.

    Raises:
        ValueError: the device has no product in 8 bits.
    """
    if device.type != "cuda":
        raise ValueError(f"{NEEDED}; this device is {device.type}. {INSTEAD}.")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ValueError(f"{NEEDED}; {name} has {capability[0]}.{capability[1]}. {INSTEAD}.")
    find_kernel(device)
    layer = nn.utils.skip_init(nn.Linear, 256, 256, device=device)  # without random numbers, which others count on
    inputs, reason = torch.ones(256, 256, dtype=torch.bfloat16, device=device), ""
    for by_rows in (True, False):
        try:
            Fp8Linear(layer, torch.bfloat16, by_rows)(inputs)
            return by_rows
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = first_line(error)
    raise ValueError(f"torch {torch.__version__} has no 8-bit arithmetic for {name} ({reason}). {INSTEAD}.")


def set_weight_dtype(
    transformer: FluxTransformer2DModel, dtype: torch.dtype, weight_dtype: WeightDtype, device: torch.device
) -> None:
    """Call :func:`compute_in_fp8`, or :func:`store_in_fp8` if FLUX is not quantised, or neither, as asked for.

    Raises:
        ValueError: 8-bit arithmetic for a quantised FLUX, or on a device without it.
    """
    if weight_dtype == "fp8_e4m3fn_fast":
        compute_in_fp8(transformer, dtype, check_fp8_arithmetic(device), device)
    elif weight_dtype == "fp8_e4m3fn" and not getattr(transformer, "is_quantized", False):
        store_in_fp8(transformer, dtype)


def store_in_fp8(transformer: FluxTransformer2DModel, dtype: torch.dtype) -> None:
    """Store FLUX's large layers in 8 bits; each casts its weights to the dtype of its input when it runs.

    diffusers stores the layers before the blocks in 8 bits, and then knows the dtype that FLUX computes in. Its hooks
    on all layers would keep FLUX in memory until Python's garbage collection, and could not be compiled.

    Args:
        transformer: in any floating dtype.
        dtype: that it computes in, and that everything else is stored in.
    """
    for block in blocks_of("transformer", transformer):
        for name, layer in _large_layers(block):
            block.set_submodule(name, StoredLinear(layer, dtype))
    transformer.enable_layerwise_casting(
        storage_dtype=FP8, compute_dtype=dtype, skip_modules_pattern=("_blocks", "^proj_out$", *NOT_LARGE)
    )
    _convert_others(transformer, dtype)


def compute_in_fp8(
    transformer: FluxTransformer2DModel, dtype: torch.dtype, by_rows: bool, device: torch.device | None = None
) -> None:
    """Have FLUX's large layers multiply in 8 bits. Layers that do already are left alone.

    Args:
        transformer: in any floating dtype. Weights that are in e4m3 are not rounded again.
        dtype: of activations, and of everything else's weights.
        by_rows: from :func:`check_fp8_arithmetic`.
        device: where weights are rounded; a GPU takes seconds for it, a CPU a minute.

    Raises:
        ValueError: FLUX is quantised in another way, or its weights are offloaded.
    """
    if getattr(transformer, "is_quantized", False):
        raise ValueError("FLUX is quantised (GGUF?): 8-bit arithmetic needs FLUX.1 in bf16, fp16 or plain fp8")
    if any(parameter.is_meta for parameter in transformer.parameters()):
        raise ValueError("the transformer's weights are offloaded: enable 8-bit arithmetic before enabling offload")
    for block in blocks_of("transformer", transformer):
        quantize_layers(block, dtype, by_rows, device)
    _convert_others(transformer, dtype)


def quantize_layers(module: nn.Module, dtype: torch.dtype, by_rows: bool, device: torch.device | None = None) -> None:
    """Replace the large layers of a block, or of a part of it, by layers that multiply in 8 bits.

    Args:
        module: stays where it is; its layers have multiples of 16 outputs, or stay as they are.
        dtype: see :func:`compute_in_fp8`.
        by_rows: see :func:`compute_in_fp8`.
        device: see :func:`compute_in_fp8`.
    """
    for name, layer in _large_layers(module):
        if layer.out_features % MULTIPLE == 0:
            module.set_submodule(name, Fp8Linear(layer, dtype, by_rows, device))


def first_fp8_layer(transformer: nn.Module) -> Fp8Linear | None:
    """The first layer that multiplies in 8 bits; None if FLUX does not compute in them."""
    return next((module for module in transformer.modules() if isinstance(module, Fp8Linear)), None)


def check_fusible(transformer: nn.Module) -> None:
    """Raise ``ValueError`` if weights are in 8 bits, which would round a LoRA that is added to them away."""
    if any(isinstance(module, Fp8Linear | StoredLinear) for module in transformer.modules()):
        raise ValueError(
            "a LoRA cannot be fused into weights in 8 bits: leave it beside them, as load_lora_weights and "
            "set_adapters do, or fuse it before FLUX is stored or computes in 8 bits"
        )


def check_savable(transformer: nn.Module) -> None:
    """Raise ``ValueError`` if weights have scales of their own, which diffusers would not read again."""
    if first_fp8_layer(transformer):
        raise ValueError(
            "diffusers cannot read FLUX's weights for 8-bit arithmetic: save the pipeline before enabling it"
        )


def _large_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The large layers of FLUX, or of a part of it, by name, without those that multiply in 8 bits."""
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and not isinstance(layer, Fp8Linear)
        and not any(map(name.__contains__, NOT_LARGE))
    ]


def _convert_others(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Store everything in ``dtype`` that is not in 8 bits."""
    for module in transformer.modules():
        if not isinstance(module, Fp8Linear | StoredLinear) and not has_diffusers_hooks(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
