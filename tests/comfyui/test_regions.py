"""Masks at the resolution of image tokens; no ComfyUI is needed."""

from __future__ import annotations

import pytest
import torch

from instantcharacter.comfyui.regions import Regions, crop_to_area

SIZE = (8, 12)
GRID = (4, 6)


def regions(*masks) -> Regions:
    return Regions(masks, SIZE, torch.device("cpu"), torch.float32)


def left_half() -> torch.Tensor:
    mask = torch.zeros(1, 40, 60)
    mask[..., :30] = 1
    return mask


def test_a_character_without_a_mask_has_no_region():
    assert regions(None, left_half()).token_mask(0, (1, 16, *SIZE), GRID, ()) is None


@pytest.mark.parametrize("mask", [left_half(), left_half()[0]])
def test_one_mask_serves_every_picture(mask):
    tokens = regions(None, mask).token_mask(1, (3, 16, *SIZE), GRID, ())
    assert tokens.shape == (3, 24, 1)
    assert torch.equal(tokens.view(3, *GRID), left_half()[0, ::10, ::10].expand(3, -1, -1))


def test_masks_of_a_batch_repeat_for_every_prompt():
    masks = torch.cat([left_half(), 1 - left_half()])
    tokens = regions(masks).token_mask(0, (4, 16, *SIZE), GRID, ("positive", "negative"))
    one, other = regions(masks).token_mask(0, (2, 16, *SIZE), GRID, ())
    assert torch.equal(tokens, torch.stack([one, other, one, other]))


def test_masks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="2 masks on Apply for a batch of 3; expected one mask"):
        regions(torch.ones(2, 8, 8)).token_mask(0, (3, 16, *SIZE), GRID, ())


def test_latents_of_a_tile_are_refused():
    with pytest.raises(ValueError, match="needs latents of the whole picture"):
        regions(left_half()).token_mask(0, (1, 16, 8, 4), GRID, ())


def test_a_prompt_for_an_area_gets_the_masks_part_of_it():
    masked = regions(left_half())
    masked.areas = {"area": (4, 4, 2, 4), "whole": None}
    tokens = masked.token_mask(0, (2, 16, 4, 4), (2, 2), ("area", "area"))
    assert torch.equal(tokens.view(2, 2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, -1, -1))


def test_an_area_outside_of_the_mask_is_empty():
    masked = regions(left_half())
    masked.areas = {"right": (8, 4, 0, 8)}
    assert not masked.token_mask(0, (1, 16, 8, 4), (4, 2), ("right",)).any()


def test_crop_takes_height_width_top_and_left_in_latents():
    mask = torch.arange(96.0).view(1, *SIZE)
    assert torch.equal(crop_to_area(mask, SIZE, (2, 3, 4, 5)), mask[:, 4:6, 5:8])
