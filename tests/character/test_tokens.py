from __future__ import annotations

import gc
import weakref

import pytest
import torch
from support import recorded

from instantcharacter import Character
from instantcharacter.character.tokens import BATCH, TokenCache

CPU, FLOAT32 = torch.device("cpu"), torch.float32


@pytest.fixture
def cache(adapter) -> TokenCache:
    return TokenCache(adapter.projector)


def test_one_schedule_is_resampled_once(cache, character, resampled):
    first = cache.tokens(character, [900.0, 500.0], CPU, FLOAT32)
    second = cache.tokens(character, [900.0, 500.0], CPU, FLOAT32)
    assert resampled == [900.0, 500.0]
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_another_schedule_is_resampled_as_a_whole(cache, character, resampled):
    for schedule in ([900.0, 500.0], [500.0, 100.0], [500.0]):
        cache.tokens(character, schedule, CPU, FLOAT32)
    assert resampled == [900.0, 500.0, 500.0, 100.0, 500.0]


def test_tokens_do_not_depend_on_the_schedule_before(adapter, character):
    """Rounding differs with the batch, so that a picture would depend on the one before it."""
    schedule = [1000.0 - 40 * i for i in range(20)]
    before = [schedule[:1], schedule[::2], schedule[3:], [999.0, *schedule[5:9]]]
    alone = TokenCache(adapter.projector).tokens(character, schedule, CPU, FLOAT32)
    for other in before:
        cache = TokenCache(adapter.projector)
        cache.tokens(character, other, CPU, FLOAT32)
        for one, expected in zip(cache.tokens(character, schedule, CPU, FLOAT32), alone, strict=True):
            assert torch.equal(one, expected)


def test_no_timesteps_need_no_tokens(cache, character, resampled):
    cache.tokens(character, [900.0], CPU, FLOAT32)
    assert cache.has(character, [], CPU, FLOAT32)
    assert cache.tokens(character, [], CPU, FLOAT32) == []
    assert cache.has(character, [900.0], CPU, FLOAT32)
    assert resampled == [900.0]


def test_characters_keep_their_own_schedules(cache, character, resampled):
    other = Character(character.fused + 1, character.fingerprint)
    for _ in range(2):
        for who, schedule in ((character, [900.0]), (other, [500.0])):
            cache.tokens(who, schedule, CPU, FLOAT32)
    assert resampled == [900.0, 500.0]


def test_it_has_the_tokens_of_one_schedule_device_and_dtype(cache, character):
    assert not cache.has(character, [900.0, 500.0], CPU, FLOAT32)
    cache.tokens(character, [900.0, 500.0], CPU, FLOAT32)
    assert cache.has(character, [900.0, 500.0, 900.0], CPU, FLOAT32)
    assert not cache.has(character, [900.0], CPU, FLOAT32)
    assert not cache.has(character, [900.0, 500.0], CPU, torch.bfloat16)
    assert not cache.has(character, [900.0, 500.0], torch.device("meta"), FLOAT32)


def test_a_timestep_may_come_twice(cache, character, resampled):
    first, second = cache.tokens(character, [500.0, 500.0], CPU, FLOAT32)
    assert resampled == [500.0]
    assert first is second


def test_resample_keeps_no_tokens(cache, character, resampled):
    cache.tokens(character, [900.0], CPU, FLOAT32)
    cache.resample(character, [700.0], CPU, FLOAT32)
    assert cache.has(character, [900.0], CPU, FLOAT32)
    assert not cache.has(character, [700.0], CPU, FLOAT32)
    assert resampled == [900.0, 700.0]


def test_batches_of_timesteps_agree_with_single_ones(adapter, cache, character):
    schedule = [100.0 * i for i in range(1, BATCH + 3)]
    for timestep, tokens in zip(schedule, cache.tokens(character, schedule, CPU, FLOAT32), strict=True):
        alone = adapter.projector.resample(character.fused, torch.tensor([timestep]), folded=True)
        assert recorded.error(tokens, alone) < 1e-5


def test_cached_tokens_hold_no_other_memory(cache, character):
    schedule = [100.0 * i for i in range(1, 10)]
    for tokens in cache.tokens(character, schedule, CPU, FLOAT32):
        assert tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()


def test_tokens_have_the_requested_dtype(adapter, cache, character):
    for dtype in (torch.float32, torch.bfloat16):
        (tokens,) = cache.tokens(character, [500.0], CPU, dtype)
        assert tokens.dtype == dtype
        expected = adapter.projector.resample(character.fused, torch.tensor([500.0]), folded=True)
        assert torch.allclose(tokens.float(), expected, atol=0.05)


def test_tokens_are_freed_with_their_character(adapter, cache, fused):
    character = Character(fused, adapter.fingerprint())
    tokens = weakref.ref(cache.tokens(character, [500.0], CPU, FLOAT32)[0])
    assert tokens() is not None
    del character
    gc.collect()
    assert tokens() is None


def test_projector_is_freed_with_its_cache(character):
    adapter = recorded.adapter()
    cache, projector = TokenCache(adapter.projector), weakref.ref(adapter.projector)
    cache.tokens(character, [500.0], CPU, FLOAT32)
    del adapter, cache
    gc.collect()
    assert projector() is None
