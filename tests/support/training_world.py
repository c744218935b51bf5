"""Tiny untrained models and pictures of the toy world: all that a training needs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from instantcharacter import AdapterConfig
from instantcharacter.training import Source, TrainingConfig
from toy.models import (
    CLIP,
    LATENT_CHANNELS,
    T5,
    new_clip,
    new_dinov2,
    new_scheduler,
    new_siglip,
    new_t5,
    new_vae,
    train_tokenizers,
)
from toy.world import draw_reference, random_shot, random_traits

SIZES = AdapterConfig(
    feature_dim=96,
    fusion_layers=1,
    fusion_heads=6,
    resampler_dim=32,
    resampler_layers=1,
    resampler_heads=2,
    num_tokens=8,
    token_dim=32,
    attention_dim=64,
    attention_heads=2,
    num_attention_blocks=2,
)
PICTURES = 6


def save_models(folder: Path) -> None:
    torch.manual_seed(0)
    texts = [random_shot(random.Random(i), random_traits(random.Random(i), False)).caption() for i in range(50)]
    clip_tokenizer, t5_tokenizer = train_tokenizers(texts)
    flux = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5.d_model,
        pooled_projection_dim=CLIP.hidden_size,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    torch.nn.init.normal_(flux.proj_out.weight, std=0.2)
    vae = new_vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
    FluxPipeline(
        scheduler=new_scheduler(),
        vae=vae,
        text_encoder=new_clip(),
        tokenizer=clip_tokenizer,
        text_encoder_2=new_t5(),
        tokenizer_2=t5_tokenizer,
        transformer=flux,
    ).save_pretrained(folder / "flux")
    new_siglip().save_pretrained(folder / "siglip")
    new_dinov2().save_pretrained(folder / "dinov2")


def save_pictures(folder: Path) -> None:
    """An image folder with references."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    lines = []
    for i in range(PICTURES):
        traits = random_traits(rng, held_out=False)
        shot = random_shot(rng, traits)
        shot.draw().save(folder / f"{i}.png")
        draw_reference(traits).save(folder / f"{i}_reference.png")
        lines.append({"file_name": f"{i}.png", "text": shot.caption(), "reference": f"{i}_reference.png"})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


def config(models: Path, output: Path, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "output": output,
        "data": (Source(str(models / "pictures"), pairs=True),),
        "model": str(models / "flux"),
        "siglip": str(models / "siglip"),
        "dinov2": str(models / "dinov2"),
        "sizes": SIZES,
        "resolution": 64,
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup": 1,
        "precision": "float32",
        "cache": models / "cache",
        "workers": 2,
        "log_every": 2,
        "save_every": 2,
    }
    return TrainingConfig(**{**settings, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    """An adapter file's tensors."""
    return load_file(path)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(first[key], second[key]) for key in first)


def new_flux(config: TrainingConfig) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(config.model, subfolder="transformer")


def events(folder: Path) -> EventAccumulator:
    """TensorBoard's entries of a training."""
    accumulator = EventAccumulator(str(next(folder.rglob("events.*")).parent))
    accumulator.Reload()
    return accumulator


def scalars(folder: Path) -> dict[str, list[float]]:
    """The logged numbers by name."""
    entries = events(folder)
    return {tag: [event.value for event in entries.Scalars(tag)] for tag in entries.Tags()["scalars"]}
