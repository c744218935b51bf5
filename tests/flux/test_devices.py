"""Where tensors are, on a machine without a GPU: see :mod:`pretended_cuda`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from support import recorded, tiny
from support.pipelines import complete_pipeline, generate
from support.pretended_cuda import CPU, CUDA, PretendedCuda
from torch import nn

from instantcharacter import Character, CharacterAdapter, CharacterFeatures, InstantCharacterImg2ImgPipeline
from instantcharacter.character.tokens import TokenCache
from instantcharacter.offload.planning import STRATEGIES, MemoryPlan
from instantcharacter.offload.streaming import on_device

FEATURES = CharacterFeatures(*recorded.features())


@pytest.fixture
def card() -> Iterator[PretendedCuda]:
    with PretendedCuda() as card:
        yield card
    assert not card.races, card.races[:5]


@pytest.fixture
def whole():
    return complete_pipeline()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return generate(complete_pipeline())


def devices(module: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in (*module.parameters(), *module.buffers())}


def on_card(features: CharacterFeatures) -> CharacterFeatures:
    return CharacterFeatures(*(tensor.to("cuda") for tensor in features))


# The card itself


def test_tensors_of_two_devices_do_not_mix(card):
    a, b = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (lambda: a + b, lambda: torch.cat([a, b]), lambda: nn.Linear(3, 1).to("cuda")(b)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (a * torch.tensor(2.0)).device == CUDA


def test_a_copy_that_is_read_too_early_is_a_race(card):
    host, stream = torch.ones(1000).pin_memory(), torch.cuda.Stream()
    slot = torch.empty(1000, device="cuda")
    with torch.cuda.stream(stream):
        slot.copy_(host, non_blocking=True)
    slot.sum()
    assert card.races
    torch.cuda.synchronize()
    del host, slot
    card.races.clear()


def test_memory_runs_out(card):
    card.capacity = 1000
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(1000, device="cuda")


# Parts on different devices


@pytest.mark.parametrize("on_gpu", ["fusion", "resampler", "one weight", "everything", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint_is_the_same_wherever_the_projectors_parts_are(card, tmp_path, on_gpu, dtype):
    recorded.adapter().save(tmp_path / "adapter.safetensors")
    adapter = CharacterAdapter.from_file(tmp_path / "adapter.safetensors", dtype=dtype)
    expected = recorded.adapter().fingerprint()
    for name, part in adapter.projector.named_children():
        if on_gpu == "everything" or on_gpu == ("resampler" if name == "resampler" else "fusion"):
            part.to("cuda")
    if on_gpu == "one weight":
        adapter.projector.resampler.latents.data = adapter.projector.resampler.latents.data.to("cuda")
    assert adapter.fingerprint() == expected


def test_a_character_is_made_where_the_fusion_is(card):
    """As ComfyUI has a projector in InstantCharacter Encode: its fusion on the GPU, its resampler not."""
    adapter = recorded.adapter()
    expected = adapter.fingerprint()
    for name, part in adapter.projector.named_children():
        if name != "resampler":
            part.to("cuda")
    character = adapter.create_character(on_card(FEATURES))
    assert character.fingerprint == expected
    assert character.fused.device == CUDA
    (tokens,) = TokenCache(adapter.projector).tokens(character, [500.0], CUDA, torch.float32)
    assert tokens.device == CUDA
    assert devices(adapter.projector.resampler) == {CPU}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_character_of_any_dtype_and_device_is_generated_on_any_other(whole, card, dtype):
    character = whole.create_character(recorded.PICTURE)
    whole.enable_character_offload("auto", device="cuda")
    picture = generate(whole, subject_image=character)
    for device in (CPU, CUDA):
        moved = Character(character.fused.to(device, dtype), character.fingerprint)
        assert (generate(whole, subject_image=moved) - picture).abs().max() < 0.1


def test_encoder_and_adapter_in_host_memory_and_flux_on_the_card(whole, expected, card):
    whole.to("cuda")
    assert torch.equal(generate(whole).cpu(), expected)
    assert devices(whole.character_adapter) == devices(whole.character_encoder) == {CPU}


def test_encoder_and_adapter_on_the_card_and_flux_in_host_memory(whole, expected, card):
    whole.character_encoder.to("cuda")
    whole.character_adapter.to("cuda")
    assert torch.equal(generate(whole).cpu(), expected)


def test_everything_on_the_card(whole, expected, card):
    for part in (whole, whole.character_encoder, whole.character_adapter):
        part.to("cuda")
    assert torch.equal(generate(whole).cpu(), expected)


def test_several_characters_masks_and_pictures(whole, card):
    whole.enable_character_offload("stream", device="cuda")
    left = torch.zeros(48, 64)
    left[:, :32] = 1
    one = whole.create_character(recorded.PICTURE)
    picture = generate(
        whole,
        subject_image=[one, recorded.PICTURE, one],
        subject_scale=[0.9, 0.7, 0.2],
        subject_mask=[left, (1 - left).to("cuda"), None],
        num_images_per_prompt=2,
    )
    assert picture.shape[0] == 2


def test_a_module_returns_to_host_memory_and_leaves_none_on_the_card(card):
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = [p.data_ptr() for p in module.parameters()]
    with on_device(module, torch.device("cuda")) as there:
        assert devices(there) == {CUDA}
    assert devices(module) == {CPU}
    assert [p.data_ptr() for p in module.parameters()] == before
    assert card.allocated == 0


def test_saved_on_the_card_and_loaded_from_the_disk(whole, card, tmp_path):
    whole.enable_character_offload("auto", device="cuda")
    one = whole.create_character(recorded.PICTURE)
    one.save(tmp_path / "a.safetensors")
    again = Character.load(tmp_path / "a.safetensors")
    assert again.is_same(one)
    assert torch.equal(generate(whole, subject_image=again), generate(whole, subject_image=one))


# Offloading


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_generates_on_the_card(whole, expected, card, strategy):
    whole.enable_character_offload(strategy, device="cuda")
    for _ in range(2):
        picture = generate(whole)
        assert picture.device == CUDA
        assert torch.equal(picture.cpu(), expected)
    before = card.allocated
    generate(whole, generator=torch.Generator().manual_seed(3))
    assert card.allocated <= before


@pytest.mark.parametrize("strategy", ["auto", "none", "stream"])
def test_a_picture_leaves_no_cycle_that_keeps_the_card_full(whole, card, strategy):
    whole.enable_character_offload(strategy, device="cuda")
    gc.collect()
    gc.disable()
    try:
        generate(whole)
        there = weakref.ref(whole.transformer)
        vars(whole).clear()
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("room", [0.9, 0.6, 0.3])
def test_out_of_memory_while_weights_are_placed_goes_on_with_a_smaller_plan(whole, expected, card, room, caplog):
    everything = whole.enable_character_offload("none", device="cuda").resident
    whole.to("cpu")
    full, card.capacity = card.capacity, int(room * everything)
    found = whole.enable_character_offload("none", device="cuda")
    card.capacity = full
    assert found.strategy != "none"
    assert "going on with" in caplog.text
    assert torch.equal(generate(whole).cpu(), expected)


def test_no_room_for_any_plan_leaves_a_pipeline_that_works_once_there_is_room(whole, expected, card, monkeypatch):
    card.capacity = 1000
    monkeypatch.setattr(MemoryPlan, "smaller", lambda self: None)
    with pytest.raises(torch.OutOfMemoryError, match="Draw smaller or fewer"):
        whole.enable_character_offload("none", device="cuda")
    card.capacity = 80 << 30
    for module in (whole.transformer, *whole.transformer.modules()):
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    whole.enable_character_offload("auto", device="cuda")
    assert torch.equal(generate(whole).cpu(), expected)


def test_no_room_in_the_middle_of_a_run_leaves_a_pipeline_that_works_once_there_is_room(whole, expected, card):
    whole.enable_character_offload("none", device="cuda")

    def fill(pipeline, step, *_):
        card.capacity = 1000
        return {}

    with pytest.raises(torch.OutOfMemoryError):
        generate(whole, callback_on_step_end=fill)
    card.capacity = 80 << 30
    assert torch.equal(generate(whole).cpu(), expected)


def test_memory_that_cannot_be_pinned_leaves_no_error_for_the_next_kernel(whole, expected, card, caplog):
    card.pins = False
    whole.enable_character_offload("stream", device="cuda")
    assert "cannot be pinned" in caplog.text
    torch.ones(1, device="cuda").add_(1)
    assert torch.equal(generate(whole).cpu(), expected)


def test_an_adapter_is_folded_on_the_given_device(card):
    pipeline = tiny.tiny_pipeline()
    adapter = pipeline.character_adapter
    card.peak = 0
    pipeline.set_character_adapter(adapter, device="cpu")
    assert card.peak == 0
    pipeline.set_character_adapter(adapter)
    assert card.peak > 0
    assert devices(pipeline.transformer) == {CPU}


# Pipelines that share their state


def shared_with(pipeline) -> InstantCharacterImg2ImgPipeline:
    other = InstantCharacterImg2ImgPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    other.share_character_adapter(pipeline)
    return other


def generate_from_picture(pipeline) -> torch.Tensor:
    return generate(pipeline, image=torch.full((1, 3, 48, 64), 0.5), strength=0.7)


@pytest.mark.parametrize("strategy", ["stream", "model", "none"])
def test_sharing_goes_on_when_the_first_pipeline_is_deleted(whole, card, strategy):
    whole.enable_character_offload(strategy, device="cuda")
    other = shared_with(whole)
    before = generate_from_picture(other)
    del whole
    gc.collect()
    assert torch.equal(generate_from_picture(other), before)
    other.enable_character_offload("stream", device="cuda")
    assert torch.equal(generate_from_picture(other), before)


def test_two_pipelines_share_one_offloader(whole, expected, card):
    other = shared_with(whole)
    whole.enable_character_offload("stream", device="cuda")
    first = generate_from_picture(other)
    other.enable_character_offload("none", device="cuda")
    assert whole.offloader is other.offloader
    assert torch.equal(generate(whole).cpu(), expected)
    whole.set_character_adapter(whole.character_adapter)
    assert torch.equal(generate_from_picture(other), first)
    whole.offloader.reduce_memory("out of memory")
    assert torch.equal(generate_from_picture(other), first)


def test_a_refused_adapter_leaves_the_one_before_in_place(whole, expected, card):
    whole.enable_character_offload("stream", device="cuda")
    adapter = whole.character_adapter
    with pytest.raises(ValueError, match="width is 128, the adapter is made for 256"):
        whole.set_character_adapter(recorded.adapter())
    assert whole.character_adapter is adapter
    assert torch.equal(generate(whole).cpu(), expected)
