"""Training on a simulated GPU, see :mod:`support.pretended_cuda`: every tensor on the device that it should be on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from support import training_world
from support.pretended_cuda import PretendedCuda

from instantcharacter.training import Preview, train


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    training_world.save_models(folder)
    training_world.save_pictures(folder / "pictures")
    return folder


@pytest.fixture
def card() -> Iterator[PretendedCuda]:
    states = (AcceleratorState, PartialState, GradientState)  # they remember the first device of a process
    for state in states:
        state._reset_state()
    with PretendedCuda() as card:
        yield card
    for state in states:
        state._reset_state()
    assert not card.races, card.races[:5]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"held_gib": 0.1, "held_in": "device", "precision": "bfloat16"},
        {"cache": None, "held_gib": 0.1, "held_in": "host", "ema": 0.9},
        {"cache": None, "drop_character": 0.5, "drop_text": 0.5, "accumulate": 2, "checkpointing": False},
        {"cached": ("features",), "held_gib": 0.00002},
    ],
    ids=str,
)
def test_a_training_runs_and_resumes_on_the_device(models, card, tmp_path, changes):
    preview = Preview(str(models / "pictures/0_reference.png"), "a round fox")
    settings = {"cache": tmp_path / "cache", "previews": (preview,), "preview_every": 2, "preview_steps": 2, **changes}
    config = training_world.config(models, tmp_path / "out", **settings)
    assert train(config).is_file()
    written = (tmp_path / "out/adapter.safetensors").read_bytes()
    assert card.peak > 0
    train(training_world.config(models, tmp_path / "out", **{**settings, "steps": config.steps + 2}))
    assert (tmp_path / "out/adapter.safetensors").read_bytes() != written
