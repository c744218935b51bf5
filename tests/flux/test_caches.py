from __future__ import annotations

import inspect

import pytest
import torch
from PIL import Image
from support import tiny

from instantcharacter.flux.caches import CharacterCache, PromptCache, RecentCache, encoder_state


def test_the_least_recently_used_value_leaves_first():
    cache: RecentCache[int] = RecentCache(size=2)
    assert [cache.get(key, lambda key=key: key) for key in (1, 2)] == [1, 2]
    assert cache.get(1, pytest.fail) == 1
    cache.get(3, lambda: 3)
    assert cache.get(1, pytest.fail) == 1
    assert cache.get(2, lambda: "again") == "again"


def test_a_cleared_cache_computes_again():
    cache: RecentCache[int] = RecentCache()
    cache.get(1, lambda: 1)
    cache.clear()
    assert cache.get(1, lambda: 2) == 2


def test_a_value_that_fails_is_computed_again():
    cache: RecentCache[int] = RecentCache()
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: 1 / 0)
    assert cache.get(1, lambda: 2) == 2


def test_characters_are_cached_by_pixels_size_and_fit():
    cache, picture = CharacterCache(), Image.new("RGB", (4, 2), (9, 9, 9))
    first = cache.get(picture, "pad", object)
    assert cache.get(picture.copy(), "pad", pytest.fail) is first
    assert cache.get(picture, "stretch", object) is not first
    assert cache.get(picture.resize((2, 4)), "pad", object) is not first
    cache.clear()
    assert cache.get(picture, "pad", object) is not first


def encode(prompt, embeds=None, length=512):
    return [prompt]


def call(*args, **kwargs) -> inspect.BoundArguments:
    bound = inspect.signature(encode).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def test_prompts_are_cached_by_arguments_encoders_and_device():
    cache, encoder = PromptCache(), tiny.tiny_components()["text_encoder"]
    first = cache.encode(encode, call("a fox"), [encoder], "cpu")
    assert cache.encode(encode, call("a fox", None, 512), [encoder], "cpu") is first
    for other in (
        (call("a hare"), [encoder], "cpu"),
        (call("a fox", length=8), [encoder], "cpu"),
        (call("a fox"), [None], "cpu"),
        (call("a fox"), [encoder], "cuda"),
    ):
        assert cache.encode(encode, *other) is not first


def test_calls_with_tensors_are_not_cached():
    cache, tensors = PromptCache(), call("a fox", torch.ones(1))
    assert cache.encode(encode, tensors, [], "cpu") is not cache.encode(encode, tensors, [], "cpu")


def test_a_text_encoders_state_is_its_dtype_and_its_loras():
    from peft import LoraConfig

    encoder = tiny.tiny_components()["text_encoder"]
    states = [encoder_state(encoder), encoder_state(None)]
    encoder.to(torch.bfloat16)
    states.append(encoder_state(encoder))
    encoder.add_adapter(LoraConfig(target_modules=["q_proj"]), "style")
    states.append(encoder_state(encoder))
    encoder.disable_adapters()
    states.append(encoder_state(encoder))
    assert len(set(states)) == 5
    assert encoder_state(encoder) == states[-1]
