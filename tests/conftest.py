from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from support import recorded

from instantcharacter import Character, CharacterAdapter, CharacterEncoder, InstantCharacterPipeline

collect_ignore = [] if "INSIDE_COMFYUI" in os.environ else ["comfyui/inside"]

torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture
def adapter() -> CharacterAdapter:
    return recorded.adapter()


@pytest.fixture(scope="session")
def encoder() -> CharacterEncoder:
    return CharacterEncoder.from_pretrained(recorded.FOLDER / "siglip", recorded.FOLDER / "dinov2")


@pytest.fixture(scope="session")
def fused(encoder: CharacterEncoder) -> torch.Tensor:
    return recorded.adapter().create_character(encoder(recorded.PICTURE, fit="stretch")).fused


@pytest.fixture
def character(adapter: CharacterAdapter, fused: torch.Tensor) -> Character:
    """The recorded picture's."""
    return Character(fused, adapter.fingerprint())


@pytest.fixture
def pipeline(adapter: CharacterAdapter) -> InstantCharacterPipeline:
    """The recorded pipeline, its adapter set."""
    pipeline = InstantCharacterPipeline(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    return pipeline


@pytest.fixture
def resampled(adapter, monkeypatch) -> list[float]:
    """The timesteps that the adapter resamples, as they come."""
    timesteps = []
    resample = adapter.projector.resample

    def counting(fused, timestep, folded=False):
        timesteps.extend(timestep.tolist())
        return resample(fused, timestep, folded)

    monkeypatch.setattr(adapter.projector, "resample", counting)
    return timesteps
