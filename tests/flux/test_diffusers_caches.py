"""The caches of diffusers' ``transformer.enable_cache`` in the pack's pipelines, with a character."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from support import recorded
from support.recorded import error

from instantcharacter import (
    InstantCharacterImg2ImgPipeline,
    InstantCharacterInpaintPipeline,
    InstantCharacterPipeline,
)
from instantcharacter.flux.compile import CompiledForward

STEPS = 12
CONFIGS: dict[str, Any] = {
    "first block": lambda: FirstBlockCacheConfig(1.5),
    "TaylorSeer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2),
    "TaylorSeer, lite": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, use_lite_mode=True
    ),
    "magnitudes": lambda: MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=STEPS),
}
"""Those that work by blocks or layers alone."""
WHOLE_BLOCKS = ["first block", "TaylorSeer, lite", "magnitudes"]


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), "num_inference_steps": STEPS, **changes})[0]


def picture_settings() -> dict[str, object]:
    image = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
    return {"image": image, "strength": 0.9, "latents": None, "generator": torch.Generator().manual_seed(3)}


def cached(pipeline, name: str) -> None:
    pipeline.transformer.enable_cache(CONFIGS[name]())


def count_attention(pipeline) -> list[int]:
    """Grows with each computation of the last block's attention."""
    processor = pipeline.transformer.single_transformer_blocks[-1].attn.processor
    calls: list[int] = []
    inner = processor.inner

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    processor.inner = counting
    return calls


@pytest.mark.parametrize("name", CONFIGS)
def test_caches_leave_out_computation_and_each_picture_starts_anew(pipeline, character, name):
    expected = generate(pipeline, subject_image=character)
    calls = count_attention(pipeline)
    cached(pipeline, name)
    first = generate(pipeline, subject_image=character)
    assert 0 < len(calls) < STEPS
    assert 1e-4 < error(first, expected) < 1
    assert torch.equal(generate(pipeline, subject_image=character), first)
    pipeline.transformer.disable_cache()
    assert torch.equal(generate(pipeline, subject_image=character), expected)


def test_pyramid_attention_broadcast_works_too(pipeline, character):
    expected = generate(pipeline, subject_image=character)
    calls = count_attention(pipeline)
    pipeline.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipeline._current_timestep
        )
    )
    first = generate(pipeline, subject_image=character)
    assert 0 < len(calls) < STEPS
    assert 1e-4 < error(first, expected) < 1
    assert torch.equal(generate(pipeline, subject_image=character), first)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cancelled_picture_leaves_no_state(pipeline, character, name):
    def cancel(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return {}

    cached(pipeline, name)
    expected = generate(pipeline, subject_image=character)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, subject_image=character, callback_on_step_end=cancel)
    assert torch.equal(generate(pipeline, subject_image=character), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ours", [InstantCharacterImg2ImgPipeline, InstantCharacterInpaintPipeline])
def test_image_to_image_and_inpainting_have_a_context(ours, adapter, character, name):
    pipeline = ours(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    masked = {"mask_image": torch.ones(1, 1, 64, 96)} if ours is InstantCharacterInpaintPipeline else {}
    calls = count_attention(pipeline)
    cached(pipeline, name)
    first = generate(pipeline, **picture_settings(), **masked, subject_image=character)
    assert 0 < len(calls) < STEPS - 1
    assert torch.equal(generate(pipeline, **picture_settings(), **masked, subject_image=character), first)


@pytest.mark.parametrize("name", WHOLE_BLOCKS[:2])
def test_prompt_and_negative_prompt_have_a_state_each_in_image_to_image(adapter, character, name):
    """At a weight of almost 1 for the prompt, the negative prompt's state would show if it were the prompt's."""
    pipeline = InstantCharacterImg2ImgPipeline(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    cached(pipeline, name)
    alone = generate(pipeline, **picture_settings(), subject_image=character)
    guided = {**recorded.negative_prompt(), "true_cfg_scale": 1 + 1e-6}
    assert error(generate(pipeline, **picture_settings(), **guided, subject_image=character), alone) < 1e-3


# With offloading and compiling


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("order", ["offload first", "cache first"])
def test_streamed_blocks_generate_the_same(pipeline, character, name, order):
    cached(pipeline, name)
    expected = generate(pipeline, subject_image=character)
    if order == "offload first":
        pipeline.transformer.disable_cache()
    pipeline.enable_character_offload("stream")
    if order == "offload first":
        cached(pipeline, name)
    assert torch.equal(generate(pipeline, subject_image=character), expected)
    assert torch.equal(generate(pipeline, subject_image=character), expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part", ["single_transformer_blocks.1.norm", "norm_out"])
def test_a_step_that_is_computed_again_after_it_ran_out_of_memory_starts_the_cache_anew(
    pipeline, character, name, part
):
    """In the first step there is nothing to forget, and the picture is the one of a run without the error."""
    cached(pipeline, name)
    expected = generate(pipeline, subject_image=character)
    pipeline.enable_character_offload("none")
    calls: list[int] = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = pipeline.transformer.get_submodule(part).register_forward_pre_hook(fail)
    assert torch.equal(generate(pipeline, subject_image=character), expected)
    handle.remove()
    assert torch.equal(generate(pipeline, subject_image=character), expected)


@pytest.fixture
def no_code_generated(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.mark.parametrize("name", WHOLE_BLOCKS)
@pytest.mark.parametrize("order", ["compile first", "cache first"])
def test_caches_of_whole_blocks_stay_outside_of_what_is_compiled(
    pipeline, character, name, order, no_code_generated, caplog
):
    cached(pipeline, name)
    expected = generate(pipeline, subject_image=character)
    if order == "compile first":
        pipeline.transformer.disable_cache()
    assert pipeline.enable_character_compile()
    if order == "compile first":
        cached(pipeline, name)
    assert error(generate(pipeline, subject_image=character), expected) < 1e-5
    assert "without being compiled" not in caplog.text
    pipeline.transformer.disable_cache()
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    assert all(isinstance(block.forward, CompiledForward) for block in blocks)


def test_with_a_cache_of_attention_flux_runs_without_being_compiled(pipeline, character, no_code_generated, caplog):
    cached(pipeline, "TaylorSeer")
    expected = generate(pipeline, subject_image=character)
    assert pipeline.enable_character_compile()
    assert torch.equal(generate(pipeline, subject_image=character), expected)
    assert caplog.text.count("FLUX runs without being compiled") == 1


def test_a_cache_that_was_disabled_is_not_in_the_way_of_compiling(pipeline, no_code_generated):
    cached(pipeline, "first block")
    pipeline.transformer.disable_cache()
    assert pipeline.enable_character_compile()


def test_it_is_compiled_with_the_cache_that_was_enabled(pipeline, no_code_generated):
    config = CONFIGS["first block"]()
    pipeline.transformer.enable_cache(config)
    pipeline.enable_character_compile()
    assert pipeline.transformer.is_cache_enabled
    assert isinstance(pipeline, InstantCharacterPipeline)
    with pytest.raises(ValueError, match="already been enabled"):
        pipeline.transformer.enable_cache(config)
