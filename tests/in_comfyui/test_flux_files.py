"""FLUX files and ComfyUI: what it saves is read by the library, and what the library refuses is drawn natively."""

from __future__ import annotations

from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import recorded
import torch
from recorded import error

from instantcharacter import comfy_patch, flux_variants
from instantcharacter.comfy_patch import Part
from instantcharacter.flux_files import FluxFiles, load_flux
from instantcharacter.flux_layout import own_part


@pytest.fixture
def vae(tmp_path) -> Path:
    vae = recorded.components()["vae"]
    vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    return next((tmp_path / "vae").glob("*.safetensors"))


def test_what_comfyui_saves_is_read(model, vae, tmp_path):
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model)
    loaded = load_flux(FluxFiles(tmp_path / "saved.safetensors", vae=vae), torch.float32).transformer.state_dict()
    for key, weight in recorded.transformer().state_dict().items():
        assert torch.equal(loaded[key], weight), key


@pytest.mark.parametrize("channels", [384, 128])
def test_kinds_with_other_inputs_draw_the_character_natively(adapter, character, channels):
    """As Load FLUX says where it refuses them."""
    transformer = recorded.transformer(in_channels=channels, out_channels=64)
    model = comfy.sd.load_diffusion_model_state_dict(transformer.state_dict())
    keys = {key: weight.shape for key, weight in model.model.diffusion_model.state_dict().items()}
    assert flux_variants.variant(keys).native
    applied = comfy_patch.apply(model, Part(adapter=adapter, character=character, scale=0.9))
    text = recorded.prompt()
    shown = {"concat_latent_image": torch.rand(1, 16, 8, 12), "concat_mask": torch.ones(1, 1, 64, 96)}
    prompt = [[text["prompt_embeds"], {"pooled_output": text["pooled_prompt_embeds"], "guidance": 3.5, **shown}]]
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
    plain, drawn = (
        comfy.sample.sample_custom(
            flux, noise, 1.0, euler, sigmas, prompt, prompt, torch.zeros_like(noise), seed=0, disable_pbar=True
        )
        for flux in (model, applied)
    )
    assert error(drawn, plain) > 1e-3


def test_a_model_is_no_variant_of_itself(model):
    keys = {key: weight.shape for key, weight in model.model.diffusion_model.state_dict().items()}
    assert flux_variants.variant(own_part(keys)) is None
