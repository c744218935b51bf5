"""How a FLUX's latents become ComfyUI's samples and previews."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats

from ..files.catalog import toy
from ..files.reading import read_json

TOY_CHANNELS = 8
"""Channels of the toy's latents; FLUX.1's have 16."""
RGB = [
    [0.0567, -0.1555, -0.0729],
    [-0.0316, -0.0663, 0.2455],
    [-0.1787, -0.0057, 0.0470],
    [0.0974, -0.0937, 0.0420],
    [-0.1265, 0.0183, 0.0428],
    [-0.0056, 0.0583, 0.0161],
    [-0.2708, -0.2222, -0.2527],
    [0.0887, 0.1556, 0.0144],
]
"""Red, green and blue of each of the latents' channels in a preview: the least squares over 240 toy pictures."""
RGB_BIAS = [0.2148, 0.2524, 0.1943]


class ToyLatents(comfy.latent_formats.Flux):
    """The latents of the toy's VAE, and their colours in previews."""

    def __init__(self) -> None:
        super().__init__()
        config = read_json(toy("flux") / "vae/config.json")
        self.latent_channels = TOY_CHANNELS
        self.scale_factor = config["scaling_factor"]
        self.shift_factor = config["shift_factor"]
        self.latent_rgb_factors = RGB
        self.latent_rgb_factors_bias = RGB_BIAS
        self.taesd_decoder_name = None


def latent_format(vae: Any) -> comfy.latent_formats.LatentFormat:
    """ComfyUI's format of the latents of a diffusers VAE: FLUX.1's, or the toy's."""
    return ToyLatents() if vae.config.latent_channels == TOY_CHANNELS else comfy.latent_formats.Flux()
