"""Style LoRAs for FLUX.1, in all layouts that trainers write.

Every layout has the same layers, by the released names or diffusers', with dots or (kohya's) underscores, after one of
several prefixes. A name without its prefix, flattened to underscores, identifies the layer. Files for other models and
of other kinds are recognised by their keys, see :mod:`.lora_kinds`, and refused.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.errors import escaped, first_few, first_line, quoted
from ..files.reading import (
    LARGEST_WEIGHT,
    check_finite,
    check_weights,
    parse_json,
    read_pickle,
    read_safetensors,
    unexpected,
)
from .attn_processor import compute_dtype
from .layout import AROUND_BLOCKS, BLOCKS, QKV, SWAPPED, TEXT_QKV, split_rows
from .lora_kinds import CONTROL, OTHER_MODEL, kind_of, refusal
from .pipeline import CharacterPipelineMixin

logger = logging.getLogger(__name__)

Layers = Mapping[str, Mapping[str, Tensor]]
"""The layers of a file, and the tensors of each by the names in :data:`TENSORS`."""
Names = Mapping[str, tuple[str, ...]]
"""The layers of a file, and the names of the model's layers that each of them changes."""
Matrices = Mapping[tuple[str, str], Tensor]
"""The matrices of a LoRA, see :func:`_matrices`."""

EXPECTED = "a LoRA for FLUX.1"
TENSORS = {
    "down": ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight", "down.weight"),
    "up": ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight", "up.weight"),
    "alpha": ("alpha",),
    "magnitude": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
"""The tensors that a LoRA has for a layer, and the ends of their keys; the longest end that matches counts."""
ENDS = sorted(((f".{end}", part) for part, ends in TENSORS.items() for end in ends), key=lambda pair: -len(pair[0]))
PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.)?(diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_|lycoris_)?"
)
"""Prefixes of FLUX's layers."""
CLIP_PREFIX = re.compile(r"^(lora_te1?_|text_encoders\.clip_l\.transformer\.|text_encoder\.)(text_model[._])?")
"""Prefixes of CLIP's layers."""
TEXT_PREFIX = re.compile(r"^(lora_te\d?_|text_encoders?[._])")
"""Prefixes of any text encoder's layers."""
XLABS = {
    "double_blocks": {
        "processor.qkv_lora1": QKV,
        "processor.qkv_lora2": TEXT_QKV,
        "processor.proj_lora1": ("attn.to_out.0",),
        "processor.proj_lora2": ("attn.to_add_out",),
    },
    "single_blocks": {"processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",)},
}
"""XLabs' names of a LoRA's layers in a block, and diffusers' layers."""


def load_lora(pipeline: CharacterPipelineMixin, path: Path, name: str) -> None:
    """Load a LoRA into FLUX, and its layers for CLIP into CLIP.

    The rest of the file is left out, with a warning: a DoRA's magnitudes, layers of T5, and layers that this FLUX does
    not have.

    Args:
        pipeline: FLUX may be stored in any way; the LoRA takes the dtype that FLUX computes in.
        path: the file, in kohya's, XLabs', peft's, ComfyUI's or diffusers' layout.
        name: for ``set_adapters``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is cut off, is for another model or of another width, is no LoRA, or has no layer of
            the pipeline's models.
    """
    tensors, metadata = read_lora(path)
    layers = _by_layer(tensors)
    flux, text = _match_layers(path, layers, pipeline.transformer, pipeline.text_encoder)
    settings = _read_settings(metadata, path)
    if any("magnitude" in parts for parts in layers.values()):
        logger.warning("%s is a DoRA: its magnitudes are left out, the rest is used", path.name)
    model, clip = pipeline.transformer, pipeline.text_encoder
    of_flux = dict(_matrices(path, layers, flux, model, compute_dtype(model), settings.get("transformer", {})))
    of_clip = dict(_matrices(path, layers, text, clip, clip.dtype, settings.get("text_encoder", {}))) if text else {}
    with pipeline.models_changing():
        if of_flux:
            _load_into_flux(pipeline, of_flux, name)
        if of_clip:
            _load_into_clip(pipeline, of_clip, name)


def _load_into_flux(pipeline: CharacterPipelineMixin, matrices: Matrices, name: str) -> None:
    model = pipeline.transformer
    state = {f"transformer.{layer}.lora_{side}.weight": matrix for (layer, side), matrix in matrices.items()}
    pipeline.load_lora_into_transformer(
        state, network_alphas=None, transformer=model, adapter_name=name, low_cpu_mem_usage=True
    )
    _restore_matrices(model, matrices, name)


def _load_into_clip(pipeline: CharacterPipelineMixin, matrices: Matrices, name: str) -> None:
    model, ends = pipeline.text_encoder, {"A": "lora_linear_layer.down", "B": "lora_linear_layer.up"}
    state = {f"text_encoder.{layer}.{ends[side]}.weight": matrix for (layer, side), matrix in matrices.items()}
    pipeline.load_lora_into_text_encoder(
        state, None, model, prefix="text_encoder", adapter_name=name, low_cpu_mem_usage=True
    )
    _restore_matrices(model, matrices, name)


def _restore_matrices(model: nn.Module, matrices: Matrices, name: str) -> None:
    """Put a loaded LoRA's own matrices back, and set every layer's scale to 1.

    diffusers casts the matrices to the dtype that the model is stored in, which may be fp8, and older versions take one
    alpha for layers of different ranks. Here the scale of each layer is in its matrices.
    """
    for (name_of_layer, side), matrix in matrices.items():
        layer: Any = model.get_submodule(name_of_layer)
        getattr(layer, f"lora_{side}")[name].weight.data = matrix
        layer.lora_alpha[name] = layer.r[name]
        layer.scaling[name] = 1.0


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a LoRA's file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is cut off, or is known to be something else than a LoRA for FLUX.1.
    """
    tensors, metadata = _read(path)
    if kind := kind_of(tensors):
        raise ValueError(refusal(path, tensors, kind))
    return tensors, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix in (".safetensors", ".sft"):
        return read_safetensors(path, EXPECTED)
    content = read_pickle(path, EXPECTED)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise unexpected(path, "holds more than tensors, or none", EXPECTED)
    return {str(key): tensor for key, tensor in content.items()}, {}


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, by the names in :data:`TENSORS`. Any other tensor is a layer of its own."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end, part = next(((end, part) for end, part in ENDS if key.endswith(end)), ("", "other"))
        layers.setdefault(key.removesuffix(end), {})[part] = tensor
    return layers


def _flux_layers(transformer: Any) -> dict[str, tuple[str, ...]]:
    """diffusers' layers, in order, by each flattened name that a file may have for them."""
    known = set(_linear_layers(transformer))
    released = AROUND_BLOCKS | {name: (name,) for name in known}
    for kind, (theirs, names) in BLOCKS.items():
        for i in range(len(getattr(transformer, theirs))):
            for name, parts in (names | XLABS[kind]).items():
                released[f"{kind}.{i}.{name}"] = tuple(f"{theirs}.{i}.{part}" for part in parts)
    return {_flat(name): parts for name, parts in released.items() if known.issuperset(parts)}


def _clip_layers(clip: nn.Module) -> dict[str, tuple[str, ...]]:
    return {_flat(name.removeprefix("text_model.")): (name,) for name in _linear_layers(clip)}


def _linear_layers(model: nn.Module) -> Iterator[str]:
    """The names of a model's linear layers, without what LoRAs added."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and ".base_layer" not in name and ".lora_" not in name:
            yield name


def _found(layers: Layers, prefix: re.Pattern, known: Names) -> dict[str, tuple[str, ...]]:
    """The model's layers for each layer in a file that is complete, and that the model has."""
    flat = {layer: _flat(prefix.sub("", layer)) for layer, parts in layers.items() if _is_complete(parts)}
    return {layer: known[name] for layer, name in flat.items() if name in known and prefix.match(layer)}


def _is_complete(parts: Mapping[str, Tensor]) -> bool:
    """Whether a layer has both matrices, and no alpha or one number."""
    down, up, alpha = (parts.get(name) for name in ("down", "up", "alpha"))
    if down is None or up is None or (alpha is not None and alpha.numel() != 1):
        return False
    return down.ndim == up.ndim == 2 and down.numel() > 0


def _match_layers(path: Path, layers: Layers, transformer: Any, clip: Any) -> tuple[Names, Names]:
    """FLUX's and CLIP's layers for the layers of a file.

    Raises:
        ValueError: most layers are of other models, or of other sizes.
    """
    flux = _found(layers, PREFIX, _flux_layers(transformer))
    text = {} if clip is None else _found(layers, CLIP_PREFIX, _clip_layers(clip))
    text = {layer: names for layer, names in text.items() if _fits(layers[layer], clip, names)}
    rest = [layer for layer in layers if layer not in flux and layer not in text]
    foreign = [layer for layer in rest if "down" in layers[layer] and not TEXT_PREFIX.match(layer)]
    if len(flux) < len(foreign) or not (flux or text):
        raise ValueError(
            f"{path} is no LoRA for what is loaded: {len(flux)} of its layers are FLUX.1's, {len(text)} CLIP's"
            f"{' (which is not loaded)' if clip is None else ''}, and {len(rest)} neither, such as {first_few(rest)}; "
            f"{OTHER_MODEL}, or try ComfyUI's own Load LoRA"
        )
    for layer, names in flux.items():
        _check_size(path, layer, layers[layer], transformer, names)
    if not flux:
        logger.warning("%s changes CLIP alone, and nothing of FLUX: it acts on words, not on CONDITIONING", path.name)
    if rest:
        logger.warning("%s: %d of %d layers in it are not used: %s", path.name, len(rest), len(layers), first_few(rest))
    return flux, text


def _check_size(path: Path, layer: str, parts: Mapping[str, Tensor], model: nn.Module, names: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless a layer's matrices fit the model's layers."""
    inputs, *outputs = _sizes(model, names)
    takes, gives = parts["down"].shape[-1], len(parts["up"])
    if names == ("x_embedder",) and takes > inputs:
        raise ValueError(refusal(path, [f"{layer}, which takes {takes} channels"], CONTROL))
    if not _fits(parts, model, names):
        raise ValueError(
            f"{path} is for a model of another width: {layer} takes {takes} numbers and gives {gives}, but here it "
            f"takes {inputs} and gives {sum(outputs)}; {OTHER_MODEL}, of this width"
        )


def _matrices(
    path: Path, layers: Layers, found: Names, model: nn.Module, dtype: torch.dtype, settings: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """The matrices of the model's layers, by a layer's name and ``"A"`` or ``"B"``; B·A is added to its weight.

    Args:
        path: of the file, for errors.
        layers: of the file.
        found: the model's layers for each of them.
        model: FLUX or CLIP.
        dtype: of the matrices.
        settings: of diffusers, see :func:`_read_settings`.

    Raises:
        ValueError: matrices or scales that are no finite numbers.
    """
    for layer, names in found.items():
        down, up, alpha = (layers[layer].get(part) for part in ("down", "up", "alpha"))
        assert down is not None and up is not None
        check_weights({f"{layer} down": down, f"{layer} up": up}, path, EXPECTED)
        released = SWAPPED if _flat(PREFIX.sub("", layer)) == _flat(SWAPPED) else layer
        for name, rows in zip(names, split_rows(released, up, _sizes(model, names)[1:]), strict=True):
            scale = _scale(settings, name, len(down)) if alpha is None else _number(alpha.item()) / len(down)
            if not math.isfinite(scale):
                raise unexpected(path, f"scales its layer {quoted(layer)} by {scale}", EXPECTED)
            # each matrix takes about the root of the scale, so that both stay in range
            root = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
            matrices = {"A": down.to(dtype) * (scale / root), "B": rows.to(dtype) * root}
            for side, matrix in matrices.items():
                found_here = f"{escaped(path)} has weights in {quoted(layer)}"
                check_finite(matrix, found_here, "the file is damaged, or its training failed")
                yield (name, side), matrix


def _sizes(model: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """The number of inputs of a model's layers, which is one for all, and of outputs of each."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    return [modules[0].in_features, *(module.out_features for module in modules)]


def _fits(parts: Mapping[str, Tensor], model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the two matrices are of one rank, and of the size of the model's layers."""
    (inputs, *outputs), rank = _sizes(model, names), len(parts["down"])
    return (*parts["up"].shape, *parts["down"].shape) == (sum(outputs), rank, rank, inputs)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale of a layer by diffusers' settings; 1 without settings."""
    patterns = settings.get("alpha_pattern") or {}
    fitting = (alpha for name, alpha in patterns.items() if f".{module}".endswith(f".{name}"))
    alpha = next(fitting, settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _read_settings(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """The settings that diffusers writes into a LoRA's metadata, by model, their alphas as numbers.

    The patterns of peft may be any regular expressions; in files they are names of layers, and others are refused.
    """
    settings: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json(metadata.get("lora_adapter_metadata", "{}")).items():
            model, _, name = key.partition(".")
            settings.setdefault(model, {})[name] = value
        for values in settings.values():
            if values.get("lora_alpha") is None:
                values.pop("lora_alpha", None)
            else:
                values["lora_alpha"] = _number(values["lora_alpha"])
            patterns = values.get("alpha_pattern") or {}
            values["alpha_pattern"] = {_layer_name(name): _number(alpha) for name, alpha in patterns.items()}
    except (ValueError, AttributeError, TypeError) as error:
        problem = f"has settings in its metadata that cannot be read ({first_line(error)})"
        raise unexpected(path, problem, EXPECTED) from error
    return settings


def _number(value: Any) -> float:
    """A number from a file; NaN for what is none, or for one that no float holds."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST_WEIGHT else math.nan


def _layer_name(pattern: str) -> str:
    """The name that a regular expression of peft stands for."""
    name = pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"alpha_pattern {quoted(pattern)}; expected a layer's name")
    return name


def _flat(name: str) -> str:
    return name.replace(".", "_")
