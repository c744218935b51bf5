"""The library's pipeline as a FLUX_PIPE, in a real ComfyUI."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import pytest
import torch
from reference.reference_fill import fill_module_
from support import recorded, tiny
from support.comfyui_sampling import sample
from support.recorded import error

from instantcharacter import Character, InstantCharacterPipeline
from instantcharacter.comfyui import model_patch as comfy_patch
from instantcharacter.comfyui.hosting import HostedAdapter, HostedCharacter, progress
from instantcharacter.comfyui.sampler import (
    HostedPipeline,
    InitImage,
    Prompt,
    StyledPipeline,
    init_from_inputs,
    last_pipeline,
)
from instantcharacter.flux.lora import load_lora
from instantcharacter.offload.streaming import is_offloaded

SIZE = (96, 64)


def conditioning() -> list:
    text = recorded.prompt()
    return [[text["prompt_embeds"], {"pooled_output": text["pooled_prompt_embeds"]}]]


@pytest.fixture
def hosted() -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto")


def draw(hosted, who=None, steps=4, **settings):
    return hosted.draw(who, Prompt(conditioning()), SIZE, steps, 7, **settings)


def test_it_draws_what_the_library_draws(hosted, adapter, character):
    library = InstantCharacterPipeline(**recorded.components())
    library.set_character_adapter(adapter.adapter)
    settings = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    generator = torch.Generator().manual_seed(7)
    theirs = library(**recorded.prompt(), **settings, subject_image=character, generator=generator)[0]
    ours = draw(hosted, HostedCharacter(character, adapter), subject_scale=0.9)
    assert torch.equal(ours.image, theirs.permute(0, 2, 3, 1))
    vae = library.vae
    again = vae.decode(comfy.latent_formats.Flux().process_in(ours.samples) / vae.config.scaling_factor + 0.1159)[0]
    assert error((again / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), ours.image) < 1e-4


def test_another_characters_adapter_takes_the_place_of_the_first(hosted, adapter, character):
    other = recorded.adapter(seed=12)
    fill_module_(other.projector, "image_proj.", 12)
    other = HostedAdapter(other)
    stranger = Character(other.projector.fuse(*recorded.features()).detach(), other.fingerprint)
    first = draw(hosted, HostedCharacter(character, adapter))
    second = draw(hosted, HostedCharacter(stranger, other))
    assert error(second.samples, first.samples) > 1e-3
    assert torch.equal(draw(hosted, HostedCharacter(character, adapter)).samples, first.samples)


@pytest.mark.parametrize(("steps", "denoise"), [(3, 0.4), (4, 1.0), (1, 0.01), (5, 0.7), (10, 0.33)])
def test_so_many_steps_are_run_whatever_is_drawn_anew(hosted, monkeypatch, steps, denoise):
    told = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *_: told.append(value))
    draw(hosted, steps=steps, start=InitImage(denoise, image=torch.rand(1, 64, 96, 3)))
    assert told == list(range(1, steps + 1))


def test_a_start_gives_the_size_and_how_many(hosted):
    image = draw(hosted, start=InitImage(0.5, image=torch.rand(2, 70, 50, 4))).image
    assert image.shape == (2, 64, 48, 3)
    samples = torch.rand(1, 16, 6, 10)
    assert draw(hosted, start=InitImage(0.5, samples=samples), batch_size=3).image.shape == (3, 48, 80, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.rand(1, 8, 8, 3), {"samples": torch.rand(1, 16, 8, 8)}), "disconnect one"),
        ((None, {"samples": torch.rand(1, 16, 8, 8), "noise_mask": torch.ones(1)}), "does not inpaint"),
        ((None, {"samples": torch.rand(1, 4, 8, 8)}), r"\[1, 4, 8, 8\]; expected \[batch, 16"),
    ],
)
def test_what_it_cannot_begin_with_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        init_from_inputs(*given, 0.5)


def test_combined_conditioning_is_refused(hosted):
    with pytest.raises(ValueError, match="one prompt for FLUX.*InstantCharacter Apply"):
        hosted.draw(None, Prompt(conditioning() * 2), SIZE, 1, 0)


def test_progress_cancels_where_the_user_does():
    tell = progress()
    tell(1, 2)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        tell(2, 2)


@pytest.mark.parametrize("strategy", ["auto", "none", "model", "stream", "sequential"])
def test_every_strategy_draws_the_same(hosted, adapter, character, strategy):
    who = HostedCharacter(character, adapter)
    other = HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)
    for _ in range(2):
        assert torch.equal(draw(other, who).samples, draw(hosted, who).samples)


def test_what_stays_is_comfyuis_to_free(adapter, character):
    hosted = HostedPipeline(InstantCharacterPipeline(**recorded.components()), "none")
    before = draw(hosted, HostedCharacter(character, adapter))
    staying = hosted._staying
    assert staying in [loaded.model for loaded in management.current_loaded_models]
    assert management.module_size(staying.model) > management.module_size(hosted.pipeline.transformer)
    management.unload_all_models()
    assert torch.equal(draw(hosted, HostedCharacter(character, adapter)).samples, before.samples)


# LoRAs and what is loaded


@pytest.fixture
def styled(hosted):
    """What draws with the recorded LoRA at a strength."""
    load_lora(hosted.pipeline, recorded.LORA, "style")
    return lambda strength: StyledPipeline(hosted, strength)


def test_each_flux_pipe_draws_at_its_own_strength(hosted, styled, adapter, character):
    who = HostedCharacter(character, adapter)
    weak, strong = styled(0.3), styled(1.5)
    drawn = [draw(pipe, who).samples for pipe in (weak, strong, weak, strong)]
    for again, first in zip(drawn[2:], drawn):
        assert torch.equal(again, first)
    assert error(drawn[1], drawn[0]) > 1e-3
    library = InstantCharacterPipeline(**recorded.components())
    load_lora(library, recorded.LORA, "style")
    library.set_adapters(["style"], [1.5])
    assert torch.equal(draw(HostedPipeline(library, "auto"), who, lora_strength=1.5).samples, drawn[1])


def test_another_strength_plans_and_encodes_nothing_anew():
    pipeline = InstantCharacterPipeline(**tiny.tiny_components())
    state = {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 128)}
    pipeline.transformer.load_lora_adapter(
        {**state, "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(128, 2)}, prefix=None, adapter_name="style"
    )
    read = []
    pipeline.text_encoder.register_forward_hook(lambda *_: read.append(1))
    hosted = HostedPipeline(pipeline, "auto")
    plans = []
    for strength in (0.1, 0.9):
        StyledPipeline(hosted, strength).draw(None, Prompt("a fox"), SIZE, 1, 7, max_sequence_length=64)
        plans.append(hosted.pipeline.offloader)
    assert read == [1]
    assert plans[0] is plans[1]


def test_the_last_pipeline_is_kept_while_a_node_holds_it_and_goes_before_another_is_loaded(adapter, character):
    node = last_pipeline()
    assert last_pipeline() is node
    first = node.get("one", lambda: HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto"))
    draw(first, HostedCharacter(character, adapter))
    gone = weakref.ref(first.pipeline.transformer)
    del first
    assert node.get("one", lambda: pytest.fail("loaded again")).pipeline.transformer is gone()

    def load() -> HostedPipeline:
        assert gone() is None
        return HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto")

    other = weakref.ref(node.get("another", load))
    with pytest.raises(FileNotFoundError):
        node.get("broken", lambda: Path("gone").stat())
    assert other() is None
    kept = weakref.ref(node.get("one", load))
    del node
    assert kept() is None
    assert last_pipeline()._pipeline is None


def test_a_smaller_plan_is_told_to_comfyui(adapter, character):
    hosted = HostedPipeline(InstantCharacterPipeline(**recorded.components()), "none")
    who = HostedCharacter(character, adapter)
    before, first = draw(hosted, who), hosted._staying
    hosted.pipeline.offloader.reduce_memory("out of memory")
    assert torch.equal(draw(hosted, who).samples, before.samples)
    assert management.module_size(hosted._staying.model) < management.module_size(first.model)


def on_device(module: torch.nn.Module) -> int:
    """Bytes of a module on ComfyUI's device, when that is not the CPU."""
    tensors = {*module.parameters(), *module.buffers()}
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


def pipe(strategy: str = "none") -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline(**recorded.components()), strategy)


def test_everything_leaves_the_device_when_comfyui_unloads(adapter, character):
    hosted = pipe()
    draw(hosted, HostedCharacter(character, adapter))
    management.unload_all_models()
    assert on_device(hosted.pipeline.transformer) == on_device(hosted.pipeline.vae) == 0
    assert on_device(adapter.adapter) == 0


def test_a_smaller_plan_frees_the_device(adapter, character):
    """ComfyUI's patcher for dynamic VRAM put the weights of the larger plan back."""
    hosted, who = pipe(), HostedCharacter(character, adapter)
    first = draw(hosted, who)
    before = on_device(hosted.pipeline.transformer)
    hosted.pipeline.offloader.reduce_memory("out of memory")
    assert torch.equal(draw(hosted, who).samples, first.samples)
    assert on_device(hosted.pipeline.transformer) <= before / 2


def test_what_stays_is_loaded_once(adapter, character):
    """Tens of gigabytes went to the host and back between two pictures."""
    hosted, who = pipe(), HostedCharacter(character, adapter)
    draw(hosted, who)
    staying = hosted._staying
    for size in (SIZE, (64, 64), SIZE):
        hosted.draw(who, Prompt(conditioning()), size, 1, 7)
        assert hosted._staying is staying
    assert staying in [loaded.model for loaded in management.current_loaded_models]


def test_a_second_pipe_gets_the_room(adapter, character):
    who = HostedCharacter(character, adapter)
    one, two = pipe(), pipe()
    first = draw(one, who)
    draw(two, who)
    assert on_device(one.pipeline.transformer) == 0
    assert torch.equal(draw(one, who).samples, first.samples)


def test_a_picture_leaves_no_cycle_that_keeps_its_weights(adapter, character):
    hosted = pipe("stream")
    draw(hosted, HostedCharacter(character, adapter))
    there = weakref.ref(hosted.pipeline.transformer)
    gc.collect()
    gc.disable()
    try:
        draw(hosted, HostedCharacter(character, adapter))
        del hosted
        assert there() is None
    finally:
        gc.enable()


def test_sampler_and_apply_share_an_adapter_that_comfyui_manages_alone(model, adapter, character):
    hosted, who = pipe("auto"), HostedCharacter(character, adapter)
    natively = comfy_patch.apply(model, comfy_patch.CharacterConditioning(adapter, character, 0.9))
    first, ours = draw(hosted, who), sample(natively)
    again = Character(character.fused, character.fingerprint)  # without the tokens of the last schedule
    assert torch.equal(draw(hosted, HostedCharacter(again, adapter)).samples, first.samples)
    assert torch.equal(sample(natively, seed=1), ours)
    assert not any(map(is_offloaded, adapter.adapter.modules()))
    assert adapter.resampler not in [loaded.model for loaded in management.current_loaded_models]
    management.unload_all_models()
    assert on_device(adapter.adapter) == 0


def test_a_refused_adapter_leaves_a_pipe_that_draws(hosted, adapter, character):
    who = HostedCharacter(character, adapter)
    first = draw(hosted, who)
    wide = HostedAdapter(recorded.adapter(dataclasses.replace(recorded.ADAPTER_CONFIG, attention_dim=512)))
    stranger = Character(wide.projector.fuse(*recorded.features()).detach(), wide.fingerprint)
    with pytest.raises(ValueError, match="width is 256, the adapter is made for 512"):
        draw(hosted, HostedCharacter(stranger, wide))
    assert torch.equal(draw(hosted, who).samples, first.samples)
