from __future__ import annotations

from pathlib import Path

import pytest
from support import training_world as world

from instantcharacter.training import TrainingConfig, prepare


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with the tiny models, pictures, and a filled cache."""
    folder = tmp_path_factory.mktemp("world")
    world.save_models(folder)
    world.save_pictures(folder / "pictures")
    prepare(world.config(folder, folder / "unused"), samples=world.PICTURES)
    return folder


@pytest.fixture
def config(models, tmp_path) -> TrainingConfig:
    return world.config(models, tmp_path / "output")
