"""Functions that several nodes share: they load models and encode pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import folder_paths
import torch

from ..files.catalog import TOY, toy
from ..offload.sizes import GIB
from .folders import tokenizers

if TYPE_CHECKING:
    from ..files.pictures import ResizeMode
    from ..flux.fp8 import WeightDtype
    from ..flux.pipeline import InstantCharacterPipeline
    from .hosting import HostedAdapter, HostedCharacter


def lora_file(choice: str) -> Path:
    """The path of a LoRA in the list of Load FLUX."""
    return toy("lora") if choice == TOY else Path(folder_paths.get_full_path_or_raise("loras", choice))


def check_arithmetic(choice: WeightDtype) -> None:
    """Raise ``ValueError`` if ComfyUI's device does not compute in 8 bits as the choice asks for.

    Otherwise ComfyUI frees memory there, in which weights are rounded layer by layer.
    """
    from ..flux.fp8 import check_fp8_arithmetic

    if choice == "fp8_e4m3fn_fast":
        device = management.get_torch_device()
        management.free_memory(GIB, device)
        check_fp8_arithmetic(device)


def load_flux_pipeline(
    paths: Mapping[str, Any], choice: WeightDtype = "default", lora: Path | None = None
) -> InstantCharacterPipeline:
    """Load FLUX from its files, see :class:`FluxFiles`, with a LoRA, onto the CPU.

    Args:
        paths: by the names of :class:`FluxFiles`.
        choice: of Load FLUX for ``weight_dtype``.
        lora: its file.
    """
    from ..flux.load import FluxFiles, load_flux
    from ..flux.lora import load_lora
    from .hosting import weight_dtype

    clip_tokenizer, t5_tokenizer = tokenizers()
    files = FluxFiles(**paths, clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer)
    pipeline = load_flux(files, weight_dtype(), choice, management.get_torch_device())
    if lora:
        load_lora(pipeline, lora, "style")
    return pipeline


def load_encoder(siglip: Path, dinov2: Path) -> Any:
    """Load the encoders from their files or folders: a CHARACTER_ENCODER, which is a ``ModelPatcher``."""
    from ..character.encoders import CharacterEncoder
    from .hosting import weight_dtype
    from .patchers import HostedPatcher

    return HostedPatcher(CharacterEncoder.from_pretrained(siglip, dinov2, dtype="auto"), weight_dtype())


def load_adapter(path: Path) -> HostedAdapter:
    """Load the adapter from its file: a CHARACTER_ADAPTER."""
    from ..model.adapter import CharacterAdapter
    from .hosting import HostedAdapter, weight_dtype

    return HostedAdapter(CharacterAdapter.from_file(path), weight_dtype())


def encode(pictures: torch.Tensor, encoder: Any, adapter: HostedAdapter, fit: ResizeMode = "pad") -> HostedCharacter:
    """Make a character from one or several pictures of it.

    Args:
        pictures: IMAGE, [B, H, W, C].
        encoder: from :func:`load_encoder`.
        adapter: from :func:`load_adapter`.
        fit: how a picture becomes a square: ``"pad"`` with white, or ``"stretch"``.

    Raises:
        ValueError: a folded adapter.
    """
    from .hosting import HostedCharacter, load

    adapter.adapter.check_whole("make a character")
    encode_picture = load(encoder)
    features = [encode_picture(picture, fit) for picture in pictures]
    load(adapter.fusion)
    return HostedCharacter(adapter.adapter.create_character(*features, picture=pictures[0]), adapter)
