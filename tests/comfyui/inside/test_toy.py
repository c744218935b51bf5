"""The toy FLUX in ComfyUI's own nodes: what the library generates with the toy."""

from __future__ import annotations

from collections.abc import Iterator

import comfy.cli_args
import comfy.model_management as management
import comfy.utils
import latent_preview
import pytest
import torch
from PIL import Image
from support.recorded import error
from torch.nn import functional

import nodes
from instantcharacter import CharacterEncoder, InstantCharacterPipeline, Strength
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.hosting import to_patcher
from instantcharacter.comfyui.images import to_image
from instantcharacter.comfyui.latent_format import ToyLatents
from instantcharacter.comfyui.loading import encode, load_adapter
from instantcharacter.comfyui.model_patch import apply
from instantcharacter.comfyui.toy import load_toy
from instantcharacter.files.catalog import TOY_FOLDER, toy
from instantcharacter.flux.latents import pack, unpack

PROMPT = "a picture of a character waving on a beach"
STEPS = 4


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def loaded():
    return load_toy()


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def clip(loaded):
    return loaded[1]


@pytest.fixture
def vae(loaded):
    return loaded[2]


@pytest.fixture(scope="module")
def library() -> InstantCharacterPipeline:
    return InstantCharacterPipeline.from_pretrained(toy("flux"), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    """IMAGE of the pack's monster, [1, 256, 256, 3]."""
    return to_image(Image.open(TOY_FOLDER.parent / "monster.png").convert("RGB").resize((256, 256)))[None]


@pytest.fixture(scope="module")
def character(picture):
    encoder = to_patcher(CharacterEncoder.from_pretrained(toy("siglip"), toy("dinov2")))
    return encode(picture, encoder, load_adapter(toy("adapter")))


def prompt(clip, text: str = PROMPT) -> list:
    return nodes.CLIPTextEncode().encode(clip, text)[0]


def sample(model, clip, latent=None) -> torch.Tensor:
    """KSampler's latents from seed 7."""
    latent = latent or nodes.EmptyLatentImage().generate(256, 256)[0]
    positive = prompt(clip)
    return nodes.KSampler().sample(model, 7, STEPS, 1.0, "euler", "simple", positive, positive, latent)[0]["samples"]


def test_embeddings_are_the_librarys(clip, library):
    for text in (PROMPT, "", "a picture of a character reading a book in a forest at night, pixel art"):
        ((embeds, extra),) = prompt(clip, text)
        theirs, pooled, _ = library.encode_prompt(text, None, max_sequence_length=32)
        assert error(embeds, theirs) < 1e-4
        assert error(extra["pooled_output"], pooled) < 1e-4


def test_a_words_weight_changes_the_embeddings(clip):
    ((plain, _),) = prompt(clip)
    ((weighted, _),) = prompt(clip, PROMPT.replace("waving", "(waving:1.4)"))
    assert error(weighted, plain) > 1e-3


@pytest.mark.parametrize("scale", [0.9, Strength(1.4, 0.9, 0.5, 0.8, 1.1)])
def test_ksampler_generates_the_librarys_picture_of_a_character(model, clip, vae, library, character, scale):
    library.set_character_adapter(character.adapter.adapter)
    noise = torch.randn(1, 8, 32, 32, generator=torch.manual_seed(7))
    (tokens,) = library(
        PROMPT, height=256, width=256, num_inference_steps=STEPS, guidance_scale=3.5, latents=pack(noise),
        subject_image=character.character, subject_scale=scale, output_type="latent", return_dict=False,
    )  # fmt: skip
    theirs = ToyLatents().process_out(unpack(tokens, 16, 16))
    with_character = apply(model, CharacterConditioning(character.adapter, character.character, scale))
    ours = sample(with_character, clip)
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < 2e-3
    assert error(sample(model, clip), theirs) > 0.1
    picture = (library.vae.decode(theirs).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert (vae.decode(ours) - picture).abs().mean() < 5e-3


def test_the_loras_layers_are_all_known(model, clip):
    styled = load_toy(lora_strength=0.8)[0]
    layers = len(comfy.utils.load_torch_file(str(toy("lora")))) // 2
    assert sum(map(len, styled.patches.values())) == layers
    assert error(sample(styled, clip), sample(model, clip)) > 1e-2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "uni_pc", "euler_ancestral"])
def test_other_samplers_generate(model, clip, sampler):
    positive, latent = prompt(clip), {"samples": torch.zeros(1, 16, 16, 16)}  # of EmptySD3LatentImage
    samples = nodes.KSampler().sample(model, 7, 3, 1.0, sampler, "beta", positive, positive, latent)[0]["samples"]
    assert samples.shape == (1, 8, 16, 16)
    assert samples.isfinite().all()


@torch.inference_mode()  # as ComfyUI runs nodes, which it adds up tiles in
def test_the_vae_returns_the_picture(vae, picture):
    for encoder, decoder in ((vae.encode, vae.decode), (vae.encode_tiled, vae.decode_tiled)):
        latents = encoder(picture)
        assert latents.shape == (1, 8, 32, 32)
        assert (decoder(latents) - picture).abs().mean() < 0.03


def test_the_vae_crops_to_whole_latents(vae, picture):
    assert vae.encode(picture[:, :100, :71]).shape == (1, 8, 12, 8)


def test_the_vae_leaves_the_device_when_comfyui_unloads(vae, picture):
    before = vae.encode(picture)
    management.unload_all_models()
    assert all(parameter.device.type == "cpu" for parameter in vae.first_stage_model.parameters())
    assert torch.equal(vae.encode(picture), before)


def test_previews_have_the_colours_of_the_picture(model, vae, picture):
    latents = model.model.latent_format.process_in(vae.encode(picture))
    assert len(ToyLatents().latent_rgb_factors) == latents.shape[1]
    comfy.cli_args.args.preview_method = latent_preview.LatentPreviewMethod.Auto
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    preview = to_image(previewer.decode_latent_to_preview(latents))
    small = functional.interpolate(picture.movedim(-1, 1), scale_factor=1 / 8, mode="area").movedim(1, -1)[0]
    assert (preview - small).abs().mean() < 0.1
