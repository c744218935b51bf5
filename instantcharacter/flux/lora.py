"""Style LoRAs for FLUX.1 in the layouts that trainers write: for which layers are they, and for which model?

Every layout names the same layers, by the released names or diffusers', with dots or (kohya's) underscores, behind one
prefix or another: a name without its prefix, flattened to underscores, tells the layer. Files for other models and of
other kinds are told by their keys, and refused by name.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.reading import read_pickle, read_safetensors
from .attn_processor import compute_dtype
from .layout import AROUND_BLOCKS, BLOCKS, QKV, SWAPPED, TEXT_QKV, split_rows
from .pipeline import CharacterPipelineMixin
from .variants import NATIVE

logger = logging.getLogger(__name__)

EXPECTED = "a LoRA for FLUX.1"
PARTS = {
    "down": ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight", "down.weight"),
    "up": ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight", "up.weight"),
    "alpha": ("alpha",),
    "magnitude": ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
"""What a LoRA has of a layer, by the ends of its keys; the longest that fits counts."""
ENDS = sorted(((f".{end}", part) for part, ends in PARTS.items() for end in ends), key=lambda pair: -len(pair[0]))
PREFIX = re.compile(
    r"^(base_model\.model\.)?(model\.)?(diffusion_model\.|transformer\.|unet\.|lora_unet_|lora_transformer_|lycoris_)?"
)
"""Before the names of FLUX's layers."""
CLIP_PREFIX = re.compile(r"^(lora_te1?_|text_encoders\.clip_l\.transformer\.|text_encoder\.)(text_model[._])?")
TEXT = re.compile(r"^(lora_te\d?_|text_encoders?[._])")
"""Before the names of CLIP's layers, and of any text encoder's."""
XLABS = {
    "double_blocks": {
        "processor.qkv_lora1": QKV,
        "processor.qkv_lora2": TEXT_QKV,
        "processor.proj_lora1": ("attn.to_out.0",),
        "processor.proj_lora2": ("attn.to_add_out",),
    },
    "single_blocks": {"processor.qkv_lora": QKV, "processor.proj_lora": ("proj_out",)},
}
"""XLabs' names for what a LoRA changes of a block, and diffusers' layers there."""


class Kind(NamedTuple):
    """A kind of file that is no LoRA for FLUX.1.

    Attributes:
        name: as in "this looks like …".
        told_by: what one of its keys has in it.
        advice: what reads it, or what to take instead.
    """

    name: str
    told_by: str
    advice: str


OTHER_MODEL = "take one that was made for FLUX.1"
READ_NATIVELY = f"ComfyUI's own Load LoRA reads it: {NATIVE}"
CONTROL = Kind(
    "a control LoRA (FLUX.1 Canny or Depth)",
    r"(query|key)_norm\.scale$|\.norm_(added_)?[qk]\.weight$",
    f"{READ_NATIVELY} and InstructPixToPixConditioning",
)
KINDS = (
    Kind("a LoRA for FLUX.2", r"(double|single)_stream_modulation|to_qkv_mlp_proj|\.ff\.linear_in", OTHER_MODEL),
    Kind("a LoRA for Chroma", r"distilled_guidance_layer", OTHER_MODEL),
    Kind("a LoRA for Stable Diffusion or SDXL", r"(down|up|mid|input|output|middle)_blocks?[._]", OTHER_MODEL),
    Kind("a LoRA for Wan", r"blocks[._]\d+[._](self|cross)_attn[._][qkvo]\b", OTHER_MODEL),
    Kind(
        "a LoRA for HunyuanVideo",
        r"blocks\.\d+\.(img|txt)_attn_(qkv|proj)|(img|txt)_mlp[._]fc|(img|txt)_mod[._]linear|modulation[._]linear",
        OTHER_MODEL,
    ),
    Kind("a LoRA for Qwen-Image", r"transformer_blocks[._]\d+[._](img|txt)_(mod|mlp)[._]", OTHER_MODEL),
    Kind("a LoRA for LTX-Video or PixArt", r"transformer_blocks[._]\d+[._]attn[12][._]", OTHER_MODEL),
    Kind("a LoRA for Z-Image or Lumina", r"layers[._]\d+[._](attention|feed_forward)[._]", OTHER_MODEL),
    Kind("an IP-Adapter", r"ip_adapter|to_[kv]_ip", "Load Character Adapter reads InstantCharacter's own"),
    CONTROL,
    Kind("a LoKr (LyCORIS)", r"\.lokr_", READ_NATIVELY),
    Kind("a LoHa (LyCORIS)", r"\.hada_", READ_NATIVELY),
    Kind("an OFT (LyCORIS)", r"\.oft_", READ_NATIVELY),
    Kind("a GLoRA (LyCORIS)", r"\.[ab][12]\.weight$", READ_NATIVELY),
)
"""Other models come before other forms: a LoKr for Wan is nothing for FLUX.1 in any way."""


def load_lora(pipeline: CharacterPipelineMixin, path: Path, name: str) -> None:
    """Load a LoRA into FLUX, and into CLIP where it has a part for that; before the pipeline is offloaded.

    What there is in the file beside that is left out, with a warning: a DoRA's magnitudes, what is for T5, or for
    layers that this FLUX does not have.

    Args:
        pipeline: FLUX may be stored in any way; the LoRA takes the dtype that it computes in.
        path: the file, in kohya's, XLabs', peft's, ComfyUI's or diffusers' layout.
        name: for ``set_adapters``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is cut off, for another model or of another width, of another kind than LoRA, or with
            nothing in it for what the pipeline has.
    """
    tensors, metadata = _read(path)
    if kind := next((kind for kind in KINDS if any(re.search(kind.told_by, key) for key in tensors)), None):
        raise ValueError(_refusal(path, tensors, kind))
    layers = _by_layer(tensors)
    flux, text = _placed(path, layers, pipeline.transformer, pipeline.text_encoder)
    settings = _settings(metadata, path)
    if any("magnitude" in parts for parts in layers.values()):
        logger.warning("%s is a DoRA: its magnitudes are left out, the rest is used", path.name)
    if flux:
        dtype = compute_dtype(pipeline.transformer)
        matrices = dict(_matrices(layers, flux, pipeline.transformer, dtype, settings.get("transformer", {})))
        state = {f"transformer.{module}.lora_{side}.weight": matrix for (module, side), matrix in matrices.items()}
        pipeline.load_lora_into_transformer(
            state, network_alphas=None, transformer=pipeline.transformer, adapter_name=name, low_cpu_mem_usage=True
        )
        _settle(pipeline.transformer, matrices, name)
    if text:
        dtype = pipeline.text_encoder.dtype
        matrices = dict(_matrices(layers, text, pipeline.text_encoder, dtype, settings.get("text_encoder", {})))
        ends = {"A": "lora_linear_layer.down", "B": "lora_linear_layer.up"}
        state = {f"text_encoder.{module}.{ends[side]}.weight": matrix for (module, side), matrix in matrices.items()}
        pipeline.load_lora_into_text_encoder(
            state, None, pipeline.text_encoder, prefix="text_encoder", adapter_name=name, low_cpu_mem_usage=True
        )
        _settle(pipeline.text_encoder, matrices, name)


def _settle(model: nn.Module, matrices: Mapping[tuple[str, str], Tensor], name: str) -> None:
    """Set what loading made of a LoRA to what it is.

    Loading casts the matrices to what the model is stored in, which may be fp8, and older diffusers take one alpha for
    layers of different ranks; here every layer's scale is in its matrices.
    """
    for (module, side), matrix in matrices.items():
        layer: Any = model.get_submodule(module)
        getattr(layer, f"lora_{side}")[name].weight.data = matrix
        layer.lora_alpha[name] = layer.r[name]
        layer.scaling[name] = 1.0


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix in (".safetensors", ".sft"):
        return read_safetensors(path, EXPECTED)
    content = read_pickle(path, EXPECTED)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds more than tensors, or none. Expected {EXPECTED}.")
    return content, {}


def _refusal(path: Path, keys: Iterable[str], kind: Kind) -> str:
    told = sorted(key for key in keys if re.search(kind.told_by, key)) or sorted(keys)
    return f"{path} looks like {kind.name}, by {_first(told)}; {kind.advice}"


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What there is of each layer, by :data:`PARTS`; of what is no LoRA's part, under its whole key."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end, part = next(((end, part) for end, part in ENDS if key.endswith(end)), ("", "other"))
        layers.setdefault(key.removesuffix(end), {})[part] = tensor
    return layers


def _flux_layers(transformer: Any) -> dict[str, tuple[str, ...]]:
    """FLUX's layers, each by all names that it goes by, flattened; of a released name, diffusers' layers in order."""
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
    """The names of a model's linear layers, as they were before any LoRA."""
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and ".base_layer" not in name and ".lora_" not in name:
            yield name


def _found(
    layers: Mapping[str, Mapping[str, Tensor]], prefix: re.Pattern, known: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The model's layers for each layer in a file that is a whole LoRA's, and that the model has."""
    flat = {layer: _flat(prefix.sub("", layer)) for layer, parts in layers.items() if _is_whole(parts)}
    return {layer: known[name] for layer, name in flat.items() if name in known and prefix.match(layer)}


def _is_whole(parts: Mapping[str, Tensor]) -> bool:
    """Whether both matrices of a layer are there, and an alpha that is a number, if there is one."""
    down, up, alpha = (parts.get(name) for name in ("down", "up", "alpha"))
    if down is None or up is None or (alpha is not None and alpha.numel() != 1):
        return False
    return down.ndim == up.ndim == 2 and down.numel() > 0


def _placed(
    path: Path, layers: Mapping[str, Mapping[str, Tensor]], transformer: Any, clip: Any
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """What of a file goes where: its layers, each with FLUX's or with CLIP's that it is for.

    Raises:
        ValueError: most of it is for other models, or for layers of other sizes.
    """
    flux = _found(layers, PREFIX, _flux_layers(transformer))
    text = {} if clip is None else _found(layers, CLIP_PREFIX, _clip_layers(clip))
    text = {layer: names for layer, names in text.items() if _fits(layers[layer], clip, names)}
    rest = [layer for layer in layers if layer not in flux and layer not in text]
    foreign = [layer for layer in rest if "down" in layers[layer] and not TEXT.match(layer)]
    if len(flux) < len(foreign) or not (flux or text):
        raise ValueError(
            f"{path} is no LoRA for what is loaded: {len(flux)} of its layers are FLUX.1's, {len(text)} CLIP's"
            f"{' (which is not loaded)' if clip is None else ''}, and {len(rest)} neither, such as {_first(rest)}; "
            f"{OTHER_MODEL}, or try ComfyUI's own Load LoRA"
        )
    for layer, names in flux.items():
        inputs, *sizes = _sizes(transformer, names)
        takes, gives = layers[layer]["down"].shape[-1], len(layers[layer]["up"])
        if names == ("x_embedder",) and takes > inputs:
            raise ValueError(_refusal(path, [f"{layer}, which takes {takes} channels"], CONTROL))
        if not _fits(layers[layer], transformer, names):
            raise ValueError(
                f"{path} is for a model of another width: {layer} takes {takes} numbers and gives {gives}, but here it "
                f"takes {inputs} and gives {sum(sizes)}; {OTHER_MODEL}, of this width"
            )
    if not flux:
        logger.warning("%s changes CLIP alone, and nothing of FLUX: it acts on words, not on CONDITIONING", path.name)
    if rest:
        logger.warning("%s: %d of %d layers in it are not used: %s", path.name, len(rest), len(layers), _first(rest))
    return flux, text


def _matrices(
    layers: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, tuple[str, ...]],
    model: nn.Module,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """For each of the model's layers the matrices ``"A"`` and ``"B"``: B·A is what is added to its weight."""
    for layer, names in found.items():
        down, up, alpha = (layers[layer].get(part) for part in ("down", "up", "alpha"))
        assert down is not None and up is not None
        released = SWAPPED if _flat(PREFIX.sub("", layer)) == _flat(SWAPPED) else layer
        for name, rows in zip(names, split_rows(released, up, _sizes(model, names)[1:]), strict=True):
            scale = _scale(settings, name, len(down)) if alpha is None else alpha.item() / len(down)
            half = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0  # each takes a half, to stay in range
            yield (name, "A"), down.to(dtype) * (scale / half)
            yield (name, "B"), rows.to(dtype) * half


def _sizes(model: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """How many numbers a model's layers take, and how many each of them gives."""
    modules: list[Any] = [model.get_submodule(name) for name in names]
    return [modules[0].in_features, *(module.out_features for module in modules)]


def _fits(parts: Mapping[str, Tensor], model: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the two matrices are of one rank, and of the size of the model's layers."""
    (inputs, *sizes), rank = _sizes(model, names), len(parts["down"])
    return (*parts["up"].shape, *parts["down"].shape) == (sum(sizes), rank, rank, inputs)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale that diffusers' settings of a LoRA have for a layer; 1 if they have none."""
    patterns = settings.get("alpha_pattern") or {}
    fitting = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
    alpha = next(fitting, settings.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """What diffusers writes into its LoRAs' metadata, for each model that they are for."""
    settings: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
            model, _, name = key.partition(".")
            settings.setdefault(model, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} has settings in its metadata that cannot be read ({error})") from error
    return settings


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _first(items: Iterable[str]) -> str:
    listed = list(items)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
