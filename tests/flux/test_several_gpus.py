"""FLUX on the second of two GPUs: the same pictures, and nothing on the first. See :mod:`support.pretended_cuda`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from support.pipelines import complete_pipeline, generate
from support.pretended_cuda import CUDA, PretendedCuda

from instantcharacter.offload.planning import STRATEGIES

SECOND = torch.device("cuda", 1)


@pytest.fixture
def card() -> Iterator[PretendedCuda]:
    with PretendedCuda(devices=2) as card:
        yield card
        gc.collect()  # what unlocks host memory uses a GPU, too
    assert not card.races, card.races[:5]


@pytest.fixture
def on_second_alone(card) -> Iterator[None]:
    yield
    gc.collect()
    assert card.contexts == {1}
    assert card.gpus[0].peak == 0
    assert len(card.gpus[0].streams) == 1  # the default one, which is always there


@pytest.fixture
def whole():
    return complete_pipeline()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return generate(complete_pipeline())


# The pretended GPUs


def test_tensors_of_two_gpus_do_not_mix(card):
    first, second = torch.ones(3, device="cuda:0"), torch.ones((), device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        first + second
    assert (first + second.to("cuda:0")).device == CUDA
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.ones(3, device="cuda:2")


def test_what_names_no_gpu_is_on_the_current_one(card):
    with torch.cuda.device(1):
        stream = torch.cuda.Stream()
        assert {torch.ones(1, device="cuda").device, stream.device, torch.cuda.current_stream().device} == {SECOND}
    assert card.contexts == {1}
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
    assert torch.ones(1).cuda().device == CUDA
    assert card.contexts == {0, 1}


def test_one_gpus_streams_are_not_waited_for_by_waiting_for_another(card):
    host, slot = torch.ones(1000).pin_memory(), torch.empty(1000, device="cuda:1")
    slot.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host.fill_(2)
    assert len(card.races) == 1
    card.races.clear()
    torch.cuda.synchronize("cuda:1")
    host.fill_(3)
    assert not card.races


# FLUX


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_plan_generates_the_same_on_the_second_gpu(whole, expected, on_second_alone, strategy):
    whole.enable_character_offload(strategy, device="cuda:1")
    whole.set_character_adapter(whole.character_adapter)
    for _ in range(2):
        picture = generate(whole)
        assert picture.device == SECOND
        assert torch.equal(picture.cpu(), expected)


def test_a_full_second_gpu_has_a_smaller_plan(whole, expected, card, on_second_alone):
    everything = whole.enable_character_offload("none", device="cuda:1").resident
    whole.to("cpu")
    full, card.gpus[1].capacity = card.gpus[1].capacity, int(0.6 * everything)
    assert whole.enable_character_offload("none", device="cuda:1").strategy != "none"
    card.gpus[1].capacity = full
    assert torch.equal(generate(whole).cpu(), expected)


def test_host_memory_that_cannot_be_pinned_leaves_the_first_gpu_alone(whole, expected, card, on_second_alone):
    card.pins = False
    whole.enable_character_offload("stream", device="cuda:1")
    torch.ones(1, device="cuda:1").add_(1)
    assert torch.equal(generate(whole).cpu(), expected)


@pytest.mark.parametrize("strategy", ["stream", "model"])
def test_cuda_is_the_gpu_that_is_the_current_one_when_it_is_named(whole, expected, on_second_alone, strategy):
    """In another thread, or later, another may be: a pipeline stays where it is."""
    with torch.cuda.device(1):
        whole.enable_character_offload(strategy, device="cuda")
    assert torch.equal(generate(whole).cpu(), expected)


def test_a_pipeline_on_the_second_gpu_stays_there_whatever_is_enabled(whole, expected, on_second_alone):
    whole.to("cuda:1")
    whole.set_character_adapter(whole.character_adapter)
    assert torch.equal(generate(whole).cpu(), expected)
    for strategy in ("none", "stream"):
        whole.enable_character_offload(strategy)
        assert torch.equal(generate(whole).cpu(), expected)


@pytest.mark.parametrize("strategy", ["stream", "model", "sequential"])
def test_a_pipeline_moves_from_gpu_to_gpu(whole, expected, card, strategy):
    for device in (SECOND, CUDA, SECOND):
        whole.enable_character_offload(strategy, device=device)
        card.contexts.clear()
        picture = generate(whole)
        assert picture.device == device
        assert card.contexts == {device.index}
        assert torch.equal(picture.cpu(), expected)


@pytest.mark.parametrize("strategy", ["stream", "model"])
def test_a_pipeline_on_the_cpu_touches_no_gpu(whole, expected, card, strategy):
    whole.set_character_adapter(whole.character_adapter, "cpu")
    whole.enable_character_offload(strategy, device="cpu")
    assert torch.equal(generate(whole), expected)
    assert not card.initialized
