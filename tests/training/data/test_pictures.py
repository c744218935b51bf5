from __future__ import annotations

import gc
import io
import warnings

import pytest
import torch
from PIL import Image

from instantcharacter.training.data import examples
from instantcharacter.training.data.pictures import reference_crops, target_pixels, white_picture
from instantcharacter.training.data.samples import BadSample


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_a_change_of_preparation_needs_a_new_cache_version():
    """If this fails, raise ``PREPARATION`` and put the new numbers here: filled caches no longer fit."""
    across = torch.arange(300).expand(200, 300) * 255 // 299
    down = torch.arange(200)[:, None].expand(200, 300) * 255 // 199
    pixels = torch.stack([across, down, torch.full_like(down, 60)], dim=-1).to(torch.uint8).numpy()
    picture = png(Image.fromarray(pixels))
    target, crops = target_pixels(picture, 64), reference_crops(picture).float()
    assert examples.PREPARATION == 1
    assert target.shape == (3, 64, 64)
    for (y, x), colour in {(0, 0): (-0.663, -0.992, -0.529), (20, 50): (0.380, -0.365, -0.529)}.items():
        assert target[:, y, x].tolist() == pytest.approx(colour, abs=0.01)
    expected = {(0, 10, 100): (255, 255, 255), (0, 192, 100): (66, 128, 60), (1, 200, 300): (99, 35, 60)}
    for (crop, y, x), colour in {**expected, (4, 50, 200): (194, 152, 60)}.items():
        assert crops[crop, y, x].tolist() == pytest.approx(colour, abs=1)


def test_the_white_picture_has_only_white_in_it():
    assert (target_pixels(white_picture(), 16) == 1).all()
    assert (reference_crops(white_picture()) == 255).all()


@pytest.mark.parametrize("decode", [reference_crops, lambda data: target_pixels(data, 16)])
def test_a_broken_picture_is_a_bad_sample(monkeypatch, decode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    whole = png(Image.new("RGB", (8, 8), "red"))
    for data, reason in (
        (b"", "not a picture that can be read"),
        (b"text", "not a picture that can be read"),
        (whole[:-30], "not a whole picture"),
        (whole, "exceeds limit of 20 pixels"),
    ):
        with pytest.raises(BadSample, match=reason):
            decode(data)


def test_no_file_of_a_picture_stays_open(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "0.tif", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert reference_crops(tmp_path / "0.tif").shape[0] == 5
        gc.collect()
    assert not [str(warning.message) for warning in caught if warning.category is ResourceWarning]
