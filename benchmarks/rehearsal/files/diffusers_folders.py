"""FLUX.1-dev, SigLIP and DINOv2 as folders of the hub, which the earlier pack takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from . import weights
from .released import SIGLIP_FILE, comfy_folder, write_models
from .writer import Writer


def write_folders(models: Path, writer: Writer) -> None:
    """FLUX.1-dev, SigLIP and DINOv2 as folders of the hub, which the earlier pack takes. Files that are alike in the
    other layout are linked. ``models/diffusers/FLUX.1-dev`` may be a link itself, to a disk with 24 GB."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import AutoTokenizer, CLIPTextConfig, Dinov2Config, SiglipVisionConfig, T5Config

    from instantcharacter.character.encoders import DINOV2, SIGLIP
    from instantcharacter.flux.load import CLIP_L, CLIP_LENGTH, T5_LENGTH, T5_XXL, VAE

    write_models(models, writer)
    folder = models / "diffusers/FLUX.1-dev"
    for name, kind, settings in (
        ("transformer", FluxTransformer2DModel, {"guidance_embeds": True}),
        ("vae", AutoencoderKL, VAE),
    ):
        with torch.device("meta"):
            model = kind.from_config(settings)
        save = save_pieces(model, "diffusion_pytorch_model{suffix}.safetensors")
        make = partial(weights.random_state, partial(weights.shapes_of, model), torch.bfloat16)
        writer.put(folder / name, make, save)
    vision = models / "clip_vision"
    for config, file, where in (
        (CLIPTextConfig(**CLIP_L.released), "text_encoders/clip_l", folder / "text_encoder"),
        (T5Config(**T5_XXL.released), "text_encoders/t5xxl_fp16", folder / "text_encoder_2"),
        (SiglipVisionConfig(**SIGLIP.released), SIGLIP_FILE, vision / "siglip-so400m-patch14-384"),
        (Dinov2Config(**DINOV2.released), "clipvision/dinov2-giant/model", vision / "dinov2-giant"),
    ):
        config.save_pretrained(where)
        if not (where / "model.safetensors").is_symlink():
            (where / "model.safetensors").symlink_to(models.absolute() / f"{file}.safetensors")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(folder / "scheduler")
    for name, vocabulary, length in (
        ("tokenizer", "sd1_tokenizer", CLIP_LENGTH),
        ("tokenizer_2", "text_encoders/t5_tokenizer", T5_LENGTH),
    ):
        tokenizer = AutoTokenizer.from_pretrained(comfy_folder() / vocabulary, model_max_length=length)
        tokenizer.save_pretrained(folder / name)
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_pieces(model: Any, pattern: str) -> Callable[[weights.State, Path], None]:
    """Saves a diffusers model's folder, its weights in files of 10 GB at the most."""

    def save(state: weights.State, folder: Path) -> None:
        model.save_config(folder)
        save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")

    return save
