from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from instantcharacter.flux.init_pictures import check_init_pictures

NAN = float("nan")
LATENTS = (16, 2, 4)
RGB, MASK = Image.new("RGB", (32, 16)), Image.new("L", (32, 16), 255)


def check(image=RGB, pictures: int = 2, **inpaint) -> None:
    masks = {"mask_image": MASK, "masked_image_latents": None, "padding_mask_crop": None} | inpaint if inpaint else {}
    check_init_pictures({"image": image, **masks}, LATENTS, pictures)


@pytest.mark.parametrize(
    "image",
    [
        *[
            RGB,
            [RGB],
            [RGB, Image.new("RGB", (5, 7))],
            torch.rand(3, 9, 7),
            torch.rand(2, 3, 9, 7),
            [torch.rand(3, 9, 7)],
        ],
        *[np.ones((9, 7, 3)), np.ones((2, 9, 7, 3), np.float32), [np.ones((9, 7, 3))] * 2, -torch.rand(3, 9, 7)],
        *[torch.full((1, 16, 2, 4), 4.0), torch.full((1, 3, 4, 4), 1.2), torch.rand(3, 9, 7, dtype=torch.bfloat16)],
    ],
)
def test_pictures_that_diffusers_reads_rightly_pass(image):
    check(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        *[
            (value, "is .*; expected a PIL image")
            for value in (None, "fox.png", 3, {}, torch.ones(3, 4, 4).to_sparse())
        ],
        *[(np.full((4, 4, 3), 255, dtype), "0 to 1: convert it") for dtype in (np.uint8, np.int64, bool)],
        *[([], "expected a picture, or a list"), ([RGB, torch.rand(3, 4, 4)], "expected a picture, or a list")],
        *[(Image.new(mode, (4, 4)), f"mode {mode}; expected RGB: convert it") for mode in ("L", "RGBA", "P", "F")],
        *[(Image.new("RGB", (0, 4)), "empty"), (np.ones((0, 4, 3)), "expected a PIL image")],
        *[(torch.rand(shape), r"expected \[3, H, W\]") for shape in ((4, 4), (1, 4, 4), (4, 4, 3), (1, 1, 3, 4, 4))],
        *[(np.ones(shape), r"expected \[H, W, 3\]") for shape in ((4, 4), (4, 4, 1), (3, 4, 4), (4, 4, 4))],
        *[(torch.rand(1, 16, 3, 4), r"expected \[3, H, W\]"), (torch.rand(16, 2, 4), r"expected \[3, H, W\]")],
        *[(torch.full((3, 4, 4), value), "image has values") for value in (NAN, float("inf"), 255.0, -2.0)],
        *[(torch.full((1, 16, 2, 4), NAN), "image has values"), (np.full((4, 4, 3), 255.0), "image has values")],
        *[([RGB] * 3, "image has 3 pictures for 2"), (torch.rand(4, 3, 4, 4), "image has 4 pictures for 2")],
        ([torch.rand(3, 4, 4), torch.rand(3, 5, 4)], "expected all of one shape"),
    ],
)
def test_pictures_that_diffusers_reads_wrongly_or_not_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        check(image)


@pytest.mark.parametrize(
    "mask",
    [
        *[MASK, [MASK], Image.new("1", (32, 16), 1), RGB, np.ones((4, 4)), np.ones((4, 4, 1)), np.ones((2, 4, 4))],
        *[np.ones((1, 4, 4, 1)), torch.ones(4, 4), torch.ones(1, 4, 4), torch.ones(2, 1, 4, 4), [torch.ones(1, 4, 4)]],
    ],
)
def test_masks_that_diffusers_reads_rightly_pass(mask):
    check(mask_image=mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        *[(value, "expected a PIL image") for value in (None, "white", np.full((4, 4), 255, np.uint8))],
        *[(torch.full((4, 4), value), "mask_image has values") for value in (NAN, 255.0, -1.0)],
        *[(torch.ones(shape), r"expected \[H, W\] or \[N, H, W\]") for shape in ((1, 3, 4, 4), (4,))],
        *[
            (torch.ones(3, 4, 4), "mask_image has 3 pictures for 2"),
            (Image.new("F", (4, 4)), "mode F; expected 1 or L"),
        ],
    ],
)
def test_masks_that_diffusers_reads_wrongly_or_not_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        check(mask_image=mask)


def test_latents_of_the_masked_picture_are_of_its_size():
    check(masked_image_latents=torch.ones(1, 16, 2, 4))
    for value in (torch.ones(1, 16, 3, 4), torch.ones(1, 3, 16, 32), torch.full((1, 16, 2, 4), NAN), RGB):
        with pytest.raises(ValueError, match="masked_image_latents"):
            check(masked_image_latents=value)


def test_a_crop_needs_a_picture_and_a_mask_of_one_size_with_white():
    check(padding_mask_crop=4)
    for value in (-1, 1.5, "4", NAN):
        with pytest.raises(ValueError, match="padding_mask_crop is .*; expected a whole number"):
            check(padding_mask_crop=value)
    for mask in (Image.new("L", (4, 4), 255), Image.new("L", (32, 16))):
        with pytest.raises(ValueError, match="expected one size, and white in the mask"):
            check(padding_mask_crop=4, mask_image=mask)
    with pytest.raises(ValueError, match="expected one PIL image with padding_mask_crop"):
        check(padding_mask_crop=4, mask_image=[MASK])
