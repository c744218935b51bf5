"""Models that are read from one file, tiny."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from instantcharacter.character import encoders
from instantcharacter.flux.load import CLIP_L, T5_XXL

from . import recorded, tiny

MODELS = ["siglip", "dinov2", "clip_l", "t5"]


def single_file_models() -> dict[str, tuple]:
    """By name: the model, its weights, and the config that lies beside a file of another size than the released."""
    text = tiny.tiny_components()
    models = {
        "clip_l": (CLIP_L, text["text_encoder"].state_dict(), text["text_encoder"].config),
        "t5": (T5_XXL, text["text_encoder_2"].state_dict(), text["text_encoder_2"].config),
    }
    for name, model in (("siglip", encoders.SIGLIP), ("dinov2", encoders.DINOV2)):
        config = AutoConfig.from_pretrained(recorded.FOLDER / name)
        config.vision_use_head = False
        models[name] = (model, load_file(recorded.FOLDER / name / "model.safetensors"), config)
    return models


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict in which no two names share a weight."""
    return {key: weight.clone() for key, weight in state.items()}
