from __future__ import annotations

import pytest

from instantcharacter.files import catalog
from instantcharacter.files.catalog import EXAMPLES, FILES, TOY_FILES, example, toy


def test_every_file_has_a_folder_a_size_and_a_page():
    assert {file.folder for file in FILES.values()} == {"unet", "text_encoders", "vae", "clipvision", "ipadapter"}
    for file in FILES.values():
        assert 0 < file.gigabytes < 30
        assert file.page == f"https://huggingface.co/{file.repo}"


def test_every_toy_model_comes_with_the_pack():
    for name in TOY_FILES:
        assert toy(name).exists()


def test_a_pack_without_the_toy_models_says_to_clone_it(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "TOY_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="clone it"):
        toy("flux")


def test_every_example_comes_with_the_pack():
    for name in EXAMPLES:
        assert example(name).is_file()


@pytest.mark.parametrize("name", ["", "demo.png", "../README.md", "toy/README.md", "CHARACTER.PNG"])
def test_another_picture_is_no_example(name):
    with pytest.raises(ValueError, match=r"expected one of character\.png, owl\.png, monster\.png"):
        example(name)
