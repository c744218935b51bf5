from __future__ import annotations

from pathlib import Path

from instantcharacter.files.catalog import FILES
from instantcharacter.files.folders import find, model_folders, save_folder

ADAPTER = FILES["adapter"]


def touch(path: Path) -> None:
    """Make an empty file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_files_are_found_under_each_of_their_names(tmp_path):
    file = FILES["dinov2"]
    other = tmp_path / "elsewhere/encoders"
    other.mkdir(parents=True)
    assert find(file, {"clip_vision": [tmp_path, tmp_path / "nowhere"]}) is None
    (other / "dinov2-giant.safetensors").touch()
    assert find(file, {"clip_vision": [tmp_path]}) == other / "dinov2-giant.safetensors"
    (tmp_path / "dinov2-giant").mkdir()
    (tmp_path / "dinov2-giant/model.safetensors").touch()
    assert find(file, {"clip_vision": [tmp_path]}) == tmp_path / "dinov2-giant/model.safetensors"


def test_another_models_file_of_the_same_name_is_not_found(tmp_path):
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip/model.safetensors").touch()
    assert find(FILES["dinov2"], {"clip_vision": [tmp_path]}) is None


def test_files_are_found_through_links(tmp_path):
    models, disk = tmp_path / "models", tmp_path / "disk"
    touch(disk / "vision/dinov2-giant/model.safetensors")
    touch(disk / "blob")
    for folder in ("ipadapter", "clip_vision"):
        (models / folder).mkdir(parents=True)
    (models / "clipvision").symlink_to(models / "clip_vision")
    (models / "clip_vision/disk").symlink_to(disk / "vision")
    (models / "ipadapter" / ADAPTER.path).symlink_to(disk / "blob")
    assert find(FILES["dinov2"], model_folders(models)) == models / "clipvision/disk/dinov2-giant/model.safetensors"
    assert find(ADAPTER, model_folders(models)) == models / "ipadapter" / ADAPTER.path
    (disk / "blob").unlink()
    assert find(ADAPTER, model_folders(models)) is None


def test_links_in_circles_are_followed_once(tmp_path):
    for one, other in (("a", "b"), ("b", "a")):
        for name in ("left", "right"):
            (tmp_path / one).mkdir(exist_ok=True)
            (tmp_path / one / name).symlink_to(tmp_path / other)
    assert find(ADAPTER, {"ipadapter": [tmp_path]}) is None
    touch(tmp_path / "a" / ADAPTER.path)
    assert find(ADAPTER, {"ipadapter": [tmp_path / "b"]}).resolve() == tmp_path / "a" / ADAPTER.path


def test_files_are_saved_to_the_first_folder_of_their_name(tmp_path):
    folders = {"clipvision": [tmp_path / "a/clip_vision", tmp_path / "b/clipvision"], "clip_vision": []}
    assert save_folder(FILES["siglip"], folders, tmp_path) == tmp_path / "b/clipvision"
    assert save_folder(ADAPTER, folders, tmp_path) == tmp_path / "ipadapter"
