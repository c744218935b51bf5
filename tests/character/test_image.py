from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from support import pictures
from support.pictures import BLACK, RED, WHITE, same

from instantcharacter.character.image import crops, cut_out, prepare_reference
from instantcharacter.files.pictures import LARGEST_SIDE, to_square


@pytest.fixture
def gradient() -> Image.Image:
    return pictures.gradient()


def test_views_are_the_whole_and_its_quarters_in_reading_order():
    image = Image.new("RGB", (100, 100))
    draw = ImageDraw.Draw(image)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for colour, corner in zip(colours, [(0, 0), (50, 0), (0, 50), (50, 50)]):
        draw.rectangle((*corner, corner[0] + 49, corner[1] + 49), colour)
    low, high = crops(image)
    assert [view.size for view in low + high] == [(384, 384)] * 5
    assert [view.getpixel((192, 192)) for view in high] == colours


def test_mask_cuts_out_on_white_with_a_margin():
    image = Image.new("RGB", (40, 30), RED)
    mask = Image.new("L", (40, 30), 0)
    mask.paste(255, (10, 5, 20, 25))
    square = cut_out(image, mask, margin=0.1)
    assert square.size == (24, 24)
    red = [(x, y) for x in range(24) for y in range(24) if square.getpixel((x, y)) == RED]
    assert (min(red), max(red), len(red)) == ((7, 2), (16, 21), 200)
    assert square.getpixel((0, 0)) == WHITE


def test_square_with_its_margin_is_within_the_limit():
    mask = Image.new("L", (4000, 20), 255)
    for margin in (0.0, 0.05, 0.5, 1.0):
        square = cut_out(Image.new("RGB", (4000, 20), RED), mask, margin)
        assert LARGEST_SIDE - 3 <= square.width <= LARGEST_SIDE or margin == 0.0
        assert square.getpixel((square.width // 2, square.width // 2)) == RED


def test_transparent_parts_of_a_mask_take_away():
    mask = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (1, 1, 3, 3))
    assert cut_out(Image.new("RGB", (4, 4), RED), mask, margin=0).size == (2, 2)


def test_mask_may_be_an_array_and_its_grey_blends():
    mask = np.zeros((4, 4), np.float32)
    mask[1:3, 1:3] = 1
    mask[1, 1] = 0.6
    square = cut_out(Image.new("RGB", (4, 4), BLACK), mask, margin=0)
    assert square.getpixel((1, 1)) == BLACK
    assert square.getpixel((0, 0)) == (102, 102, 102)


def test_wrong_masks_are_refused(gradient):
    with pytest.raises(ValueError, match="mask is empty"):
        cut_out(gradient, Image.new("L", (30, 20), 0))
    with pytest.raises(ValueError, match="margin is -0.1"):
        cut_out(gradient, Image.new("L", (30, 20), 255), margin=-0.1)
    ones = np.ones((20, 30), np.uint8)
    with pytest.raises(ValueError, match="values of 0 and 1 in uint8"):
        cut_out(gradient, ones)
    with pytest.raises(ValueError, match="a picture of int64"):
        cut_out(gradient, ones.astype(int) * 255)


# Prepared with the masks that people have


@pytest.fixture
def photo() -> Image.Image:
    """A red character, left of the middle and of two reds, before a background of many colours."""
    y, x = np.mgrid[:60, :80]
    image = Image.fromarray(np.stack([x, y * 4, (x * y) % 255], axis=-1).astype(np.uint8))
    image.paste((200, 0, 0), (16, 20, 40, 40))
    image.paste((150, 20, 20), (16, 40, 40, 60))
    return image


def painted(size: tuple[int, int] = (80, 60)) -> Image.Image:
    """White over the photo's character."""
    mask = Image.new("L", (80, 60), 0)
    mask.paste(255, (16, 20, 40, 60))
    return mask.resize(size)


def reds(picture: Image.Image) -> float:
    """The part of a square that is the character."""
    pixels = np.asarray(picture).astype(int)
    return float(((pixels[..., 0] > 140) & (pixels[..., 1] < 30) & (pixels[..., 2] < 30)).mean())


@pytest.mark.parametrize("keep", ["auto", "white"])
@pytest.mark.parametrize("size", [(80, 60), (40, 30), (160, 200)])
def test_mask_painted_over_the_character_keeps_it(photo, keep, size):
    square, sentence = prepare_reference(photo, painted(size), margin=0, keep=keep)
    assert reds(square) > 0.5
    assert sentence.startswith("kept what is white in the mask")


def test_inverted_mask_of_a_painted_character_keeps_it(photo):
    """Load Image, Invert Mask, Prepare: the wiring of the first workflows."""
    square, sentence = prepare_reference(photo, ImageOps.invert(painted()), margin=0, keep="auto")
    assert reds(square) > 0.5
    assert sentence.startswith("kept what is black in the mask")
    assert reds(prepare_reference(photo, ImageOps.invert(painted()), keep="white")[0]) == 0


@pytest.mark.parametrize("background", [BLACK, WHITE])
def test_transparent_part_is_not_the_character(photo, background):
    """As Load Image gives a transparent picture: its mask is white where nothing is."""
    picture = Image.composite(photo, Image.new("RGB", photo.size, background), painted())
    square, sentence = prepare_reference(picture, ImageOps.invert(painted()), margin=0, keep="auto")
    assert reds(square) > 0.5
    assert sentence.startswith("kept what is black in the mask")


def test_portrait_that_fills_a_transparent_picture_is_kept(photo):
    """Only the upper corners are transparent."""
    transparent = Image.new("L", photo.size, 0)
    transparent.paste(255, (0, 0, 12, 12))
    transparent.paste(255, (68, 0, 80, 12))
    picture = Image.composite(Image.new("RGB", photo.size, BLACK), photo, transparent)
    _, sentence = prepare_reference(picture, transparent, keep="auto")
    assert sentence == "kept what is black in the mask, 94% of the picture"


def test_character_that_fills_the_picture_is_kept(photo):
    """A background removal node's mask of a close-up: white nearly everywhere, background in a corner."""
    mask = Image.new("L", photo.size, 255)
    mask.paste(0, (50, 0, 80, 20))
    _, sentence = prepare_reference(photo, mask, keep="auto")
    assert sentence == "kept what is white in the mask, 88% of the picture"


@pytest.mark.parametrize("mask", [0, 255])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_mask_that_masks_nothing_is_no_mask(photo, mask, fit):
    """Load Image's mask for a picture without alpha is 64×64 zeros."""
    square, sentence = prepare_reference(photo, Image.new("L", (64, 64), mask), fit=fit, keep="auto")
    assert same(square, to_square(photo, fit))
    assert sentence == "kept the whole picture: nothing of it is masked"


def test_empty_side_that_was_named_is_refused(photo):
    for keep, colour in (("white", 0), ("black", 255)):
        with pytest.raises(ValueError, match="mask is empty"):
            prepare_reference(photo, Image.new("L", (64, 64), colour), keep=keep)
    with pytest.raises(ValueError, match="keep is 'grey'; expected one of auto, white, black"):
        prepare_reference(photo, painted(), keep="grey")
