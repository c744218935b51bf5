"""Tiny complete pipelines, and what they generate from a prompt and a reference picture."""

from __future__ import annotations

from typing import Any

import torch
from support import recorded, tiny

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux.components import DiffusersControls, components_of
from instantcharacter.offload import MemoryPlan, Offloader
from instantcharacter.offload.sizes import ComponentModules


def complete_pipeline() -> InstantCharacterPipeline:
    """A pipeline with text encoders, vision encoders and an adapter, without a progress bar."""
    pipeline = tiny.tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str = "a paper plane", seed: int = 0, **changes: Any) -> torch.Tensor:
    """The decoded picture, [1, 3, 48, 64], of a prompt and the recorded reference picture."""
    settings = {
        "subject_image": recorded.PICTURE,
        "width": 64,
        "height": 48,
        "num_inference_steps": 3,
        "max_sequence_length": 32,
        "output_type": "pt",
        "return_dict": False,
        "generator": torch.Generator().manual_seed(seed),
        **changes,
    }
    return pipeline(prompt, **settings)[0]


def components(pipeline: InstantCharacterPipeline) -> ComponentModules:
    """All modules that an offloader may manage."""
    return components_of(pipeline, pipeline.character_encoder, pipeline.character_adapter)


def offload(pipeline: InstantCharacterPipeline, plan: MemoryPlan) -> Offloader:
    """Carry a plan out on the CPU."""
    offloader = Offloader(plan, components(pipeline), torch.device("cpu"), DiffusersControls(pipeline))
    offloader.apply()
    return offloader
