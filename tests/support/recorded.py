"""Models at the size, and with the weights, that the vectors in ``reference/`` were recorded with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from reference.reference_fill import fill_module_, inputs
from safetensors.torch import load_file
from torch import Tensor

from instantcharacter import AdapterConfig, CharacterAdapter

FOLDER = Path(__file__).parents[1] / "reference"
CONFIG = json.loads((FOLDER / "config.json").read_text())
SEED = CONFIG["seed"]
PICTURE = FOLDER / "reference.png"
LORA = FOLDER / "style_lora.safetensors"

ADAPTER_CONFIG = AdapterConfig(
    feature_dim=80,
    fusion_layers=2,
    fusion_heads=4,
    resampler_dim=64,
    resampler_layers=2,
    resampler_heads=2,
    num_tokens=16,
    token_dim=64,
    attention_dim=256,
    attention_heads=2,
    num_attention_blocks=4,
)


def expected() -> dict[str, Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def adapter(config: AdapterConfig = ADAPTER_CONFIG, seed: int = SEED) -> CharacterAdapter:
    adapter = CharacterAdapter(config)
    fill_module_(adapter.projector, "image_proj.", seed)
    fill_module_(adapter.attention, "ip_adapter.", seed)
    return adapter


def transformer(seed: int = SEED, **changes: object) -> FluxTransformer2DModel:
    return fill_module_(FluxTransformer2DModel(**{**CONFIG["transformer"], **changes}), "transformer.", seed)


def components(seed: int = SEED) -> dict[str, object]:
    """A FLUX pipeline's, without text encoders: prompts come as embeddings."""
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(**CONFIG["scheduler"]),
        "vae": fill_module_(AutoencoderKL(**CONFIG["vae"]), "vae.", seed),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": transformer(seed),
    }


def prompt(seed: int = SEED, batch: int = 1) -> dict[str, Tensor]:
    return {
        "prompt_embeds": inputs("prompt_embeds", (2, 10, 64), seed)[:batch],
        "pooled_prompt_embeds": inputs("pooled_prompt_embeds", (2, 32), seed)[:batch],
    }


def negative_prompt(seed: int = SEED) -> dict[str, Tensor]:
    return {
        "negative_prompt_embeds": inputs("negative_prompt_embeds", (1, 10, 64), seed),
        "negative_pooled_prompt_embeds": inputs("negative_pooled_prompt_embeds", (1, 32), seed),
    }


def run_settings(seed: int = SEED) -> dict[str, object]:
    """The recorded run: 64×96 pixels, 4 steps, latents out."""
    return {
        **prompt(seed),
        "height": 64,
        "width": 96,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "latents": inputs("latents", (1, 24, 64), seed),
        "output_type": "latent",
        "return_dict": False,
    }


def transformer_inputs(seed: int = SEED, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    """One forward call's, for a batch of two; image ids are the usual grid (0, row, column)."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    return {
        "hidden_states": inputs("hidden_states", (2, rows * columns, 64), seed),
        "encoder_hidden_states": inputs("prompt_embeds", (2, 10, 64), seed),
        "pooled_projections": inputs("pooled_prompt_embeds", (2, 32), seed),
        "timestep": torch.tensor([0.7, 0.3]),
        "guidance": torch.tensor([3.5, 3.5]),
        "txt_ids": torch.zeros(10, 3),
        "img_ids": torch.nn.functional.pad(grid, (1, 0)),
        "return_dict": False,
    }


def features(tokens: int = 729, seed: int = SEED, width: int = 80) -> list[Tensor]:
    """Random features: shallow, deep, tiles."""
    shapes = {"low_res_shallow": 3 * tokens, "low_res_deep": tokens, "high_res_deep": 4 * tokens}
    return [inputs(name, (1, length, width), seed) for name, length in shapes.items()]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error ‖ours − theirs‖ / ‖theirs‖; NaN fails every comparison."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
