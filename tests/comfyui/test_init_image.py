"""The Sampler's inputs as plain data; no ComfyUI is needed."""

from __future__ import annotations

import pytest
import torch

from instantcharacter.comfyui.init_image import InitImage, init_from_inputs

IMAGE = torch.rand(2, 70, 50, 4)
LATENT = {"samples": torch.rand(3, 16, 7, 11)}


def test_nothing_connected_is_no_init_image():
    assert init_from_inputs(None, None, 0.5) is None


def test_image_and_latent_become_an_init_image():
    image = init_from_inputs(IMAGE, None, 0.5)
    assert torch.equal(image.image, IMAGE)
    assert (image.denoise, image.size, image.batch_size) == (0.5, (48, 64), 2)
    latent = init_from_inputs(None, LATENT, 1.0)
    assert latent.samples is LATENT["samples"]
    assert (latent.size, latent.batch_size) == ((80, 48), 3)


def test_the_smallest_size_is_one_step():
    assert InitImage(1.0, image=torch.rand(1, 3, 5, 3)).size == (16, 16)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((IMAGE, LATENT), "disconnect one"),
        ((None, {**LATENT, "noise_mask": torch.ones(1)}), "does not inpaint"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        init_from_inputs(*inputs, 0.5)


@pytest.mark.parametrize("denoise", [0.0, -1.0, 1.1, float("nan")])
def test_denoise_out_of_range_is_refused(denoise):
    with pytest.raises(ValueError, match="expected above 0 to 1"):
        init_from_inputs(IMAGE, None, denoise)
