"""A FLUX pipeline from the files that ComfyUI users have: one for each part, or a diffusers folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from transformers import AutoTokenizer

from ..files.errors import escaped, first_line, quoted
from ..files.gguf import check_header
from ..files.model_config import NAME, check_size, fitting, read_config
from ..files.reading import check_file, check_weights, read_safetensors, unexpected
from ..offload.devices import default_device
from .finite import check_loaded
from .folder import TEXT_ENCODERS, check_folder, defaults
from .fp8 import WeightDtype, check_fp8_arithmetic, set_weight_dtype
from .fp8_layers import FP8
from .layout import BLOCKS, OWN, diffusers_layers, own_part, to_diffusers
from .parts import CLIP_L, EXPECTED_FLUX, EXPECTED_VAE, T5_XXL, VAE
from .pipeline import InstantCharacterPipeline
from .scheduler import flux_scheduler
from .variants import check_variant

logger = logging.getLogger(__name__)

MOST_BLOCKS = 200
"""Blocks of a kind at most: FLUX.1 has 19 and 38."""
HEAD_DIM = 128
"""Channels of an attention head, in a FLUX of any width."""
KNOWN_BY = {
    name: (f"{layer}.weight", f"{diffusers_layers(layer)[0]}.weight")
    for name, layer in {
        "picture": "img_in",
        "text": "txt_in",
        "pooled": "vector_in.in_layer",
        "guidance": "guidance_in.in_layer",
    }.items()
}
"""The weights from whose shapes FLUX's sizes are read, each by its released name and by diffusers'."""
CLIP_LENGTH, T5_LENGTH = 77, 512
"""The most tokens that each text encoder takes."""


@dataclass(frozen=True)
class FluxFiles:
    """The files of a FLUX pipeline.

    Attributes:
        flux: one file, or a diffusers folder.
        clip_l: one file. If None, the text encoder is the diffusers folder's, or the pipeline has none.
        t5: one file, as ``clip_l``.
        vae: one file. If None, the VAE is the diffusers folder's.
        clip_tokenizer: a folder with CLIP's vocabulary, for ``clip_l`` without a diffusers folder.
        t5_tokenizer: a folder with T5's vocabulary, as ``clip_tokenizer``.
    """

    flux: Path
    clip_l: Path | None = None
    t5: Path | None = None
    vae: Path | None = None
    clip_tokenizer: Path | None = None
    t5_tokenizer: Path | None = None


def load_flux(
    files: FluxFiles, dtype: torch.dtype, weight_dtype: WeightDtype = "default", device: torch.device | None = None
) -> InstantCharacterPipeline:
    """Load a pipeline, on the CPU. Without text encoders it takes embeddings in place of prompts.

    Args:
        files: of the pipeline's models.
        dtype: of the arithmetic, and of weights that are not stored in fewer bits.
        weight_dtype: of FLUX's large layers: ``dtype``; ``"fp8_e4m3fn"``: stored in 8 bits, and cast to ``dtype`` when
            they run; ``"fp8_e4m3fn_fast"``: multiplied in 8 bits. A GGUF file stays as it is.
        device: where FLUX is to multiply in 8 bits; :func:`~.default_device` if not given.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is cut off, of another model, or in a form that only ComfyUI reads; or 8-bit arithmetic for
            a GGUF file or on a device without it.
    """
    device = device or default_device()
    check_weight_dtype(files.flux, weight_dtype, device)
    parts: dict[str, Any] = {}
    if files.clip_l:
        parts["text_encoder"] = CLIP_L.load(files.clip_l, CLIP_L.read_config(files.clip_l), dtype)
    if files.t5:
        parts["text_encoder_2"] = T5_XXL.load(files.t5, T5_XXL.read_config(files.t5), dtype)
    if files.vae:
        parts["vae"] = _load_vae(files.vae, dtype)
    if files.flux.is_dir():
        pipeline = _from_folder(files.flux, parts, dtype)
    else:
        transformer = _load_transformer(files.flux, dtype, in_fp8=weight_dtype != "default")
        pipeline = InstantCharacterPipeline(**_complete(parts, files, transformer))
    check_loaded(pipeline.transformer, pipeline.vae, escaped(files.flux), escaped(files.vae or files.flux))
    set_weight_dtype(pipeline.transformer, dtype, weight_dtype, device)
    return pipeline


def check_weight_dtype(flux: Path, weight_dtype: WeightDtype, device: torch.device) -> None:
    """Raise ``ValueError``, before anything is loaded, for 8-bit arithmetic with a GGUF file or a device without it.

    Args:
        flux: its file, folder or hub id.
        weight_dtype: see :func:`load_flux`.
        device: see :func:`load_flux`.
    """
    if weight_dtype == "fp8_e4m3fn_fast":
        check_fp8_arithmetic(device)
        if flux.suffix == ".gguf":
            raise ValueError(f"{flux} is quantised: 8-bit arithmetic needs FLUX.1 in bf16, fp16 or plain fp8")


def _from_folder(folder: Path, parts: dict[str, Any], dtype: torch.dtype) -> InstantCharacterPipeline:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} has no model_index.json. Expected {EXPECTED_FLUX}.")
    encoders = {
        name: TEXT_ENCODERS[name].load(folder / name, config, dtype)  # diffusers would fill what they lack at random
        for name, config in check_folder(folder).items()
        if name not in parts
    }
    with fitting(folder, EXPECTED_FLUX):
        return InstantCharacterPipeline.from_pretrained(folder, **parts, **encoders, torch_dtype=dtype)


def _complete(parts: dict[str, Any], files: FluxFiles, transformer: Any) -> dict[str, Any]:
    """The arguments of a pipeline whose FLUX is in one file."""
    if "vae" not in parts:
        raise ValueError(f"{files.flux} comes without a VAE: choose {EXPECTED_VAE}")
    return {
        "scheduler": flux_scheduler(guided=transformer.config.guidance_embeds),
        "text_encoder": None,
        "text_encoder_2": None,
        "tokenizer": _tokenizer(files.clip_tokenizer, CLIP_LENGTH) if files.clip_l else None,
        "tokenizer_2": _tokenizer(files.t5_tokenizer, T5_LENGTH) if files.t5 else None,
        "transformer": transformer,
        **parts,
    }


def _tokenizer(folder: Path | None, length: int) -> Any:
    if folder is None:
        raise ValueError("a text encoder from one file needs a folder with its tokenizer's vocabulary")
    with fitting(folder, "a folder with a tokenizer's vocabulary"):
        return AutoTokenizer.from_pretrained(folder, model_max_length=length, trust_remote_code=False)


def _load_transformer(path: Path, dtype: torch.dtype, in_fp8: bool) -> FluxTransformer2DModel:
    """Load FLUX. Weights become ``dtype``, but GGUF's, and with ``in_fp8`` those that are in fp8 in the file."""
    check_file(path, EXPECTED_FLUX)
    settings: dict[str, Any] = {"torch_dtype": dtype}
    if path.suffix == ".gguf":
        settings["quantization_config"] = GGUFQuantizationConfig(compute_dtype=dtype)
        whole = _read_gguf(path)
    else:
        whole, _ = read_safetensors(path, EXPECTED_FLUX)
    state = own_part(whole)
    if len(state) < len(whole):
        logger.info("%s is a whole checkpoint; of it FLUX alone is read, not its text encoders and VAE", path.name)
    config = flux_config(state, path)
    if path.suffix != ".gguf":
        check_weights(state, path, EXPECTED_FLUX)
    if in_fp8 and {tensor.dtype for tensor in state.values()} == {FP8}:
        settings["torch_dtype"] = FP8
    try:
        state = to_diffusers(state, config["attention_head_dim"] * config["num_attention_heads"])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # rows that cannot be split
        raise unexpected(path, f"has weights of other sizes ({first_line(error)})", EXPECTED_FLUX) from error
    _check_keys(state, config, path)
    return _from_state(FluxTransformer2DModel, state, config, path, settings)


def _read_gguf(path: Path) -> Mapping[str, Any]:
    try:
        check_header(path)
        return load_single_file_checkpoint(str(path))
    except ImportError as error:
        raise ImportError(f"{path.name} needs the package that reads GGUF: pip install gguf") from error
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise unexpected(path, f"is cut off or not a GGUF file ({first_line(error)})", EXPECTED_FLUX) from error


def _load_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    state, _ = read_safetensors(path, EXPECTED_VAE)
    beside = path.parent / "config.json"
    config = VAE
    if "decoder.conv_in.weight" not in state:
        raise unexpected(path, f"holds {quoted(sorted(state)[:3])}", EXPECTED_VAE)
    check_weights(state, path, EXPECTED_VAE)
    if len(state["decoder.conv_in.weight"]) != VAE["block_out_channels"][-1] and beside.is_file():  # type: ignore[index]
        config = read_config(beside, defaults(AutoencoderKL))
        check_size(lambda: AutoencoderKL.from_config(config), path, EXPECTED_VAE)
    return _from_state(AutoencoderKL, state, config, path, {"torch_dtype": dtype})


def _from_state(model: Any, state: Mapping[str, Any], config: dict, path: Path, settings: dict[str, Any]) -> Any:
    """A diffusers model of weights in either layout. With a config, diffusers looks nothing up on the hub."""
    with TemporaryDirectory() as folder, fitting(path, f"{model.__name__}, whole and not merged"):
        (Path(folder) / NAME).write_text(json.dumps(config), encoding="utf-8")
        return model.from_single_file(dict(state), config=folder, **settings)


def flux_config(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """FLUX's config, from the shapes of its weights in the released layout, ComfyUI's or diffusers'."""
    shapes = {key: list(getattr(tensor, "quant_shape", tensor.shape)) for key, tensor in state.items()}
    check_variant(shapes, path)
    sizes = {kind: next((shapes[key] for key in keys if key in shapes), []) for kind, keys in KNOWN_BY.items()}
    if not all(len(sizes[kind]) == 2 and all(sizes[kind]) for kind in ("picture", "text", "pooled")):
        raise unexpected(path, f"holds {quoted(sorted(state)[:3])}", EXPECTED_FLUX)
    counts = {blocks: _count(shapes, blocks) for blocks in BLOCKS}
    if sizes["picture"][0] % HEAD_DIM or max(counts.values()) > MOST_BLOCKS:
        found = f"is {sizes['picture'][0]} wide, in {counts['double_blocks']} + {counts['single_blocks']} blocks"
        raise unexpected(path, found, EXPECTED_FLUX)
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": sizes["picture"][1],
        "num_layers": counts["double_blocks"],
        "num_single_layers": counts["single_blocks"],
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": sizes["picture"][0] // HEAD_DIM,
        "joint_attention_dim": sizes["text"][1],
        "pooled_projection_dim": sizes["pooled"][1],
        "guidance_embeds": bool(sizes["guidance"]),
        "out_channels": 64,
    }


def _check_keys(state: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    """Raise ``ValueError`` for keys that FLUX lacks or has not, and for other shapes; drop the keys of other models."""
    with torch.device("meta"):
        expected = FluxTransformer2DModel.from_config(config).state_dict()
    own = OWN | {key.split(".")[0] for key in expected}
    for problem, keys in (
        ("lacks {} weights that FLUX.1 has", [key for key in expected if key not in state]),
        ("has {} weights that FLUX.1 has not", [k for k in state if k not in expected and k.split(".")[0] in own]),
    ):
        if keys:
            raise unexpected(path, f"{problem.format(len(keys))}, {quoted(keys[0])} first", f"{EXPECTED_FLUX}, whole")
    for key in [key for key in state if key not in expected]:
        del state[key]
    shapes = {key: getattr(tensor, "quant_shape", tensor.shape) for key, tensor in state.items()}
    if wrong := [key for key, tensor in expected.items() if tuple(shapes[key]) != tuple(tensor.shape)]:
        found = f"{wrong[0]} is {list(shapes[wrong[0]])}, not {list(expected[wrong[0]].shape)}"
        raise unexpected(path, f"has {len(wrong)} weights of other sizes: {found}", EXPECTED_FLUX)


def _count(keys: Iterable[str], blocks: str) -> int:
    """The number of blocks of a kind, which has this released name."""
    names = (blocks, BLOCKS[blocks][0])
    return len({key.split(".")[1] for key in keys if key.split(".")[0] in names})
