from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pretended_cuda import CPU, CUDA, PretendedCuda
from torch import nn

from instantcharacter.offload.host_weights import ALIGNMENT, HostWeights, HostWeightsCache, allocate, pin

ROOT = Path(__file__).parents[2]


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_tensors_of_several_dtypes_lie_aligned_in_one_piece_with_their_values():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5).to(torch.float64))
    before = [tensor.clone() for tensor in tensors(module)]
    weights = HostWeights(tensors(module), pinned_for=None)
    assert all(torch.equal(one, other) for one, other in zip(tensors(module), before))
    first = tensors(module)[0].data_ptr()
    assert all((tensor.data_ptr() - first) % ALIGNMENT == 0 for tensor in tensors(module))
    assert weights.size == ALIGNMENT * len(before)


def test_a_bound_module_computes_with_the_copy_and_then_with_the_original():
    module, x = nn.Linear(3, 5), torch.randn(2, 3)
    weights, expected = HostWeights(tensors(module), pinned_for=None), module(x)
    slot = torch.empty(weights.size + 100, dtype=torch.uint8)
    weights.copy_to(slot)
    weights.bind(slot)
    slot[: weights.size].view(torch.float32).mul_(2)
    assert torch.equal(module(x), 2 * expected)
    weights.unbind()
    assert torch.equal(module(x), expected)


def test_the_cache_gives_the_same_host_memory_until_tensors_or_pinning_change():
    module, cache = nn.Linear(3, 5), HostWeightsCache()
    weights = cache.get(module, tensors(module), pinned_for=None)
    assert cache.get(module, tensors(module), pinned_for=None) is weights
    moved = module.weight.data = module.weight.data.clone()
    again = cache.get(module, tensors(module), pinned_for=None)
    assert again is not weights
    assert torch.equal(module.weight, moved)
    assert cache.get(module, tensors(module), pinned_for=CPU) is not again
    cache.forget([module])
    assert cache.get(module, tensors(module), pinned_for=CPU) is not again


def test_pinned_memory_is_unlocked_when_it_is_freed():
    with PretendedCuda() as card:
        memory = allocate(1000)
        pin(memory, CUDA)
        assert card.registered
        del memory
        assert not card.registered


@pytest.mark.parametrize("pins", [True, False])
def test_memory_is_pinned_and_unlocked_on_the_gpu_that_copies_it(pins):
    second = torch.device("cuda", 1)
    with PretendedCuda(devices=2) as card:
        card.pins = pins
        module = nn.Linear(3, 5)
        weights = HostWeights(tensors(module), pinned_for=second)
        slot = torch.empty(weights.size, dtype=torch.uint8, device=second)
        weights.copy_to(slot)
        del weights, module  # the copy may be under way
        assert not card.registered
        assert card.contexts == {1}
    assert not card.races


def test_memory_is_not_pinned_for_the_cpu():
    with PretendedCuda() as card:
        HostWeights(tensors(nn.Linear(3, 5)), pinned_for=CPU)
        assert not card.initialized


def test_freed_weights_are_the_systems_again():
    """In another process, whose C library has not yet freed anything of this size."""
    program = """
import psutil, torch
from instantcharacter.offload.host_weights import HostWeights

def own() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)

torch.ones(30 * 2**18), own()  # from now on, the C library keeps freed pieces of up to 30 MB
before, kept, weights = own(), [], []
for _ in range(100):
    weights.append(HostWeights([torch.ones(1).expand(2**18)], pinned_for=None))
    kept.append(bytes(50_000))  # what others allocate meanwhile
taken = own()
weights.clear()
print(taken - before, own() - before)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    taken, left = map(int, answer.stdout.split())
    assert taken > 95 * 2**20
    assert left < 0.4 * taken
