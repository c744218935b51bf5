"""The toy's latents in ComfyUI: round trips and previews of the Sampler."""

from __future__ import annotations

import comfy.cli_args
import comfy.latent_formats
import comfy.utils
import latent_preview
import pytest
import torch

from instantcharacter import InstantCharacterPipeline
from instantcharacter.comfyui.init_image import InitImage, Prompt
from instantcharacter.comfyui.latent_format import ToyLatents, latent_format
from instantcharacter.comfyui.sampler import HostedPipeline
from instantcharacter.comfyui.toy import load_toy
from instantcharacter.files.catalog import toy

PROMPT = Prompt("a picture of a character waving on a beach")


@pytest.fixture(scope="module")
def hosted() -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline.from_pretrained(toy("flux"), torch_dtype=torch.float32), "auto")


def test_the_format_is_that_of_the_vae(hosted):
    vae = hosted.pipeline.vae
    assert isinstance(latent_format(vae), ToyLatents)
    assert latent_format(vae).latent_channels == vae.config.latent_channels
    vae = type(vae)(latent_channels=16)
    assert type(latent_format(vae)) is comfy.latent_formats.Flux


def test_the_samplers_latents_are_those_of_the_toys_vae(hosted):
    generated = hosted.generate(None, PROMPT, (256, 256), 4, 7)
    assert generated.samples.shape == (1, 8, 32, 32)
    with torch.inference_mode():
        assert (load_toy()[2].decode(generated.samples) - generated.image).abs().mean() < 1e-4


def test_the_samplers_latents_go_into_its_own_input(hosted):
    first = hosted.generate(None, PROMPT, (256, 256), 8, 7)
    again = hosted.generate(None, PROMPT, (64, 64), 1, 8, InitImage(0.05, samples=first.samples))
    assert again.image.shape == first.image.shape
    assert (again.image - first.image).abs().mean() < 0.05


def test_the_toy_has_previews(hosted, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", latent_preview.LatentPreviewMethod.Auto)
    previews = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, *values: previews.append(values[2]))
    hosted.generate(None, PROMPT, (256, 256), 4, 7)
    assert [preview and preview[1].size for preview in previews] == [None, *[(32, 32)] * 3]
