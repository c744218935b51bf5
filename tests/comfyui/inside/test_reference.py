"""Prepare and Load Example in a real ComfyUI, whose Load Image opens the files that people have."""

from __future__ import annotations

import os
from pathlib import Path

import comfy.bg_removal_model
import comfy.model_management as management
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from support import background_removal, pictures

from instantcharacter.comfyui.images import to_image
from instantcharacter.comfyui.nodes.reference import LoadExample, PrepareReference
from instantcharacter.comfyui.reference import background_removal_cache
from instantcharacter.files.catalog import EXAMPLES, example
from instantcharacter.files.pictures import to_square
from nodes import LoadImage

CUT_OUT = "cut out by birefnet.safetensors: 20% of the picture"
WITHOUT_A_MODEL = (
    "kept the whole picture: to cut the character out, connect a mask, or put birefnet.safetensors from "
    "huggingface.co/Comfy-Org/BiRefNet into models/background_removal"
)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Path:
    """ComfyUI's input folder, and beside it an empty folder of background removal models."""
    for name in ("input", "temp", "background_removal"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    models = ([str(tmp_path / "background_removal")], folder_paths.supported_pt_extensions)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "background_removal", models)
    monkeypatch.setitem(comfy.bg_removal_model.BG_REMOVAL_MODELS, "birefnet", background_removal.RedForeground)
    return tmp_path


@pytest.fixture
def birefnet(folders) -> Path:
    """The file of a model whose foreground is red."""
    file = folders / "background_removal/birefnet.safetensors"
    background_removal.save(file)
    return file


@pytest.fixture
def node():
    """A node of a workflow, as ComfyUI keeps it."""
    return PrepareReference()


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The files that ComfyUI loads background removal models from."""
    files, load = [], comfy.bg_removal_model.load
    monkeypatch.setattr(comfy.bg_removal_model, "load", lambda file: files.append(file) or load(file))
    return files


def photo(size: tuple[int, int] = (100, 160)) -> Image.Image:
    """A character of two reds, 40% as wide and half as high as the picture, on many greens and blues."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([y * 0, 90 + x % 100, 60 + y % 160], axis=-1).astype(np.uint8))
    left, top, right, bottom = box(size)
    image.paste((200, 10, 10), (left, top, right, bottom))
    image.paste((255, 40, 40), (left, top, right, (top + bottom) // 2))
    return image


def box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return width // 5, height // 4, width // 5 + width * 2 // 5, height // 4 + height // 2


def alpha(size: tuple[int, int] = (100, 160)) -> Image.Image:
    """White where the character is."""
    mask = Image.new("L", size)
    mask.paste(255, box(size))
    return mask


def opened(folders: Path, picture: Image.Image, name: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What ComfyUI's Load Image makes of a picture that was saved under this name."""
    picture.save(folders / "input" / name, **options)
    return LoadImage().load_image(name)


def prepared(image: torch.Tensor, mask: torch.Tensor | None = None, **settings) -> tuple[torch.Tensor, str]:
    """The reference, and the text on the node."""
    output = PrepareReference.execute(image=image, **{"margin": 0.0, "fit": "auto", "mask": mask, **settings})
    return output.result[0], output.ui["text"][0]


def redness(reference: torch.Tensor) -> float:
    """The part of a reference that is red."""
    return ((reference[..., 0] > 0.6) & (reference[..., 1:].amax(-1) < 0.35)).float().mean().item()


def whole(image: torch.Tensor) -> torch.Tensor:
    """The picture on a white square."""
    return to_image(to_square(Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))))[None]


# Without a mask


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp", "palette.png", "opaque.png", "cmyk.jpg"])
def test_an_opaque_picture_is_cut_out(folders, birefnet, name):
    mode = {"palette.png": "P", "opaque.png": "RGBA", "cmyk.jpg": "CMYK"}.get(name, "RGB")
    image, mask = opened(folders, photo().convert(mode), name)
    assert mask.max() < 0.5  # of a CMYK picture it is 1/255, and a little more in some pixels
    reference, text = prepared(image, mask)
    assert text == CUT_OUT
    assert reference.shape == (1, 80, 80, 3)
    assert 0.4 < redness(reference) < 0.55
    assert reference[0, 40, 5].tolist() == [1, 1, 1]


def test_a_picture_that_is_rotated_by_its_exif_is_cut_out_upright(folders, birefnet):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    reference, text = prepared(*opened(folders, photo((160, 100)), "rotated.jpg", exif=exif))
    assert text.startswith("cut out by birefnet.safetensors")
    assert reference.shape == (1, 64, 64, 3)
    left, right = reference[0, :, 7:32], reference[0, :, 32:57]
    assert right[..., 0].mean() > left[..., 0].mean() + 0.1  # the character's brighter upper half


@pytest.mark.parametrize("size", [(40, 400), (400, 40), (1600, 900)])
def test_a_picture_of_any_format_is_cut_out(birefnet, size):
    reference, text = prepared(to_image(photo(size))[None])
    assert text == CUT_OUT
    assert redness(reference) > 0.05


def test_the_reference_is_shown_on_the_node(birefnet):
    image = to_image(photo())[None]
    output = PrepareReference.execute(image=image, margin=0.0, fit="auto")
    (shown,) = output.ui["images"]
    saved = Image.open(Path(folder_paths.get_temp_directory(), shown["subfolder"], shown["filename"]))
    assert saved.size == (80, 80)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_without_a_foreground_is_kept_whole(birefnet, channels):
    grey = torch.full((1, 20, 30, channels), 0.5)
    reference, text = prepared(grey)
    assert text == "kept the whole picture: birefnet.safetensors found no character in it; connect a mask"
    assert torch.equal(reference, whole(grey.expand(-1, -1, -1, 3)))


def test_without_a_model_the_picture_is_kept_whole(folders):
    image, mask = opened(folders, photo(), "photo.png")
    reference, text = prepared(image, mask)
    assert text == WITHOUT_A_MODEL
    assert torch.equal(reference, whole(image))


def test_a_comfyui_without_such_models_keeps_the_picture_whole(monkeypatch):
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "background_removal")
    assert prepared(to_image(photo())[None])[1] == WITHOUT_A_MODEL


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_pad_and_stretch_keep_the_whole_picture(birefnet, loads, fit):
    image = to_image(photo())[None]
    reference, text = prepared(image, fit=fit)
    assert text == "kept the whole picture"
    assert torch.equal(reference, to_image(to_square(photo(), fit))[None])
    assert loads == []


def test_an_image_with_alpha_is_cut_out_by_it(birefnet, loads):
    picture = photo()
    picture.putalpha(alpha())
    image = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]
    reference, text = prepared(image)
    assert text == "cut out by its transparency: 20% of the picture"
    assert reference.shape == (1, 80, 80, 3)
    assert redness(reference) == 0.5
    assert loads == []
    image[..., 3] = 1
    assert prepared(image)[1] == CUT_OUT


# With a mask


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.webp", "RGBA"), ("grey.png", "LA")])
def test_a_transparent_picture_is_cut_out_by_its_alpha(folders, birefnet, loads, name, mode):
    picture = photo().convert(mode.removesuffix("A"))
    picture.putalpha(alpha())
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    reference, text = prepared(*opened(folders, picture, name, **options))
    assert text == "kept what is black in the mask, 20% of the picture"
    assert reference.shape == (1, 80, 80, 3)
    assert reference[0, :, 20:60].mean() < 0.6
    assert loads == []


@pytest.mark.parametrize("size", [(100, 160), (25, 40), (640, 300), (10, 16)])
def test_a_mask_may_have_any_size(birefnet, loads, size):
    mask = torch.from_numpy(np.asarray(alpha().resize(size)).astype(np.float32) / 255)
    reference, text = prepared(to_image(photo())[None], mask[None])
    assert text.startswith("kept what is white in the mask")
    assert redness(reference) > 0.3
    assert loads == []


def test_a_white_mask_keeps_the_picture_whole(birefnet):
    image = to_image(photo())[None]
    reference, text = prepared(image, torch.ones(1, 64, 64))
    assert text == "kept the whole picture: nothing of it is masked"
    assert torch.equal(reference, whole(image))


@pytest.mark.parametrize("keep", ["auto", "white", "black"])
def test_an_empty_mask_is_none(birefnet, keep):
    assert prepared(to_image(photo())[None], torch.zeros(1, 64, 64), keep=keep)[1] == CUT_OUT


def test_each_picture_of_a_batch_is_cut_out_by_its_own_mask_or_the_model(birefnet):
    image = to_image(photo()).expand(3, -1, -1, -1)
    mask = torch.zeros(3, 160, 100)
    mask[1] = torch.from_numpy(np.asarray(alpha()) / 255)
    reference, text = prepared(image, mask)
    assert text == f"{CUT_OUT}\nkept what is white in the mask, 20% of the picture"
    assert torch.equal(reference[0], reference[2])
    assert redness(reference[0]) == pytest.approx(redness(reference[1]), abs=0.03)


# The model


def test_the_model_is_loaded_once_for_all_nodes_of_a_workflow(birefnet, loads, node):
    other = PrepareReference()
    image = to_image(photo()).expand(2, -1, -1, -1)
    assert prepared(image)[1] == prepared(image[:1])[1] == CUT_OUT
    assert loads == [str(birefnet)]
    del node
    prepared(image)
    assert len(loads) == 1
    assert other.cache.model is not None


def test_the_model_is_freed_with_the_last_node(birefnet, loads):
    prepared(to_image(photo())[None])
    assert background_removal_cache().model is None
    assert not [loaded for loaded in management.current_loaded_models if is_red_foreground(loaded)]


def is_red_foreground(loaded) -> bool:
    return loaded.model is not None and isinstance(loaded.model.model, background_removal.RedForeground)


def test_the_model_is_comfyuis_to_unload_and_load_again(birefnet, loads, node):
    image = to_image(photo())[None]
    first, _ = prepared(image)
    assert any(map(is_red_foreground, management.current_loaded_models))
    management.unload_all_models()
    assert not any(map(is_red_foreground, management.current_loaded_models))
    assert torch.equal(prepared(image)[0], first)
    assert any(map(is_red_foreground, management.current_loaded_models))
    assert len(loads) == 1


def test_the_node_runs_again_when_the_model_appears_changes_or_disappears(folders, node):
    fingerprint = PrepareReference.fingerprint_inputs
    states = [fingerprint(fit="auto", margin=0.0)]
    file = folders / "background_removal/birefnet.safetensors"
    background_removal.save(file)
    states += [fingerprint(fit="auto")]
    assert fingerprint(fit="auto") == states[-1]
    assert str(folders) not in states[-1]
    os.utime(file, ns=(1, 1))
    states += [fingerprint(fit="auto")]
    assert len(set(states)) == 3
    assert fingerprint(fit="pad") == fingerprint(fit="stretch") == states[0]
    file.unlink()
    assert fingerprint(fit="auto") == states[0]


def test_a_changed_model_is_loaded(birefnet, loads, node):
    image = to_image(photo())[None]
    prepared(image)
    os.utime(birefnet, ns=(1, 1))
    prepared(image)
    assert len(loads) == 2


def test_the_usual_model_comes_before_others(folders, birefnet, loads):
    background_removal.save(folders / "background_removal/a.safetensors")
    prepared(to_image(photo())[None])
    birefnet.unlink()
    assert prepared(to_image(photo())[None])[1].startswith("cut out by a.safetensors")
    assert [Path(file).name for file in loads] == ["birefnet.safetensors", "a.safetensors"]


def test_a_file_of_another_kind_keeps_the_picture_whole_and_says_so(birefnet):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, birefnet)
    image = to_image(photo())[None]
    reference, text = prepared(image)
    assert text.startswith("kept the whole picture: birefnet.safetensors is no background removal model for ComfyUI")
    assert torch.equal(reference, whole(image))


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_broken_file_is_named(birefnet, content):
    birefnet.write_bytes(content)
    with pytest.raises(ValueError, match=r"birefnet\.safetensors cannot be read: .*Replace or delete it"):
        prepared(to_image(photo())[None])


def test_a_cancel_stops_between_pictures(birefnet):
    management.interrupt_current_processing()
    try:
        with pytest.raises(management.InterruptProcessingException):
            prepared(to_image(photo())[None])
    finally:
        management.interrupt_current_processing(False)


# Examples


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_load_image_makes_of_it(folders, name):
    image, mask = opened(folders, Image.open(example(name)), name)
    output = LoadExample.run(name)
    assert torch.equal(output.result[0], image)
    assert torch.equal(output.result[1], mask)


def test_a_transparent_example_is_shown_on_white(folders):
    (shown,) = LoadExample.run("owl.png").ui.as_dict()["images"]
    saved = Image.open(folders / "temp" / shown["subfolder"] / shown["filename"])
    assert saved.getpixel((0, 0)) == pictures.WHITE


def test_an_example_is_prepared_by_its_mask():
    image, mask = LoadExample.run("character.png").result
    assert prepared(image, mask)[1] == "kept what is black in the mask, 53% of the picture"


@pytest.mark.parametrize("name", ["../README.md", "demo.png", "", "character"])
def test_another_name_than_an_examples_is_refused(name):
    with pytest.raises(ValueError, match="expected one of character.png, owl.png, monster.png"):
        LoadExample.run(name)
