"""The tests' tiny models in the same places."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from support import recorded, tiny_models

from .gguf_file import write_gguf
from .weights import Shapes
from .writer import Writer


def write_models(models: Path, _: Writer) -> None:
    if models.exists():
        return
    tiny_models.fill(models.parent)
    # ComfyUI loads no VAE smaller than the real one. The pack does, and finds this one first.
    shutil.copytree(models / "diffusers/FLUX.1-dev/vae", models / "vae/0-tiny")
    (models / "vae/0-tiny/diffusion_pytorch_model.safetensors").rename(models / "vae/0-tiny/ae.safetensors")


def flux_shapes() -> Shapes:
    return {key: tuple(t.shape) for key, t in tiny_models.released_layout(recorded.transformer().state_dict()).items()}


MAKERS = {"models": write_models, "diffusers": write_models, "gguf": partial(write_gguf, shapes_of_flux=flux_shapes)}
