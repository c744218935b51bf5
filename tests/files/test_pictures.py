from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support import pictures
from support.pictures import BLACK, RED, WHITE, same

from instantcharacter.files.pictures import (
    FULL_PIXELS,
    LARGEST_SIDE,
    MAX_PIXELS,
    MAX_SIDE,
    open_mask,
    open_picture,
    thumbnail,
    to_square,
)


@pytest.fixture
def gradient() -> Image.Image:
    return pictures.gradient()


def test_path_image_array_and_tensor_give_the_same_picture(gradient, tmp_path):
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


def test_exif_rotation_is_applied(gradient, tmp_path):
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


def test_transparent_palette_and_grey_become_white():
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
def test_values_that_are_no_picture_are_refused(picture, message):
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
    for length in (20, len(whole) // 2):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.png is not a"):
            open_picture(tmp_path / "cut.png")


def test_overshoot_of_resizing_is_clipped(gradient):
    """Upscale Image, bicubic, leaves -0.14 to 1.11."""
    array = np.asarray(gradient).astype(np.float32) / 255
    array[0, 0], array[0, 1] = -0.14, 1.11
    opened = open_picture(torch.from_numpy(array))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (BLACK, WHITE)


def test_pad_centres_on_white(gradient):
    square = to_square(gradient)
    assert square.size == (30, 30)
    assert same(square.crop((0, 5, 30, 25)), gradient)
    assert set(square.crop((0, 0, 30, 5)).getdata()) | set(square.crop((0, 25, 30, 30)).getdata()) == {WHITE}


def test_stretch_fills_the_square(gradient):
    assert same(to_square(gradient, "stretch"), gradient.resize((30, 30)))


def test_square_picture_is_unchanged(gradient):
    square = gradient.crop((0, 0, 20, 20))
    assert same(to_square(square), square)


def test_unknown_fit_is_refused(gradient):
    with pytest.raises(ValueError, match="'crop'.*'pad' or 'stretch'"):
        to_square(gradient, "crop")


def test_long_thin_pictures_are_shrunk():
    for size in ((30_000, 1), (1, 30_000)):
        for fit in ("pad", "stretch"):
            assert to_square(Image.new("RGB", size, RED), fit).size == (LARGEST_SIDE, LARGEST_SIDE)
    assert to_square(Image.new("RGB", (LARGEST_SIDE, 3))).size == (LARGEST_SIDE, LARGEST_SIDE)


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff", "webp"])
def test_animated_files_are_closed(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in (RED, BLACK))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert open_picture(path).size == (8, 6)


def test_rotation_of_a_tiff_is_read_before_it_is_closed(gradient, tmp_path):
    gradient.save(tmp_path / "a.tiff", tiffinfo={0x0112: 6})
    assert same(open_picture(tmp_path / "a.tiff"), gradient.transpose(Image.Transpose.ROTATE_270))


def test_opened_picture_is_a_copy(gradient):
    before = gradient.copy()
    open_picture(gradient).paste(BLACK, (0, 0, 30, 20))
    assert same(gradient, before)


def test_mask_is_grey_and_black_where_it_is_transparent():
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (255, 255, 255, 0))
    opened = open_mask(mask)
    assert (opened.mode, list(opened.tobytes())) == ("L", [255, 0])


def test_mask_of_0_and_1_in_uint8_is_refused():
    with pytest.raises(ValueError, match="values of 0 and 1 in uint8"):
        open_mask(np.ones((4, 4), np.uint8))
    assert open_mask(np.ones((4, 4), bool)).getpixel((0, 0)) == 255


def test_thumbnail_is_a_white_square():
    small = thumbnail(Image.new("RGB", (64, 32), RED))
    assert small.size == (256, 256)
    assert (small.getpixel((128, 128)), small.getpixel((128, 10))) == (RED, WHITE)


# Large pictures


def test_large_picture_is_halved_and_stays_upright_and_the_same(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    large = Image.linear_gradient("L").resize((5002, 5001))
    large.save(tmp_path / "a.jpg", exif=exif)
    assert large.width * large.height > FULL_PIXELS
    opened = open_picture(tmp_path / "a.jpg")
    assert opened.size == (2501, 2501)
    upright = large.transpose(Image.Transpose.ROTATE_270)
    for x, y in ((3, 900), (1200, 5), (2400, 2400)):
        assert abs(opened.getpixel((x, y))[0] - upright.getpixel((2 * x, 2 * y))) <= 3


def test_strips_are_joined_without_a_seam():
    array = np.random.default_rng(0).integers(0, 255, (2300, 1100, 4), dtype=np.uint8)  # of 909 rows
    whole = Image.alpha_composite(Image.new("RGBA", (1100, 2300), WHITE), Image.fromarray(array)).convert("RGB")
    assert same(open_picture(array), whole)
    assert same(open_picture(Image.fromarray(array)), whole)


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 1), (1, MAX_SIDE + 1), (MAX_PIXELS // 1000 + 1, 1000)])
def test_pictures_above_the_limits_are_refused_with_them(size, tmp_path):
    Image.new("1", size).save(tmp_path / "large.png")
    for picture in (tmp_path / "large.png", Image.new("1", size), np.broadcast_to(np.uint8(0), size[::-1])):
        with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels; expected at most 65535 a side and 64 mill"):
            open_picture(picture)


MEASURE = """
import sys
from pathlib import Path
from instantcharacter.character.image import crops, prepare_reference

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS:")
    crops(prepare_reference(path, path, keep="white")[0])
    assert memory("VmHWM:") - before < 500, path
"""
"""The peak of each picture's memory, prepared with itself as a mask."""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_preparing_any_picture_takes_less_than_500_mb(tmp_path):
    white = {
        "thin.png": Image.new("RGB", (65_000, 1), WHITE),
        "16 bits.png": Image.fromarray(np.full((8000, 8000), 65535, np.uint16)),
        "transparent.png": Image.new("RGBA", (8000, 8000), (*WHITE, 200)),
    }
    paths = [tmp_path / name for name in white]
    for path in paths:
        white[path.name].save(path, compress_level=1)
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# Files that are none


def test_a_postscript_file_is_not_run(gradient, tmp_path):
    gradient.save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="an EPS is a program, which is not run"):
        open_picture(tmp_path / "a.eps")


@pytest.mark.parametrize("transparency", ["x", b"", b"\0" * 300, (0, 0, 0)])
@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_broken_transparency_is_one_sentence(mode, transparency):
    image = Image.new(mode, (3, 2))
    image.info["transparency"] = transparency
    try:
        assert open_picture(image).size == (3, 2)
    except ValueError as error:
        assert "is not a picture that can be read" in str(error)


@pytest.mark.parametrize("tensor", [torch.ones(4, 4, device="meta"), torch.ones(4, 4).to_sparse()])
def test_tensors_without_values_are_refused(tensor):
    with pytest.raises(ValueError, match="without plain values is not a picture"):
        open_picture(tensor)
