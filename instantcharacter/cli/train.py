"""The command ``train``."""

from __future__ import annotations

from .. import training
from .options import TrainOptions


def train(options: TrainOptions) -> None:
    """Train the stages of the configuration files in order, or continue a training that was interrupted."""
    stages = [training.read_config(path) for path in options.config]
    if options.prepare is None:
        print(f"wrote {training.train(*stages)}")
        return
    for config in stages:
        training.prepare(config, options.prepare)
        print(f"wrote {config.cache}")
