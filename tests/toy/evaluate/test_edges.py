from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from PIL import ImageFilter
from torch import Tensor

from toy.evaluate.edges import is_pixel_art, share_on_grid, sharpness
from toy.evaluate.measure import to_tensors
from toy.world import LORA_STYLE, STYLES, random_shot, random_traits

SHOTS = [random_shot(rng := random.Random(seed), random_traits(rng, False), style) for seed, style in enumerate(STYLES)]


def drawn_in(style: str | None = None, blur: float = 0.0) -> Tensor:
    """A picture of each style, or all of one, blurred."""
    pictures = [(replace(shot, style=style) if style else shot).draw() for shot in SHOTS]
    return to_tensors([p.filter(ImageFilter.GaussianBlur(blur)) if blur else p for p in pictures])


def test_the_more_a_picture_is_blurred_the_less_sharp_it_is():
    figures = torch.stack([sharpness(drawn_in(blur=blur)) for blur in (0.0, 0.5, 1.0, 2.0, 4.0)])
    assert (figures.diff(dim=0) < 0).all()
    assert figures[4].max() < 0.2 * figures[0].max()


def test_sharpness_is_of_edges_and_not_of_how_many_there_are():
    step = torch.zeros(1, 3, 64, 64)
    step[..., 32:] = 1
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., 8::16], stripes[..., 9::16] = 1, 1
    assert sharpness(step).item() == pytest.approx(sharpness(stripes).item()) == pytest.approx(3**0.5)
    assert sharpness(torch.ones(2, 3, 64, 64)).tolist() == [0, 0]


@pytest.mark.parametrize("shift", [0, 3])
def test_pixel_art_is_on_a_grid_wherever_the_grid_begins(shift):
    pictures = drawn_in(LORA_STYLE).roll((shift, shift), dims=(2, 3))[..., shift:, shift:]
    assert share_on_grid(pictures) == pytest.approx(torch.ones(3))
    assert is_pixel_art(pictures).all()


def test_plain_and_blurred_pictures_are_not_pixel_art():
    assert not is_pixel_art(drawn_in()).any()
    assert not is_pixel_art(drawn_in(LORA_STYLE, blur=1.0)).any()
    assert not is_pixel_art(torch.ones(1, 3, 64, 64)).any()


def test_squares_of_another_size_are_on_their_own_grid():
    small = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    pictures = torch.nn.functional.interpolate(small, scale_factor=5)
    assert share_on_grid(pictures, side=5) == pytest.approx(torch.ones(2))
    assert (share_on_grid(pictures, side=8) < 0.4).all()
