"""FLUX files and ComfyUI: the library reads what ComfyUI saves, and ComfyUI runs the files that the library refuses."""

from __future__ import annotations

from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file
from support import recorded
from support.recorded import error

from instantcharacter import InstantCharacterPipeline
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.model_patch import apply
from instantcharacter.comfyui.nodes import loaders
from instantcharacter.flux.layout import own_part
from instantcharacter.flux.load import FluxFiles, load_flux
from instantcharacter.flux.lora import load_lora
from instantcharacter.flux.variants import variant


@pytest.fixture
def vae(tmp_path) -> Path:
    vae = recorded.components()["vae"]
    vae.save_pretrained(tmp_path / "vae", safe_serialization=True)
    return next((tmp_path / "vae").glob("*.safetensors"))


def sample(model, shown: dict) -> torch.Tensor:
    """Two steps of ComfyUI's sampling, with a picture in the conditioning."""
    text = recorded.prompt()
    prompt = [[text["prompt_embeds"], {"pooled_output": text["pooled_prompt_embeds"], "guidance": 3.5, **shown}]]
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
    empty = torch.zeros_like(noise)
    return comfy.sample.sample_custom(
        model, noise, 1.0, euler, sigmas, prompt, prompt, empty, seed=0, disable_pbar=True
    )


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
    assert variant(keys).native
    applied = apply(model, CharacterConditioning(adapter=adapter, character=character, scale=0.9))
    shown = {"concat_latent_image": torch.rand(1, 16, 8, 12), "concat_mask": torch.ones(1, 1, 64, 96)}
    assert error(sample(applied, shown), sample(model, shown)) > 1e-3


def test_a_model_is_no_variant_of_itself(model):
    keys = {key: weight.shape for key, weight in model.model.diffusion_model.state_dict().items()}
    assert variant(own_part(keys)) is None


def lokr() -> dict[str, torch.Tensor]:
    return {
        "lycoris_transformer_blocks_0_attn_to_out_0.lokr_w1": torch.randn(4, 4),
        "lycoris_transformer_blocks_0_attn_to_out_0.lokr_w2": torch.randn(64, 64) / 8,
    }


def control_lora() -> dict[str, torch.Tensor]:
    """As FLUX.1 Canny's and Depth's: it widens the input, and sets norms."""
    return {
        "img_in.lora_A.weight": torch.randn(4, 128) / 8,
        "img_in.lora_B.weight": torch.randn(256, 4) / 8,
        "single_blocks.0.norm.key_norm.scale": torch.rand(128) + 0.5,
    }


@pytest.mark.parametrize("lora", [lokr(), control_lora()], ids=["LoKr", "control"])
def test_loras_that_load_flux_refuses_draw_natively_with_the_character(adapter, character, model, lora, tmp_path):
    save_file(lora, tmp_path / "lora.safetensors")
    pipeline = InstantCharacterPipeline(**recorded.components())
    with pytest.raises(ValueError, match="ComfyUI's own Load LoRA reads it"):
        load_lora(pipeline, tmp_path / "lora.safetensors", "style")
    applied = apply(model, CharacterConditioning(adapter=adapter, character=character, scale=0.9))
    shown = {"concat_latent_image": torch.rand(1, 16, 8, 12)}
    before = sample(applied, shown)
    styled, _ = comfy.sd.load_lora_for_models(applied, None, lora, 1.0, 0.0)
    plain, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert error(sample(styled, shown), before) > 1e-3
    assert error(sample(styled, shown), sample(plain, shown)) > 1e-3


def test_8_bit_arithmetic_on_a_cpu_is_refused_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(loaders, "locate_flux", lambda *_: pytest.fail("it looked for the files, to download them"))
    with pytest.raises(ValueError, match="8-bit arithmetic needs an NVIDIA GPU"):
        loaders.FluxLoader.run("download", "download", "download", "download", "fp8_e4m3fn_fast", "auto")
