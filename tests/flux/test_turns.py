from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import recorded
from torch import nn

from instantcharacter import InstantCharacterImg2ImgPipeline, InstantCharacterPipeline
from instantcharacter.flux.turns import turns_at

LIMIT = 60
"""Seconds after which a thread hangs."""


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), "num_inference_steps": 2, **changes})[0]


def in_threads(*calls):
    """The results of calls that begin at once, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def begin(call):
        barrier.wait(LIMIT)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(begin, call) for call in calls]
        return [future.result(LIMIT) for future in futures]


def test_a_transformer_has_the_same_turns_for_as_long_as_it_lives():
    model = nn.Linear(1, 1)
    assert turns_at(model) is turns_at(model)
    assert turns_at(nn.Linear(1, 1)) is not turns_at(model)
    turns = weakref.ref(turns_at(model))
    del model
    gc.collect()
    assert turns() is None


def test_turns_of_threads_do_not_overlap():
    turns, inside, overlaps = turns_at(nn.Linear(1, 1)), [], []

    def enter():
        with turns.one():
            inside.append(1)
            overlaps.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    in_threads(*[enter] * 4)
    assert overlaps == [1] * 4


def test_a_run_refuses_changes_of_its_own_thread_alone_and_until_it_ends():
    turns = turns_at(nn.Linear(1, 1))
    with turns.generating():
        with turns.one():
            pass
        for context in (turns.generating, lambda: turns.one(changes=True)):
            with pytest.raises(RuntimeError, match="is generating a picture, and its callback cannot"), context():
                pass
        with pytest.raises(RuntimeError, match="is generating"), turns.generating():
            pass
    with pytest.raises(KeyboardInterrupt), turns.generating():
        raise KeyboardInterrupt
    in_threads(lambda: turns.one(changes=True).__enter__())


# Pipelines


def test_two_threads_on_one_pipeline_generate_their_own_pictures(pipeline, character):
    settings = [
        {},
        {"subject_image": character},
        {"subject_image": character, "subject_scale": 0.5, "num_inference_steps": 3},
        {"latents": torch.ones(1, 6, 64), "width": 48, "height": 32},
    ]
    apart = [generate(pipeline, **each) for each in settings]
    together = in_threads(*[lambda each=each: generate(pipeline, **each) for each in settings * 2])
    for one, expected in zip(together, apart * 2, strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("shared", [False, True])
def test_pipelines_of_one_transformer_take_turns(pipeline, character, shared):
    other = InstantCharacterPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    other.share_character_adapter(pipeline) if shared else other.set_character_adapter(pipeline.character_adapter)
    calls = [lambda each=each: generate(each, subject_image=character) for each in (pipeline, other) * 3]
    first, *others = in_threads(*calls)
    assert all(torch.equal(one, first) for one in others)
    assert torch.equal(first, generate(pipeline, subject_image=character))


def test_the_adapter_changes_between_pictures(pipeline, adapter, character):
    expected = generate(pipeline, subject_image=character)

    def change():
        pipeline.set_character_adapter(adapter)
        pipeline.enable_character_offload("none", device="cpu")
        pipeline.disable_character_offload()

    pictures = in_threads(*[lambda: generate(pipeline, subject_image=character), change] * 3)
    assert all(torch.equal(one, expected) for one in pictures[::2])


def test_an_error_or_interrupt_ends_a_turn(pipeline, character):
    expected = generate(pipeline, subject_image=character)

    def cancel(*_):
        raise KeyboardInterrupt

    for error, settings in (
        (KeyboardInterrupt, {"callback_on_step_end": cancel}),
        (ValueError, {"guidance_scale": None}),
    ):
        with pytest.raises(error):
            generate(pipeline, **settings)
        (after,) = in_threads(lambda: generate(pipeline, subject_image=character))
        assert torch.equal(after, expected)


def test_a_callback_changes_nothing_that_the_run_relies_on(pipeline, adapter, character):
    other = InstantCharacterImg2ImgPipeline(**pipeline.components)
    expected, refused = generate(pipeline, subject_image=character), []
    attempts = [
        lambda: generate(pipeline),
        lambda: pipeline.set_character_adapter(adapter),
        lambda: pipeline.enable_character_offload("none", device="cpu"),
        pipeline.disable_character_offload,
        pipeline.remove_character_adapter,
        lambda: pipeline.set_character_encoder(None),
        lambda: other.set_character_adapter(adapter),
    ]

    def interfere(pipe, step, timestep, tensors):
        for attempt in attempts:
            with pytest.raises(RuntimeError, match="is generating a picture"):
                attempt()
            refused.append(step)
        pipe.clear_cache()
        return tensors

    assert torch.equal(generate(pipeline, subject_image=character, callback_on_step_end=interfere), expected)
    assert len(refused) == 2 * len(attempts)
    assert torch.equal(generate(pipeline, subject_image=character), expected)
