"""The Sampler's pipeline in a real ComfyUI: its results, and where its weights are."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import pytest
import torch
from PIL import Image
from reference.reference_fill import fill_module_
from support import recorded, tiny
from support.comfyui_sampling import sample
from support.recorded import error

from instantcharacter import Character, CharacterEncoder, InstantCharacterPipeline
from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.hosting import HostedAdapter, HostedCharacter, to_patcher
from instantcharacter.comfyui.images import to_image
from instantcharacter.comfyui.init_image import InitImage, Prompt
from instantcharacter.comfyui.internals import loaded_models
from instantcharacter.comfyui.loading import encode
from instantcharacter.comfyui.model_patch import apply
from instantcharacter.comfyui.sampler import HostedPipeline, StyledPipeline
from instantcharacter.flux.fp8 import compute_in_fp8
from instantcharacter.flux.lora import load_lora

SIZE = (96, 64)


def conditioning() -> list:
    text = recorded.prompt()
    return [[text["prompt_embeds"], {"pooled_output": text["pooled_prompt_embeds"]}]]


@pytest.fixture
def hosted() -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto")


def generate(hosted, character=None, steps=4, **settings):
    return hosted.generate(character, Prompt(conditioning()), SIZE, steps, 7, **settings)


def offloader(hosted: HostedPipeline):
    """The library's offloader of the pipeline."""
    return hosted.pipeline.offloader


def on_device(module: torch.nn.Module) -> int:
    """Bytes of a module on ComfyUI's device, when that is not the CPU."""
    tensors = {*module.parameters(), *module.buffers()}
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


def pipe(strategy: str = "none") -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)


def test_it_generates_what_the_library_generates(hosted, adapter, character):
    library = InstantCharacterPipeline(**recorded.components())
    library.set_character_adapter(adapter.adapter, "cpu")
    settings = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    generator = torch.Generator().manual_seed(7)
    theirs = library(**recorded.prompt(), **settings, subject_image=character, generator=generator)[0]
    ours = generate(hosted, HostedCharacter(character, adapter), subject_scale=0.9)
    assert torch.equal(ours.image, theirs.permute(0, 2, 3, 1))
    vae = library.vae
    again = vae.decode(comfy.latent_formats.Flux().process_in(ours.samples) / vae.config.scaling_factor + 0.1159)[0]
    assert error((again / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), ours.image) < 1e-4


def test_a_character_of_another_adapter_replaces_the_adapter(hosted, adapter, character):
    other = recorded.adapter(seed=12)
    fill_module_(other.projector, "image_proj.", 12)
    other = HostedAdapter(other)
    stranger = Character(other.adapter.projector.fuse(*recorded.features()).detach(), other.fingerprint)
    first = generate(hosted, HostedCharacter(character, adapter))
    second = generate(hosted, HostedCharacter(stranger, other))
    assert error(second.samples, first.samples) > 1e-3
    assert torch.equal(generate(hosted, HostedCharacter(character, adapter)).samples, first.samples)


@pytest.mark.parametrize(("steps", "denoise"), [(3, 0.4), (4, 1.0), (1, 0.01), (5, 0.7), (10, 0.33)])
def test_all_steps_run_whatever_denoise_is(hosted, monkeypatch, steps, denoise):
    reported = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *_: reported.append(value))
    generate(hosted, steps=steps, init=InitImage(denoise, image=torch.rand(1, 64, 96, 3)))
    assert reported == list(range(1, steps + 1))


def test_the_init_image_sets_size_and_batch(hosted):
    image = generate(hosted, init=InitImage(0.5, image=torch.rand(2, 70, 50, 4))).image
    assert image.shape == (2, 64, 48, 3)
    samples = torch.rand(1, 16, 6, 10)
    assert generate(hosted, init=InitImage(0.5, samples=samples), batch_size=3).image.shape == (3, 48, 80, 3)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 8, 8, 8), (1, 16, 1, 8, 8)])
def test_latents_of_another_model_are_refused(hosted, shape):
    with pytest.raises(ValueError, match=r"the latent is \[1, .*; expected \[batch, 16, height, width\]"):
        generate(hosted, init=InitImage(0.5, samples=torch.rand(shape)))


def test_an_init_image_may_be_grey(hosted):
    grey = torch.rand(1, 64, 96, 1)
    pictures = [
        generate(hosted, init=InitImage(0.5, image=image)).image for image in (grey, grey.expand(-1, -1, -1, 3))
    ]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("size", [(257, 256), (256, 264), (-16, 8)])
def test_a_size_that_flux_does_not_have_is_refused(hosted, size):
    with pytest.raises(ValueError, match=f"the picture is {size[0]} wide and {size[1]} high; expected multiples of 16"):
        hosted.generate(None, Prompt(conditioning()), size, 4, 7)


@pytest.mark.parametrize(
    ("text", "pooled"), [((1, 5, 7), (1, 32)), ((1, 5, 64), (1, 7)), ((5, 64), (1, 32)), ((1, 5, 64), (2, 32))]
)
def test_embeddings_of_another_model_are_refused_before_anything_is_loaded(hosted, text, pooled):
    prompt = Prompt([[torch.rand(text), {"pooled_output": torch.rand(pooled)}]])
    with pytest.raises(ValueError, match=r"has embeddings \[.* expects \[1, words, 64\] and \[1, 32\]: encode"):
        hosted.generate(None, prompt, SIZE, 4, 7)
    assert offloader(hosted) is None


def test_combined_conditioning_is_refused(hosted):
    with pytest.raises(ValueError, match="one prompt for FLUX.*InstantCharacter Apply"):
        hosted.generate(None, Prompt(conditioning() * 2), SIZE, 1, 0)


@pytest.mark.parametrize("strategy", ["auto", "none", "model", "stream", "sequential"])
def test_every_strategy_generates_the_same(hosted, adapter, character, strategy):
    who = HostedCharacter(character, adapter)
    other = HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)
    for _ in range(2):
        assert torch.equal(generate(other, who).samples, generate(hosted, who).samples)


@pytest.mark.parametrize("strategy", ["auto", "none", "model", "stream", "sequential"])
def test_every_strategy_generates_the_same_in_8_bit_arithmetic(adapter, character, strategy):
    def in_8_bits(strategy: str) -> HostedPipeline:
        hosted = pipe(strategy)
        compute_in_fp8(hosted.pipeline.transformer, torch.float32, by_rows=False)
        return hosted

    who = HostedCharacter(character, adapter)
    expected = generate(in_8_bits("none"), who).samples
    assert torch.equal(generate(in_8_bits(strategy), who).samples, expected)
    assert 1e-3 < error(generate(pipe(), who).samples, expected) < 0.1


@pytest.mark.parametrize("strategy", ["auto", "none", "model", "stream", "sequential"])
def test_steps_are_left_out_under_every_strategy(hosted, adapter, character, strategy):
    who = HostedCharacter(character, adapter)
    other = HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)
    every = {"steps": 8, "cache_threshold": float("inf")}
    expected = generate(hosted, who, **every).samples
    assert error(expected, generate(hosted, who, steps=8).samples) > 1e-3
    for _ in range(2):
        assert torch.equal(generate(other, who, **every).samples, expected)


def test_comfyui_loads_and_unloads_the_resident_weights(adapter, character):
    hosted = HostedPipeline(InstantCharacterPipeline(**recorded.components()), "none")
    before = generate(hosted, HostedCharacter(character, adapter))
    resident = hosted.resident
    assert resident in [loaded.model for loaded in loaded_models()]
    assert management.module_size(resident.model) > management.module_size(hosted.pipeline.transformer)
    management.unload_all_models()
    assert torch.equal(generate(hosted, HostedCharacter(character, adapter)).samples, before.samples)


# LoRAs


@pytest.fixture
def styled(hosted):
    """Makes FLUX_PIPEs of one pipeline, with the recorded LoRA at a strength."""
    load_lora(hosted.pipeline, recorded.LORA, "style")
    return lambda strength: StyledPipeline(hosted, strength)


def test_each_flux_pipe_has_its_own_lora_strength(hosted, styled, adapter, character):
    who = HostedCharacter(character, adapter)
    weak, strong = styled(0.3), styled(1.5)
    samples = [generate(pipe, who).samples for pipe in (weak, strong, weak, strong)]
    for again, first in zip(samples[2:], samples):
        assert torch.equal(again, first)
    assert error(samples[1], samples[0]) > 1e-3
    library = InstantCharacterPipeline(**recorded.components())
    load_lora(library, recorded.LORA, "style")
    library.set_adapters(["style"], [1.5])
    assert torch.equal(generate(HostedPipeline(library, "auto"), who, lora_strength=1.5).samples, samples[1])


def test_another_lora_strength_keeps_plan_and_prompt_embeddings():
    pipeline = InstantCharacterPipeline(**tiny.tiny_components())
    state = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128)}
    pipeline.transformer.load_lora_adapter(
        {**state, "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(128, 2)}, prefix=None, adapter_name="style"
    )
    encoded = []
    pipeline.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    hosted = HostedPipeline(pipeline, "auto")
    plans = []
    for strength in (0.1, 0.9):
        StyledPipeline(hosted, strength).generate(None, Prompt("a fox"), SIZE, 1, 7, max_sequence_length=64)
        plans.append(offloader(hosted))
    assert encoded == [1]
    assert plans[0] is plans[1]


def test_a_smaller_plan_makes_fewer_weights_resident(adapter, character):
    hosted = HostedPipeline(InstantCharacterPipeline(**recorded.components()), "none")
    who = HostedCharacter(character, adapter)
    before, first = generate(hosted, who), hosted.resident
    offloader(hosted).reduce_memory("out of memory")
    assert torch.equal(generate(hosted, who).samples, before.samples)
    assert management.module_size(hosted.resident.model) < management.module_size(first.model)


def test_everything_leaves_the_device_when_comfyui_unloads(adapter, character):
    hosted = pipe()
    generate(hosted, HostedCharacter(character, adapter))
    management.unload_all_models()
    assert on_device(hosted.pipeline.transformer) == on_device(hosted.pipeline.vae) == 0
    assert on_device(adapter.adapter) == 0


def test_a_smaller_plan_frees_the_device(adapter, character):
    """ComfyUI's patcher for dynamic VRAM put the weights of the larger plan back."""
    hosted, who = pipe(), HostedCharacter(character, adapter)
    first = generate(hosted, who)
    before = on_device(hosted.pipeline.transformer)
    offloader(hosted).reduce_memory("out of memory")
    assert torch.equal(generate(hosted, who).samples, first.samples)
    assert on_device(hosted.pipeline.transformer) <= before / 2


def test_resident_weights_are_loaded_once(adapter, character):
    """Tens of gigabytes went to the host and back between two pictures."""
    hosted, who = pipe(), HostedCharacter(character, adapter)
    generate(hosted, who)
    resident = hosted.resident
    for size in (SIZE, (64, 64), SIZE):
        hosted.generate(who, Prompt(conditioning()), size, 1, 7)
        assert hosted.resident is resident
    assert resident in [loaded.model for loaded in loaded_models()]


def test_a_second_pipe_gets_the_memory_of_the_first(adapter, character):
    who = HostedCharacter(character, adapter)
    one, two = pipe(), pipe()
    first = generate(one, who)
    generate(two, who)
    assert on_device(one.pipeline.transformer) == 0
    assert torch.equal(generate(one, who).samples, first.samples)


@pytest.mark.parametrize("cache_threshold", [0.0, float("inf")])
def test_a_run_leaves_no_reference_cycle_with_the_weights(adapter, character, cache_threshold):
    hosted = pipe("stream")
    generate(hosted, HostedCharacter(character, adapter), cache_threshold=cache_threshold)
    transformer = weakref.ref(hosted.pipeline.transformer)
    gc.collect()
    gc.disable()
    try:
        generate(hosted, HostedCharacter(character, adapter), cache_threshold=cache_threshold)
        del hosted
        assert transformer() is None
    finally:
        gc.enable()


# One memory manager for each module


def test_the_librarys_offloader_has_flux_its_text_encoders_and_the_vae(adapter, character):
    pipeline = InstantCharacterPipeline(**tiny.tiny_components())
    hosted = HostedPipeline(pipeline, "auto")
    hosted.generate(None, Prompt("a fox"), SIZE, 1, 7, max_sequence_length=64)
    whole = {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert set(offloader(hosted).plan.components) == whole
    hosted = pipe()
    generate(hosted, HostedCharacter(character, adapter))
    assert set(offloader(hosted).plan.components) == {"transformer", "vae"}


def test_sampler_and_apply_share_encoder_and_adapter_that_comfyui_manages(model, adapter):
    encoder = to_patcher(CharacterEncoder.from_pretrained(recorded.FOLDER / "siglip", recorded.FOLDER / "dinov2"))
    picture = to_image(Image.open(recorded.PICTURE))[None]

    results = []
    for _ in range(2):
        character = encode(picture, encoder, adapter)
        hosted = pipe("auto")
        ours = generate(hosted, character).samples
        native = sample(apply(model, CharacterConditioning(adapter, character.character, 0.9)))
        assert torch.equal(generate(hosted, character).samples, ours)
        assert on_device(adapter.adapter.projector.resampler) == 0
        results.append((character.character.fused.cpu(), ours, native))
        management.unload_all_models()
        assert on_device(adapter.adapter) == on_device(encoder.model) == on_device(hosted.pipeline.transformer) == 0
    for first, again in zip(*results):
        assert torch.equal(again, first)


def test_a_refused_adapter_leaves_the_pipe_usable(hosted, adapter, character):
    who = HostedCharacter(character, adapter)
    first = generate(hosted, who)
    wide = HostedAdapter(recorded.adapter(dataclasses.replace(recorded.ADAPTER_CONFIG, attention_dim=512)))
    stranger = Character(wide.adapter.projector.fuse(*recorded.features()).detach(), wide.fingerprint)
    with pytest.raises(ValueError, match="width is 256, the adapter is made for 512"):
        generate(hosted, HostedCharacter(stranger, wide))
    assert torch.equal(generate(hosted, who).samples, first.samples)
