from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from instantcharacter.flux.latents import img_ids, pack, unpack


@pytest.mark.parametrize("shape", [(1, 16, 8, 12), (3, 8, 2, 6), (2, 16, 10, 4)])
def test_packing_is_diffusers_own(shape):
    latents = torch.randn(shape)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, *shape))


@pytest.mark.parametrize("shape", [(1, 16, 8, 12), (3, 8, 2, 6), (2, 16, 10, 4)])
def test_unpacking_is_diffusers_own_and_the_inverse_of_packing(shape):
    latents = torch.randn(shape)
    tokens, (height, width) = pack(latents), shape[-2:]
    assert torch.equal(unpack(tokens, height // 2, width // 2), latents)
    assert torch.equal(
        unpack(tokens, height // 2, width // 2), FluxPipeline._unpack_latents(tokens, 8 * height, 8 * width, 8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (2, 6), (10, 4)])
def test_positions_are_diffusers_own(height, width, dtype):
    ids = img_ids(height // 2, width // 2, torch.device("cpu"), dtype)
    expected = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, torch.device("cpu"), dtype)
    assert ids.dtype == dtype
    assert torch.equal(ids, expected)


def test_latents_of_an_odd_size_are_refused():
    with pytest.raises(Exception, match="can.t divide axis of length 7"):
        pack(torch.randn(1, 16, 7, 8))
