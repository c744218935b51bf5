"""Pipelines under a memory plan, on the CPU at a tiny size."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref

import pytest
import torch
from support import recorded, tiny
from support.pipelines import complete_pipeline, components, generate, offload
from torch import nn

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux.components import VAE_TILE
from instantcharacter.flux.hooks import has_accelerate_hook
from instantcharacter.flux.offloading import OffloadRequest, PipelineOffload, picture_sizes, plan_request
from instantcharacter.offload import GIB, MemoryPlan, measure, plan
from instantcharacter.offload.planning import vram_for
from instantcharacter.offload.sizes import ACTIVATION_BYTES
from instantcharacter.offload.streaming import is_offloaded


@pytest.fixture
def whole() -> InstantCharacterPipeline:
    """A pipeline with everything, text encoders and vision encoders too."""
    return complete_pipeline()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Its picture without any plan."""
    return generate(complete_pipeline())


def partly(pipeline: InstantCharacterPipeline, streamed: tuple[int, ...]) -> MemoryPlan:
    """A plan in which these of FLUX's four blocks stream."""
    every = plan(measure(components(pipeline)), strategy="stream")
    return dataclasses.replace(every, streamed=streamed)


@pytest.mark.parametrize("strategy", ["auto", "none", "model", "stream", "sequential"])
def test_every_strategy_generates_the_same_picture(whole, expected, strategy):
    whole.enable_character_offload(strategy)
    assert torch.equal(generate(whole), expected)
    assert torch.equal(generate(whole), expected)


@pytest.mark.parametrize("streamed", [(), (0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)])
def test_any_blocks_may_stream(whole, expected, streamed):
    offload(whole, partly(whole, streamed))
    assert torch.equal(generate(whole), expected)


def test_strategies_can_be_changed(whole, expected):
    for strategy in ("stream", "sequential", "none", "model", "stream"):
        whole.enable_character_offload(strategy)
        assert torch.equal(generate(whole), expected)
    whole.to("cpu")
    assert torch.equal(generate(whole), expected)


def test_streamed_weights_are_in_host_memory_between_pictures(whole):
    offload(whole, partly(whole, (1, 3)))
    block = whole.transformer.transformer_blocks[1]
    before = [tensor.data_ptr() for tensor in block.parameters()]
    seen = []
    block.attn.register_forward_pre_hook(lambda *_: seen.append([t.data_ptr() for t in block.parameters()]))
    generate(whole)
    assert [tensor.data_ptr() for tensor in block.parameters()] == before
    assert seen
    assert all(not set(addresses) & set(before) for addresses in seen)


def test_one_block_at_a_time_is_bound_to_a_slot(whole):
    offload(whole, partly(whole, (0, 1, 2, 3)))
    blocks = [*whole.transformer.transformer_blocks, *whole.transformer.single_transformer_blocks]
    in_host_memory = [[tensor.data_ptr() for tensor in block.parameters()] for block in blocks]
    bound = []

    def count(*_: object) -> None:
        now = [[tensor.data_ptr() for tensor in block.parameters()] for block in blocks]
        bound.append(sum(before != after for before, after in zip(in_host_memory, now)))

    for block in blocks:
        block.attn.register_forward_pre_hook(count)
    generate(whole)
    assert set(bound) == {1}


def test_offload_works_in_inference_mode(whole, expected):
    whole.enable_character_offload("stream")
    with torch.inference_mode():
        assert torch.equal(generate(whole), expected)
    assert torch.equal(generate(whole), expected)


def test_pipelines_made_in_inference_mode_can_stream(expected):
    with torch.inference_mode():
        pipeline = complete_pipeline()
        pipeline.enable_character_offload("stream")
        assert torch.equal(generate(pipeline), expected)


def test_a_failed_run_leaves_the_weights_in_host_memory(whole, expected):
    offload(whole, partly(whole, (0, 1, 2, 3)))
    block = whole.transformer.single_transformer_blocks[0]
    handle = block.attn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(whole)
    handle.remove()
    assert torch.equal(generate(whole), expected)


def test_a_smaller_budget_streams_more(whole):
    everything = measure(components(whole))
    needed = plan(everything, strategy="none").predicted_peak
    assert whole.enable_character_offload("auto").strategy == "none"
    found = whole.enable_character_offload("auto", vram_gb=needed / GIB)
    assert found.strategy == "stream"
    assert found.vram_bytes == int(needed)


def test_larger_pictures_change_the_plan_for_their_run(whole):
    fitting = plan(measure(components(whole)), strategy="none", resolution=(64, 48))
    found = whole.enable_character_offload("auto", vram_gb=vram_for(fitting.predicted_peak) * 1.7 / GIB)
    small, placed = generate(whole), whole.offloader
    assert placed.plan.resident == found.resident
    placed.prepare((2048, 2048), 1)
    assert placed.plan.resident < found.resident
    generate(whole, width=512, height=512, num_inference_steps=1, output_type="latent")
    assert torch.equal(generate(whole), small)
    assert placed.plan.resident == found.resident


def test_the_vae_decodes_in_tiles_only_pictures_that_need_it(whole):
    everything = measure(components(whole))
    activations = ACTIVATION_BYTES["vae"][1] * 1024**2
    fitting = plan(everything, vram_bytes=int(0.75 * activations), resolution=(64, 48))
    fitting = dataclasses.replace(fitting, strategy="stream", resident_components=frozenset({"transformer"}))
    offloader = offload(whole, fitting)
    offloader.prepare((1024, 1024), 1)
    assert offloader.plan.resident_components == fitting.resident_components
    assert offloader.plan.streamed == fitting.streamed
    assert whole.vae.use_tiling
    offloader.prepare((64, 48), 1)
    assert not whole.vae.use_tiling


def test_undoing_a_plan_restores_the_vaes_slicing_and_tiling(whole):
    whole.vae.enable_tiling()
    before = dict(vars(whole.vae))
    everything = measure(components(whole))
    tiled = dataclasses.replace(plan(everything, strategy="stream"), tiled=True)
    offloader = offload(whole, tiled)
    assert whole.vae.use_slicing
    assert whole.vae.tile_sample_min_size == VAE_TILE
    offloader.undo()
    assert dict(vars(whole.vae)) == before
    offload(whole, plan(everything, strategy="none"))
    assert whole.vae.use_tiling


def test_offloading_goes_on_with_another_adapter_or_encoder(whole, expected, tmp_path):
    whole.enable_character_offload("stream")
    whole.set_character_adapter(tiny.tiny_adapter())
    assert torch.equal(generate(whole), expected)
    whole.set_character_encoder(tiny.tiny_encoder())
    assert torch.equal(generate(whole), expected)
    whole.remove_character_adapter()
    plain = generate(whole, subject_image=None)
    whole.set_character_adapter(tiny.tiny_adapter())
    assert torch.equal(generate(whole, subject_scale=0), plain)
    assert whole.offloader.plan.strategy == "stream"


def test_sequential_offloading_goes_on_with_another_adapter(whole, expected):
    whole.enable_character_offload("sequential")
    whole.set_character_adapter(tiny.tiny_adapter())
    assert torch.equal(generate(whole), expected)


def test_a_lora_that_is_loaded_under_a_plan_streams_with_its_blocks(whole, tmp_path):
    save_lora(whole, tmp_path)
    other = complete_pipeline()
    other.load_lora_weights(tmp_path, weight_name="style.safetensors")
    styled = generate(other)
    plain = generate(whole)
    whole.enable_character_offload("stream")
    whole.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert torch.equal(generate(whole), styled)
    assert not torch.equal(styled, plain)
    whole.unload_lora_weights()
    assert torch.equal(generate(whole), plain)


def save_lora(pipeline: InstantCharacterPipeline, folder) -> None:
    torch.manual_seed(5)
    weights = {}
    for name, layer in pipeline.transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v", "proj_mlp")):
            weights[f"{name}.lora_A.weight"] = torch.randn(4, layer.in_features)
            weights[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 4)
    InstantCharacterPipeline.save_lora_weights(folder, transformer_lora_layers=weights, weight_name="style.safetensors")


def test_moving_the_pipeline_ends_the_offloading(whole):
    whole.enable_character_offload("stream")
    whole.to("cpu")
    assert whole.offloader is None
    for modules in components(whole).values():
        assert not any(is_offloaded(module) or "forward" in vars(module) for module in modules)


def test_weights_are_freed_with_the_pipeline_without_a_garbage_collection():
    gc.disable()
    try:
        pipeline = complete_pipeline()
        pipeline.enable_character_offload("stream")
        generate(pipeline)
        gone = [weakref.ref(module) for modules in components(pipeline).values() for module in modules]
        del pipeline
        assert [module() for module in gone] == [None] * len(gone)
    finally:
        gc.enable()


# Cached results


def test_ten_seeds_of_a_prompt_run_the_encoders_once(whole, count_calls):
    whole.enable_character_offload("stream")
    calls = count_calls(whole)
    for seed in range(10):
        generate(whole, seed=seed)
    assert calls == {"text_encoder": 1, "text_encoder_2": 1, "siglip": 2, "dinov2": 2, "resampler": 1, "fuse": 1}


@pytest.fixture
def count_calls(monkeypatch):
    """Counts the calls of modules that run once for many seeds."""

    def watch(pipeline) -> dict[str, int]:
        calls: dict[str, int] = {}

        def count(name: str):
            return lambda *_: calls.update({name: calls.get(name, 0) + 1})

        encoder, projector = pipeline.character_encoder, pipeline.character_adapter.projector
        for name, module in (
            ("text_encoder", pipeline.text_encoder),
            ("text_encoder_2", pipeline.text_encoder_2),
            ("siglip", encoder.siglip),
            ("dinov2", encoder.dinov2),
            ("resampler", projector.resampler),
            ("fuse", projector.proj),
        ):
            module.register_forward_pre_hook(count(name))
        return calls

    return watch


def test_another_prompt_is_encoded(whole):
    assert not torch.equal(generate(whole, prompt="a red kite"), generate(whole))


def test_cached_prompts_depend_on_the_text_encoders_loras(whole):
    seen = []
    whole.text_encoder.register_forward_pre_hook(lambda *_: seen.append(1))
    generate(whole)
    generate(whole)
    assert len(seen) == 1
    from peft import LoraConfig

    whole.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "words")
    generate(whole)
    assert len(seen) == 2


# Changes of the models


def test_textual_inversion_suspends_the_offloading_and_drops_cached_prompts(whole):
    """It replaces the text encoder's embeddings, which the offloader had in host memory."""
    generate(whole, num_inference_steps=1)
    whole.enable_character_offload("stream")
    placed, runs = whole.offloader, []
    whole.text_encoder.register_forward_pre_hook(lambda *_: runs.append(1))
    whole.load_textual_inversion({"<style>": torch.ones(1, 32)}, token="<style>")
    assert whole.offloader is not placed
    generate(whole, num_inference_steps=1)
    assert runs == [1]


def test_a_refused_change_raises_its_own_error_where_offloading_fails_too(whole, monkeypatch, caplog):
    """Planning again in ``finally`` hid the first error."""
    whole.enable_character_offload("stream")

    def fail(*_: object) -> None:
        raise ValueError("too little memory for any plan")

    monkeypatch.setattr("instantcharacter.flux.offloading.plan_request", fail)
    monkeypatch.setattr("instantcharacter.flux.pipeline.attach", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole.set_character_adapter(tiny.tiny_adapter())
    assert "no longer offloaded" in caplog.text
    assert whole.offloader is None


def test_two_pipelines_of_the_same_models_do_not_offload_them_twice(whole, expected):
    whole.enable_character_offload("stream")
    other = InstantCharacterPipeline(**whole.components)
    with pytest.raises(RuntimeError, match="share_character_adapter, or call disable_character_offload"):
        other.enable_character_offload("stream")
    assert other.offloader is None
    assert torch.equal(generate(whole), expected)
    whole.disable_character_offload()
    other.enable_character_offload("stream")
    assert other.offloader.manages(whole.transformer)


def test_it_takes_the_place_of_diffusers_offloading(whole, expected):
    whole.enable_sequential_cpu_offload(device="cpu")
    whole.enable_character_offload("stream")
    assert not any(has_accelerate_hook(module) for module in whole.transformer.modules())
    assert torch.equal(generate(whole), expected)


def test_an_emptied_cache_computes_again(whole):
    runs = []
    for module in (whole.text_encoder, whole.character_encoder.dinov2):
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    generate(whole, num_inference_steps=1)
    first = len(runs)
    generate(whole, num_inference_steps=1)
    assert len(runs) == first
    whole.clear_cache()
    generate(whole, num_inference_steps=1)
    assert len(runs) == 2 * first


# Out of memory in spite of the plan


def fails_once(module: nn.Module, when: int = 1) -> None:
    """Have a module's call number ``when`` find the GPU full."""
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    module.register_forward_pre_hook(fail)


def test_out_of_memory_takes_the_next_smaller_plan_and_keeps_the_steps(whole, expected, caplog):
    whole.enable_character_offload("none")
    steps, plans = [], [whole.offloader.plan.for_pictures((64, 48), 1)]
    fails_once(whole.transformer.single_transformer_blocks[1], when=2)

    def watch(pipe, step, *_):
        steps.append(step)
        plans.append(pipe.offloader.plan)
        return {}

    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(whole, callback_on_step_end=watch), expected)
    assert steps == [0, 1, 2]
    before, first, after, _ = plans
    assert first == before
    assert after.predicted_peak < before.predicted_peak
    assert f"the plan {before.name}: going on with {after.name}" in caplog.text
    assert torch.equal(generate(whole), expected)


@pytest.mark.parametrize(
    "part", ["text_encoder_2.encoder.block", "vae.decoder.conv_in", "character_encoder.dinov2.encoder"]
)
def test_out_of_memory_in_other_phases(whole, expected, part):
    whole.enable_character_offload("none")
    module = whole
    for name in part.split("."):
        module = getattr(module, name)
    inner = next(child for child in module.modules() if not any(child.children()))
    fails_once(inner)
    assert torch.equal(generate(whole), expected)
    assert whole.offloader.plan.strategy == "stream"


@pytest.mark.parametrize("strategy", ["model"])
def test_out_of_memory_in_diffusers_offloading_repeats_the_run(whole, expected, strategy, caplog):
    whole.enable_character_offload(strategy)
    fails_once(whole.transformer.single_transformer_blocks[1].attn, when=2)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(whole), expected)
    assert "going on with" in caplog.text


def test_out_of_memory_twice_says_what_to_do(whole):
    whole.enable_character_offload("none")
    block = whole.transformer.single_transformer_blocks[0]

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = block.attn.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"Draw smaller or fewer.*Tried to allocate 2\.00 GiB"):
        generate(whole)
    handle.remove()


@pytest.mark.parametrize("strategy", ["auto", "stream", "none"])
def test_on_a_mac_all_weights_are_resident(whole, monkeypatch, strategy):
    """Its GPU computes in host memory, and torch has no ``torch.mps.mem_get_info``. No test runs on a Mac."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    requests = []
    monkeypatch.setattr(PipelineOffload, "enable", lambda self, pipeline, modules, request: requests.append(request))
    whole.enable_character_offload(strategy)
    assert requests == [OffloadRequest(strategy, None, torch.device("mps"))]
    assert plan_request(components(whole), requests[0]).strategy == "none"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ((1024, 1024), 1)),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3, "width": 64}, ((64, 1024), 6)),
        ({"prompt": "a fox", "height": 48}, ((1024, 48), 1)),
        ({"prompt": None, "prompt_embeds": torch.zeros(4, 1), "num_images_per_prompt": None}, ((1024, 1024), 4)),
    ],
)
def test_plans_are_for_the_pictures_of_a_call(arguments, expected):
    assert picture_sizes(arguments, default_side=1024) == expected


@pytest.mark.parametrize("setting", ["prompt_embeds", "num_images_per_prompt", "width", "generator"])
def test_settings_may_be_none_while_offloaded(whole, setting):
    """Programs pass on None for arguments that they did not get."""
    whole.enable_character_offload("auto")
    whole.default_sample_size = 8
    settings = {"num_inference_steps": 1, "width": 64, "height": 64, "output_type": "latent", "return_dict": False}
    (latents,) = whole("a fox", subject_image=recorded.PICTURE, **settings | {setting: None})
    assert latents.shape == (1, 16, 64)
