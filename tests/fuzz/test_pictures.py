"""Pictures and masks of any shape, kind and content: whatever is opened is the picture that it says it is."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from instantcharacter.character.image import cut_out, prepare_reference
from instantcharacter.files.pictures import LARGEST_SIDE, open_mask, open_picture

SIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 33])
SHAPES = st.one_of(
    st.lists(SIDES, max_size=5).map(tuple),
    st.tuples(SIDES, SIDES, st.sampled_from([1, 2, 3, 4, 5])),
    st.sampled_from([(20000, 1), (1, 70000), (70000, 1, 3), (2, 20000, 3), (1, 3, 9, 4)]),
)
DTYPES = ["uint8", "uint16", "int8", "int16", "int32", "int64", "uint64", "bool", "float16", "float32", "float64"]
FILLS = st.sampled_from([0, 1, 0.5, 0.25, 128, 255, 256, 65535, -1, -0.3, 1.4, 1e30, float("nan"), float("inf")])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """One value everywhere, and perhaps another in one place."""
    dtype, fill, other = (
        draw(st.sampled_from([*DTYPES, "complex64", ">u2", ">f4", "O", "U3"])),
        draw(FILLS),
        draw(FILLS),
    )
    with np.errstate(all="ignore"):
        array = np.full(draw(SHAPES), np.asarray(fill).astype(dtype))
        if array.size and draw(st.booleans()):
            array[tuple(0 for _ in array.shape)] = np.asarray(other).astype(dtype)
    return draw(st.sampled_from([array, array[::-1] if array.ndim else array, np.asfortranarray(array)]))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = getattr(torch, draw(st.sampled_from([*DTYPES, "bfloat16", "complex64", "float8_e4m3fn"])))
    tensor = torch.full(draw(SHAPES), draw(FILLS), dtype=torch.float64).to(dtype)
    kinds = [
        tensor,
        tensor.to("meta"),
        tensor.requires_grad_(dtype.is_floating_point),
        tensor.T if tensor.ndim == 2 else tensor,
    ]
    return draw(st.sampled_from([*kinds, tensor.to_sparse() if dtype == torch.float32 else tensor]))


def is_that_picture(array: Any, opened: Image.Image) -> bool:
    """Whether a picture has the extremes of an array or tensor that can be one; those with alpha blend."""
    if isinstance(array, torch.Tensor):
        array = array.detach().float().numpy() if array.is_floating_point() else array.numpy()
    if 4 in array.shape:
        return array.size > 0
    values = array.astype(np.float64) * {"uint8": 1, "uint16": 1 / 257}.get(array.dtype.name, 255)
    if not (values.min() >= -0.5 * 255 and values.max() <= 1.5 * 255):
        return False
    got = np.asarray(opened, dtype=float)
    return bool(abs(got.min() - values.min().clip(0, 255)) <= 2 and abs(got.max() - values.max().clip(0, 255)) <= 2)


@given(array=arrays())
def test_arrays(outcomes, array):
    outcomes.judge(lambda: open_picture(array), lambda opened: is_that_picture(array, opened))


@given(tensor=tensors())
def test_tensors(outcomes, tensor):
    outcomes.judge(lambda: open_picture(tensor), lambda opened: is_that_picture(tensor, opened))


@given(picture=st.one_of(arrays(), tensors()), mask=st.one_of(arrays(), tensors()), margin=FILLS, data=st.data())
def test_pictures_with_masks(outcomes, picture, mask, margin, data):
    fit, keep = (
        data.draw(st.sampled_from(["pad", "stretch", "auto", ""])),
        data.draw(st.sampled_from(["auto", "white", "black", "x"])),
    )

    def is_right(prepared: tuple[Image.Image, str]) -> bool:
        square, _ = prepared
        return square.mode == "RGB" and 1 <= square.width == square.height <= LARGEST_SIDE

    outcomes.judge(lambda: prepare_reference(picture, mask, margin, fit, keep), is_right)


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "I;16",
    "I;16B",
]


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    """PIL images of every mode, white or nearly so, with every kind of transparency."""
    mode = draw(st.sampled_from(MODES))
    image = Image.new(mode, draw(st.sampled_from([(1, 1), (3, 5), (64, 2), (1, 900), (0, 4), (70_000, 1)])))
    transparency = draw(st.sampled_from([None, None, 0, 1, 255, 300, -1, b"", b"\0" * 300, (0, 0, 0), "x"]))
    if transparency is not None:
        image.info["transparency"] = transparency
    if mode in ("P", "PA") and draw(st.booleans()):
        image.putpalette(draw(st.sampled_from([bytes(3), bytes(768), bytes(range(256)) * 3])))
    return image


@given(image=images(), orientation=st.sampled_from([None, 1, 6, 8, 0, 99, -1, "6", b"\x06", 6.0, (6,)]))
def test_images_of_every_mode(outcomes, image, orientation):
    if orientation is not None:
        image.getexif()._data[0x0112] = orientation

    def is_right(opened: Image.Image) -> bool:
        return opened.mode == "RGB" and sorted(opened.size) == sorted(image.size)

    outcomes.judge(lambda: open_picture(image), is_right)


def encoded(kind: str, **options: Any) -> bytes:
    """A small picture as a file."""
    gradient = Image.linear_gradient("L").resize((20, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a picture"
    options |= {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    Image.merge("RGB", [gradient] * 3).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


FILES = {
    kind: encoded(kind)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "EPS")
}


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that says that it has this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Good files, cut off, changed in places, or with bytes of their own."""
    content = bytearray(FILES[draw(st.sampled_from(sorted(FILES)))])
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.one_of(st.integers(0, 99), st.integers(0, len(content) - 1))) % len(content)
        content[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, content[at] ^ 1]))
    content = content[: draw(st.one_of(st.none(), st.integers(0, len(content))))]
    sizes = st.sampled_from([0, 1, 2**16, 2**31 - 1])
    return bytes(
        draw(st.one_of(st.just(content), st.just(content), st.binary(max_size=60), st.builds(png, sizes, sizes)))
    )


@given(content=files())
def test_files(outcomes, tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)

    def is_right(opened: Image.Image) -> bool:
        return opened.mode == "RGB" and min(opened.size) > 0 and opened.width * opened.height <= 25_000_000

    outcomes.judge(lambda: open_picture(path), is_right)
    outcomes.judge(lambda: open_mask(path), lambda mask: mask.mode == "L")


@given(array=arrays(), margin=FILLS)
def test_masks(outcomes, array, margin):
    picture = Image.new("RGB", (16, 9), (200, 10, 10))

    def is_right(square: Image.Image) -> bool:
        return np.isfinite(margin) and square.width == square.height and bool((np.asarray(square) != 255).any())

    outcomes.judge(lambda: cut_out(picture, array, margin), is_right)
