from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from instantcharacter.character.image import LARGEST, crops, cut_out, open_picture, prepare_reference, to_square

RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def gradient() -> Image.Image:
    """30 wide, 20 high, every pixel another colour."""
    y, x = np.mgrid[:20, :30]
    return Image.fromarray(np.stack([x * 8, y * 12, x + y], axis=-1).astype(np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()


def test_path_pil_array_and_tensor_are_one_picture(gradient, tmp_path):
    gradient.save(tmp_path / "a.png")
    array = np.asarray(gradient)
    tensor = torch.from_numpy(array.copy()).float() / 255
    for picture in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        array,
        array[None],
        array.astype(np.uint16) * 257,
        array / 255,
        (array / 255).astype(np.float32),
        tensor,
        tensor[None],
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1)[None],
        tensor.double(),
    ):
        assert same(open_picture(picture), gradient)


def test_half_precision_tensors_are_pictures(gradient):
    tensor = torch.from_numpy(np.asarray(gradient).copy()).float() / 255
    for dtype in (torch.float16, torch.bfloat16):
        off = np.abs(np.asarray(open_picture(tensor.to(dtype))).astype(int) - np.asarray(gradient))
        assert off.max() <= 1


def test_picture_is_turned_as_its_exif_says(gradient, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient.save(tmp_path / "a.png", exif=exif)
    assert same(open_picture(tmp_path / "a.png"), gradient.transpose(Image.Transpose.ROTATE_270))


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    for picture in (image, np.asarray(image), torch.from_numpy(np.asarray(image).copy()).float() / 255):
        opened = open_picture(picture)
        assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (RED, WHITE)
    assert open_picture(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_palette_and_grey_with_transparency_become_white():
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 1
    assert [open_picture(palette).getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    assert [open_picture(grey).getpixel((x, 0)) for x in (0, 1)] == [BLACK, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_every_mode_is_read(mode):
    white = Image.new("I;16", (3, 2), 65535) if mode in ("I", "I;16") else None
    if mode == "I":
        white = white.convert("I")
    elif mode == "F":
        white = Image.new("F", (3, 2), 1.0)
    elif white is None:
        white = (
            Image.new("RGB", (3, 2), WHITE).convert(mode) if mode != "LAB" else Image.new("LAB", (3, 2), (255, 0, 0))
        )
    opened = open_picture(white)
    assert (opened.mode, opened.size) == ("RGB", (3, 2))
    if mode != "LAB":
        assert opened.getpixel((0, 0)) == WHITE


def test_16_bit_file_keeps_its_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    opened = np.asarray(open_picture(tmp_path / "ramp.png"))[..., 0]
    assert np.array_equal(opened, np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((0, 4, 3)), "not one picture"),
        (np.zeros((6, 6, 5)), "not one picture"),
        (np.zeros((2, 4, 4, 3)), "not one picture"),
        (np.full((4, 4, 3), np.nan), "float in 0 to 1"),
        (np.full((4, 4, 3), 255.0), "float in 0 to 1"),
        (np.full((4, 4, 3), 200), "a picture of int64; expected uint8"),
        (torch.full((4, 4, 3), 200, dtype=torch.int32), "a picture of int32; expected uint8"),
        (np.zeros((4, 4), complex), "float in 0 to 1"),
        (torch.full((4, 4, 3), float("inf")), "float in 0 to 1"),
        (None, "NoneType is not a picture"),
        (7, "int is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        open_picture(picture)


def test_missing_foreign_and_cut_off_files_are_refused(gradient, tmp_path):
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="not a picture"):
        open_picture(tmp_path / "text.png")
    gradient.resize((300, 300)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for kept in (20, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="cut.png is not a"):
            open_picture(tmp_path / "cut.png")


def test_pad_centres_on_white(gradient):
    square = to_square(gradient)
    assert square.size == (30, 30)
    assert same(square.crop((0, 5, 30, 25)), gradient)
    assert set(square.crop((0, 0, 30, 5)).getdata()) | set(square.crop((0, 25, 30, 30)).getdata()) == {WHITE}


def test_stretch_fills_the_square(gradient):
    assert same(to_square(gradient, "stretch"), gradient.resize((30, 30)))


def test_square_picture_is_left_alone(gradient):
    square = gradient.crop((0, 0, 20, 20))
    assert same(to_square(square), square)


def test_unknown_fit_is_refused(gradient):
    with pytest.raises(ValueError, match="'crop'.*'pad' or 'stretch'"):
        to_square(gradient, "crop")


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


def test_resized_pictures_that_overshoot_are_clipped(gradient):
    """Upscale Image, bicubic, leaves -0.14 to 1.11."""
    array = np.asarray(gradient).astype(np.float32) / 255
    array[0, 0], array[0, 1] = -0.14, 1.11
    opened = open_picture(torch.from_numpy(array))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (BLACK, WHITE)


def test_thin_pictures_are_shrunk_before_they_become_squares():
    for size in ((30_000, 1), (1, 30_000)):
        for fit in ("pad", "stretch"):
            assert to_square(Image.new("RGB", size, RED), fit).size == (LARGEST, LARGEST)
    assert to_square(Image.new("RGB", (LARGEST, 3))).size == (LARGEST, LARGEST)


# Prepared with the masks that people have


@pytest.fixture
def photo() -> Image.Image:
    """A red character, left of the middle and of two reds, before a ground of many colours."""
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
    square, kept = prepare_reference(photo, painted(size), margin=0, keep=keep)
    assert reds(square) > 0.5
    assert kept.startswith("kept what is white in the mask")


def test_inverted_mask_of_a_painted_character_keeps_it(photo):
    """Load Image, Invert Mask, Prepare: the wiring of the first workflows."""
    square, kept = prepare_reference(photo, ImageOps.invert(painted()), margin=0, keep="auto")
    assert reds(square) > 0.5
    assert kept.startswith("kept what is black in the mask")
    assert reds(prepare_reference(photo, ImageOps.invert(painted()), keep="white")[0]) == 0


@pytest.mark.parametrize("ground", [BLACK, WHITE])
def test_transparent_part_is_not_the_character(photo, ground):
    """As Load Image gives a transparent picture: its mask is white where nothing is."""
    picture = Image.composite(photo, Image.new("RGB", photo.size, ground), painted())
    square, kept = prepare_reference(picture, ImageOps.invert(painted()), margin=0, keep="auto")
    assert reds(square) > 0.5
    assert kept.startswith("kept what is black in the mask")


def test_portrait_that_fills_a_transparent_picture_is_kept(photo):
    """Only the upper corners are transparent."""
    transparent = Image.new("L", photo.size, 0)
    transparent.paste(255, (0, 0, 12, 12))
    transparent.paste(255, (68, 0, 80, 12))
    picture = Image.composite(Image.new("RGB", photo.size, BLACK), photo, transparent)
    _, kept = prepare_reference(picture, transparent, keep="auto")
    assert kept == "kept what is black in the mask, 94% of the picture"


def test_character_that_fills_the_picture_is_kept(photo):
    """A background removal node's mask of a close-up: white nearly everywhere, ground in a corner."""
    mask = Image.new("L", photo.size, 255)
    mask.paste(0, (50, 0, 80, 20))
    _, kept = prepare_reference(photo, mask, keep="auto")
    assert kept == "kept what is white in the mask, 88% of the picture"


@pytest.mark.parametrize("mask", [0, 255])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_mask_that_masks_nothing_is_no_mask(photo, mask, fit):
    """Load Image's mask for a picture without alpha is 64×64 zeros."""
    square, kept = prepare_reference(photo, Image.new("L", (64, 64), mask), fit=fit, keep="auto")
    assert same(square, to_square(photo, fit))
    assert kept == "kept the whole picture: nothing of it is masked"


def test_empty_side_that_was_named_is_refused(photo):
    for keep, colour in (("white", 0), ("black", 255)):
        with pytest.raises(ValueError, match="mask is empty"):
            prepare_reference(photo, Image.new("L", (64, 64), colour), keep=keep)
    with pytest.raises(ValueError, match="keep is 'grey'; expected one of auto, white, black"):
        prepare_reference(photo, painted(), keep="grey")
