from __future__ import annotations

import torch
from support.pretended_cuda import PretendedCuda
from torch import nn

from instantcharacter.offload.host_weights import ALIGNMENT, HostWeights, HostWeightsCache, pin


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_tensors_of_several_dtypes_lie_aligned_in_one_piece_with_their_values():
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5).to(torch.float64))
    before = [tensor.clone() for tensor in tensors(module)]
    weights = HostWeights(tensors(module), pinned=False)
    assert all(torch.equal(one, other) for one, other in zip(tensors(module), before))
    first = tensors(module)[0].data_ptr()
    assert all((tensor.data_ptr() - first) % ALIGNMENT == 0 for tensor in tensors(module))
    assert weights.size == ALIGNMENT * len(before)


def test_a_bound_module_computes_with_the_copy_and_then_with_the_original():
    module, x = nn.Linear(3, 5), torch.randn(2, 3)
    weights, expected = HostWeights(tensors(module), pinned=False), module(x)
    slot = torch.empty(weights.size + 100, dtype=torch.uint8)
    weights.copy_to(slot)
    weights.bind(slot)
    slot[: weights.size].view(torch.float32).mul_(2)
    assert torch.equal(module(x), 2 * expected)
    weights.unbind()
    assert torch.equal(module(x), expected)


def test_the_cache_gives_the_same_host_memory_until_tensors_or_pinning_change():
    module, cache = nn.Linear(3, 5), HostWeightsCache()
    weights = cache.get(module, tensors(module), pinned=False)
    assert cache.get(module, tensors(module), pinned=False) is weights
    moved = module.weight.data = module.weight.data.clone()
    again = cache.get(module, tensors(module), pinned=False)
    assert again is not weights
    assert torch.equal(module.weight, moved)
    assert cache.get(module, tensors(module), pinned=True) is not again
    cache.forget([module])
    assert cache.get(module, tensors(module), pinned=True) is not again


def test_pinned_memory_is_unlocked_when_it_is_freed():
    with PretendedCuda() as card:
        memory = torch.empty(1000, dtype=torch.uint8)
        pin(memory)
        assert card.registered
        del memory
        assert not card.registered
