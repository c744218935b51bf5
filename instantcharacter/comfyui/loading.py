"""Loads what the nodes pass on: the FLUX pipeline, the encoders, the adapter, a character."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
import torch

from ..files.catalog import TOY, toy
from .folders import tokenizers

if TYPE_CHECKING:
    from ..character.image import ResizeMode
    from ..flux.pipeline import InstantCharacterPipeline
    from .hosting import HostedAdapter, HostedCharacter


def lora_file(choice: str) -> Path:
    """The path of what was chosen in a list of LoRAs."""
    return toy("lora") if choice == TOY else Path(folder_paths.get_full_path_or_raise("loras", choice))


def load_flux_pipeline(
    paths: Mapping[str, Any], fp8: bool = False, lora: Path | None = None
) -> InstantCharacterPipeline:
    """FLUX of these files, with its LoRA, on the CPU."""
    from ..flux.load import FluxFiles, load_flux
    from ..flux.lora import load_lora
    from .hosting import weight_dtype

    clip_tokenizer, t5_tokenizer = tokenizers()
    files = FluxFiles(**paths, clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer)
    pipeline = load_flux(files, weight_dtype(), fp8)
    if lora:
        load_lora(pipeline, lora, "style")
    return pipeline


def load_encoder(siglip: Path, dinov2: Path) -> Any:
    """The encoders of these files or folders, as a CHARACTER_ENCODER."""
    from .. import CharacterEncoder
    from .hosting import hosted, weight_dtype

    return hosted(CharacterEncoder.from_pretrained(siglip, dinov2, dtype=weight_dtype()))


def load_adapter(path: Path) -> HostedAdapter:
    """The adapter of this file, as a CHARACTER_ADAPTER."""
    from .. import CharacterAdapter
    from .hosting import HostedAdapter, weight_dtype

    return HostedAdapter(CharacterAdapter.from_file(path, dtype=weight_dtype()))


def encode(pictures: torch.Tensor, encoder: Any, adapter: HostedAdapter, fit: ResizeMode = "pad") -> HostedCharacter:
    """The character of one or several pictures of it, [B, H, W, C]."""
    from .hosting import HostedCharacter, load
    from .images import images

    pictures = images(pictures)
    look = load(encoder)
    views = [look(picture, fit) for picture in pictures]
    load(adapter.fusion)
    return HostedCharacter(adapter.adapter.create_character(*views, picture=pictures[0]), adapter)
