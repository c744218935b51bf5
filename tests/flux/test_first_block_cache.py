"""Steps of which the pipeline computes only FLUX's first block, at the recorded size."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from support import pipelines, recorded
from support.pipelines import complete_pipeline
from support.recorded import error

from instantcharacter import (
    Character,
    InstantCharacterImg2ImgPipeline,
    InstantCharacterInpaintPipeline,
)
from instantcharacter.flux.first_block_cache import MAX_LEFT_OUT, THRESHOLD
from instantcharacter.offload.host_weights import HostWeights

STEPS = 12
EVERY = math.inf
"""The threshold that leaves out every step that may be left out."""


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), "num_inference_steps": STEPS, **changes})[0]


def picture_settings(**more: object) -> dict[str, object]:
    """The settings of image-to-image: 11 of 12 steps run."""
    image = torch.linspace(-1, 1, 3 * 64 * 96).view(1, 3, 64, 96)
    return {"image": image, "strength": 0.9, "latents": None, "generator": torch.Generator().manual_seed(3), **more}


def blocks_of(pipeline) -> list[torch.nn.Module]:
    return [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]


@pytest.fixture
def other_character(adapter) -> Character:
    return Character(adapter.projector.fuse(*recorded.features(seed=99)), adapter.fingerprint())


class Calls:
    """Counts the calls of each of FLUX's blocks."""

    def __init__(self, pipeline) -> None:
        self.counts = [0] * len(blocks_of(pipeline))
        for i, block in enumerate(blocks_of(pipeline)):
            block.register_forward_hook(partial(self._count, i))

    def _count(self, i: int, *_: object) -> None:
        self.counts[i] += 1

    def take(self) -> list[int]:
        """The counts since they were taken before."""
        counts, self.counts = self.counts, [0] * len(self.counts)
        return counts


def leaving_out(first: int) -> list[int]:
    """Counts of calls in a run from a first step to the 12th that leaves out all it may: 1 1 0 0 0 1 0 0 0 1 0 0."""
    computed = [1, 1, *([0] * MAX_LEFT_OUT + [1]) * 3][: STEPS - first]
    return [STEPS - first, *[sum(computed)] * 3]


def test_a_cache_that_leaves_out_no_step_is_bit_equal(pipeline, character):
    expected, calls = generate(pipeline, subject_image=character), Calls(pipeline)
    assert torch.equal(generate(pipeline, subject_image=character, cache_threshold=1e-9), expected)
    assert calls.take() == [STEPS] * 4
    assert torch.equal(generate(pipeline, subject_image=character, cache_threshold=0), expected)


def test_an_endless_threshold_leaves_out_three_of_four_steps_after_the_first_two(pipeline, character):
    calls = Calls(pipeline)
    expected = generate(pipeline, subject_image=character)
    assert calls.take() == [STEPS] * 4
    assert 1e-3 < error(generate(pipeline, subject_image=character, cache_threshold=EVERY), expected) < 1
    assert calls.take() == leaving_out(0) == [12, 4, 4, 4]


def test_more_is_left_out_with_a_higher_threshold(pipeline, character):
    calls, counts = Calls(pipeline), []
    for threshold in (1e-9, 0.85, 1.1, EVERY):
        generate(pipeline, subject_image=character, cache_threshold=threshold)
        counts.append(calls.take()[1])
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) >= 3


def test_what_is_linear_in_the_steps_is_predicted_exactly(pipeline):
    """With blocks whose additions grow by the same amount at each step, nothing is off."""

    def linear(i, block, inputs, outputs):
        text, _ = outputs
        before = inputs["hidden_states"]
        return text, before + (i + 1) * 1e-3 * (2 + (pipeline.scheduler.step_index or 0))

    for i, block in enumerate(blocks_of(pipeline)):
        block.register_forward_hook(lambda b, _, kwargs, out, i=i: linear(i, b, kwargs, out), with_kwargs=True)
    expected, calls = generate(pipeline), Calls(pipeline)
    assert error(generate(pipeline, cache_threshold=1e-3), expected) < 1e-5
    assert calls.take() == leaving_out(0)


def test_a_step_is_left_out_if_every_picture_of_a_batch_is_predicted(pipeline):
    """The first picture is, and its changes are a thousand times those of the second."""
    noise = torch.Generator().manual_seed(0)

    def change(block, _, inputs, outputs):
        changes = torch.cat([torch.ones(1, 24, 1), 1e-3 * torch.rand(1, 24, 1, generator=noise)])
        return outputs[0], inputs["hidden_states"] + changes[: len(outputs[1])]

    blocks_of(pipeline)[0].register_forward_hook(change, with_kwargs=True)
    batch = recorded.prompt(batch=2) | {"latents": torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))}
    calls = Calls(pipeline)
    generate(pipeline, cache_threshold=0.1)
    assert calls.take() == leaving_out(0)
    generate(pipeline, **batch, cache_threshold=0.1)
    assert calls.take() == [STEPS] * 4


def test_each_picture_starts_anew(pipeline, character, other_character):
    settings = {"cache_threshold": EVERY, "subject_image": character}
    first = generate(pipeline, **settings)
    generate(pipeline, **settings | {"subject_image": other_character})
    assert torch.equal(generate(pipeline, **settings), first)


def test_a_cancelled_picture_leaves_nothing_behind(pipeline, character):
    def cancel(pipe, step, timestep, tensors):
        if step == 3:
            raise KeyboardInterrupt
        return {}

    plain = generate(pipeline, subject_image=character)
    cached = generate(pipeline, subject_image=character, cache_threshold=EVERY)
    blocks = blocks_of(pipeline)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, subject_image=character, cache_threshold=EVERY, callback_on_step_end=cancel)
    assert blocks_of(pipeline) == blocks
    assert not pipeline.transformer._forward_pre_hooks
    assert not pipeline.transformer._forward_hooks
    assert torch.equal(generate(pipeline, subject_image=character), plain)
    assert torch.equal(generate(pipeline, subject_image=character, cache_threshold=EVERY), cached)


def test_prompt_and_negative_prompt_are_predicted_each_by_itself(pipeline, character):
    calls = Calls(pipeline)
    alone = generate(pipeline, subject_image=character, cache_threshold=EVERY)
    calls.take()
    cfg = {**recorded.negative_prompt(), "subject_image": character, "cache_threshold": EVERY}
    generate(pipeline, **cfg, true_cfg_scale=2.0)
    assert calls.take() == [2 * count for count in leaving_out(0)]
    # With almost all of the weight on the prompt's branch, the negative one's state has no part in the picture.
    assert error(generate(pipeline, **cfg, true_cfg_scale=1.0 + 1e-6), alone) < 1e-4


@pytest.mark.parametrize("ours", [InstantCharacterImg2ImgPipeline, InstantCharacterInpaintPipeline])
def test_image_to_image_and_inpainting_leave_out_steps_too(ours, adapter, character):
    pipeline = ours(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    masked = {"mask_image": torch.ones(1, 1, 64, 96)} if ours is InstantCharacterInpaintPipeline else {}
    calls = Calls(pipeline)
    generate(pipeline, **picture_settings(**masked), subject_image=character, cache_threshold=EVERY)
    assert calls.take() == leaving_out(1)


def test_two_characters_and_a_batch_leave_out_steps_too(pipeline, character, other_character):
    settings = {"subject_image": [character, other_character], "subject_scale": [0.9, 0.5]}
    calls = Calls(pipeline)
    generate(pipeline, **settings, cache_threshold=EVERY)
    assert calls.take() == leaving_out(0)
    batch = recorded.prompt(batch=2) | {"latents": torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))}
    exact, expected = (generate(pipeline, **settings, **batch, cache_threshold=t) for t in (1e-9, 0))
    assert torch.equal(exact, expected)


def test_where_a_character_comes_or_goes_two_steps_are_computed(pipeline, character):
    calls, computed = Calls(pipeline), []

    def watch(*_: object) -> dict:
        computed.append(calls.take()[1])
        return {}

    window = {"subject_start": 0.25, "subject_end": 0.75}
    generate(pipeline, subject_image=character, **window, cache_threshold=EVERY, callback_on_step_end=watch)
    assert computed == [1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]


def test_loras_and_fused_projections_do_not_matter(pipeline, character):
    pipeline.load_lora_weights(str(recorded.LORA.parent), weight_name=recorded.LORA.name)
    expected = generate(pipeline, subject_image=character)
    assert torch.equal(generate(pipeline, subject_image=character, cache_threshold=1e-9), expected)


# With offloading


@pytest.mark.parametrize("strategy", ["none", "model", "stream", "sequential"])
def test_offloaded_blocks_generate_the_same(pipeline, character, strategy):
    settings = {"subject_image": character, "cache_threshold": EVERY}
    expected = generate(pipeline, **settings)
    pipeline.enable_character_offload(strategy)
    assert torch.equal(generate(pipeline, **settings), expected)
    assert torch.equal(generate(pipeline, **settings), expected)


def test_weights_of_blocks_that_are_left_out_do_not_stream(pipeline, character, monkeypatch):
    copied: list[int] = []
    copy_to = HostWeights.copy_to
    monkeypatch.setattr(HostWeights, "copy_to", lambda self, slot: copied.append(1) or copy_to(self, slot))
    pipeline.enable_character_offload("stream")
    settings = {"subject_image": character}

    def copies(threshold: float) -> int:
        copied.clear()
        generate(pipeline, **settings, cache_threshold=threshold)
        return len(copied)

    generate(pipeline, **settings)  # the character is resampled
    every_step, cached = copies(0), copies(EVERY)
    left_out = STEPS - leaving_out(0)[1]
    assert every_step - cached == left_out  # two blocks are copied before a step, the third after the first block


def fails_once(block: torch.nn.Module, when: int) -> None:
    """Have a block's call number ``when`` find the GPU full."""
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    block.register_forward_pre_hook(fail)


@pytest.mark.parametrize(("block", "when"), [(0, 1), (0, 4), (1, 1), (1, 2), (1, 3), (3, 3)])
def test_a_step_that_is_computed_again_after_it_ran_out_of_memory_is_the_same(pipeline, character, block, when):
    settings = {"subject_image": character, "cache_threshold": EVERY}
    expected = generate(pipeline, **settings)
    pipeline.enable_character_offload("none")
    fails_once(blocks_of(pipeline)[block], when)
    assert torch.equal(generate(pipeline, **settings), expected)
    assert pipeline.offloader.plan.strategy == "stream"
    assert torch.equal(generate(pipeline, **settings), expected)


def test_out_of_memory_after_the_last_block_is_the_same(pipeline, character):
    settings = {"subject_image": character, "cache_threshold": EVERY}
    expected = generate(pipeline, **settings)
    pipeline.enable_character_offload("none")
    fails_once(pipeline.transformer.norm_out, 2)
    assert torch.equal(generate(pipeline, **settings), expected)


@pytest.mark.parametrize("true_cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("when", [1, 3, 4])
def test_a_picture_that_is_repeated_after_it_ran_out_of_memory_is_the_same(true_cfg_scale, when):
    settings = {
        "negative_prompt": "rain",
        "true_cfg_scale": true_cfg_scale,
        "num_inference_steps": 8,
        "output_type": "latent",
        "cache_threshold": EVERY,
    }
    expected, failing = pipelines.generate(complete_pipeline(), **settings), complete_pipeline()
    failing.enable_character_offload("model")
    fails_once(blocks_of(failing)[1], when)
    assert torch.equal(pipelines.generate(failing, **settings), expected)


# With what else changes FLUX


def test_compiled_blocks_generate_the_same(pipeline, character, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = {"subject_image": character, "cache_threshold": EVERY}
    expected = generate(pipeline, **settings)
    assert pipeline.enable_character_compile()
    calls = Calls(pipeline)
    assert error(generate(pipeline, **settings), expected) < 1e-5
    assert calls.take() == leaving_out(0)


def test_a_negative_threshold_and_a_second_cache_are_refused(pipeline, character):
    for threshold in (-0.1, math.nan):
        with pytest.raises(ValueError, match="cache_threshold is"):
            generate(pipeline, cache_threshold=threshold)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        generate(pipeline, cache_threshold=THRESHOLD)
    pipeline.transformer.disable_cache()
    generate(pipeline, cache_threshold=THRESHOLD)


def test_a_transformer_compiled_as_a_whole_is_refused(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    with pytest.raises(ValueError, match="call enable_character_compile"):
        generate(pipeline, cache_threshold=THRESHOLD)
