from __future__ import annotations

from io import BytesIO
from pathlib import Path

import folder_paths
import pytest
import torch
from app.model_manager import ModelFileManager
from PIL import Image, ImageChops
from safetensors.torch import save_file
from support import recorded

from instantcharacter import Character
from instantcharacter.comfyui import library
from instantcharacter.comfyui.folders import character_file, character_folders, characters_in, inside_models
from instantcharacter.comfyui.hosting import HostedAdapter, HostedCharacter
from instantcharacter.comfyui.nodes.character import LoadCharacters, MixCharacters
from instantcharacter.files.pictures import thumbnail

PICTURE = thumbnail(recorded.PICTURE)
HOSTILE = [
    *("", ".", "..", "/", "friends", "friends/", "\0", "fox.safetensors\0", "fox", "FOX.safetensors "),
    *("../outside.safetensors", "friends/../../outside.safetensors", "..\\outside.safetensors"),
    *("friends/../fox.safetensors", "./fox.safetensors", "//fox.safetensors", "%2e%2e/outside.safetensors"),
    *("a" * 5000, "f\udcf6x.safetensors"),
]


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A folder for characters of ComfyUI's, with characters and other files in it."""
    folder = tmp_path / "characters"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "characters", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    save(tmp_path / "outside.safetensors")
    save(folder / "fox.safetensors")
    save(folder / "friends/owl.safetensors", fingerprint="other")
    save(folder / "friends/old/bear.safetensors", picture=None)
    (folder / "notes.safetensors").write_text("my notes")
    save_file({"weight": torch.zeros(1)}, folder / "style.safetensors")
    return folder


def save(path: Path, fingerprint: str = "one", picture: Image.Image | None = PICTURE) -> None:
    Character(torch.zeros(1, 9, 80), fingerprint, picture).save(path)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_list_has_characters_and_no_other_files(models):
    assert library.characters() == [
        {"name": "fox.safetensors", "adapter": "one", "has_thumbnail": True},
        {"name": "friends/old/bear.safetensors", "adapter": "one", "has_thumbnail": False},
        {"name": "friends/owl.safetensors", "adapter": "other", "has_thumbnail": True},
    ]


def test_thumbnail_is_the_saved_picture(models):
    assert Image.open(BytesIO(library.thumbnail("friends/owl.safetensors"))).tobytes() == PICTURE.tobytes()
    with pytest.raises(FileNotFoundError, match="without a thumbnail"):
        library.thumbnail("friends/old/bear.safetensors")
    with pytest.raises(ValueError, match="notes.safetensors is .*Expected a character file"):
        library.thumbnail("notes.safetensors")


def test_comfyui_s_model_library_finds_the_picture(models):
    (found,) = ModelFileManager().get_model_previews(str(models / "fox.safetensors"))
    difference = ImageChops.difference(Image.open(found), PICTURE)
    assert max(high for _, high in difference.getextrema()) < 100  # a JPEG
    assert ModelFileManager().get_model_previews(str(models / "friends/old/bear.safetensors")) == []


def test_deleted_character_leaves_file_and_list(models):
    before = files(models)
    assert library.delete("friends/owl.safetensors") == {"deleted": "friends/owl.safetensors"}
    assert files(models) == before - {"friends/owl.safetensors"}
    assert "friends/owl.safetensors" not in {character["name"] for character in library.characters()}
    with pytest.raises(FileNotFoundError, match="in none of ComfyUI's folders"):
        library.delete("friends/owl.safetensors")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_not_listed_lead_nowhere(models, name):
    before = files(models.parent)
    for function in (library.thumbnail, library.delete):
        with pytest.raises(FileNotFoundError, match="in none of ComfyUI's folders"):
            function(name)
    assert files(models.parent) == before


def test_absolute_path_leads_nowhere(models):
    for path in (models / "fox.safetensors", models.parent / "outside.safetensors"):
        for function in (library.thumbnail, library.delete):
            with pytest.raises(FileNotFoundError, match="in none of ComfyUI's folders"):
                function(str(path))
        assert path.is_file()


@pytest.mark.parametrize("name", ["notes.safetensors", "style.safetensors"])
def test_nothing_but_a_character_is_deleted(models, name):
    with pytest.raises(ValueError, match=f"{name} is not deleted, since it is not a character file"):
        library.delete(name)
    assert (models / name).is_file()


def test_links_out_of_the_folder_are_read_and_never_deleted(models):
    """A list of ComfyUI's follows links, since people link folders of other disks."""
    elsewhere = models.parent / "elsewhere"
    save(elsewhere / "moss.safetensors")
    (models / "linked").symlink_to(elsewhere)
    (models / "link.safetensors").symlink_to(models.parent / "outside.safetensors")
    before = files(models.parent)
    for name in ("linked/moss.safetensors", "link.safetensors"):
        assert library.thumbnail(name)
        with pytest.raises(PermissionError, match="link to a file elsewhere.*delete it there"):
            library.delete(name)
    assert files(models.parent) == before


def test_folder_of_characters_may_be_a_link_itself(models, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(models)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "characters", ([str(tmp_path / "link")], {".safetensors"}))
    library.delete("fox.safetensors")
    assert not (models / "fox.safetensors").exists()


def test_no_character_is_saved_through_a_link_out_of_the_folders(models, monkeypatch):
    elsewhere = models.parent / "elsewhere"
    elsewhere.mkdir()
    (models / "linked").symlink_to(elsewhere)
    (models / "link.safetensors").symlink_to(models.parent / "outside.safetensors")
    (models / "nearby").symlink_to(models / "friends")
    for name in ("linked/moss", "linked/new/moss", "link"):
        with pytest.raises(ValueError, match="a link leads from .* out of ComfyUI's model folders: name the folder"):
            character_file(name)
    assert character_file("nearby/moss") == models / "nearby/moss.safetensors"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "more", ([str(elsewhere)], set()))
    assert character_file("linked/moss") == models / "linked/moss.safetensors"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/..", "../x", "/etc/x", "..\\x", ".safetensors"])
def test_a_character_needs_a_name_inside_the_folder(models, name):
    with pytest.raises(ValueError, match="is no name for a character: expected letters, as in fox or friends/fox"):
        character_file(name)


@pytest.mark.parametrize("name", ["CON", "friends/nul", "a:b", "C:\\evil", "fox.", "friends /x", "é" * 101, "\ud800"])
def test_a_name_that_some_system_cannot_have_is_refused_on_every_system(models, name):
    with pytest.raises(ValueError, match="cannot be a file: expected"):
        character_file(name)


def test_a_typed_path_through_a_link_out_of_the_model_folders_is_refused(models, monkeypatch):
    elsewhere = models.parent / "elsewhere"
    elsewhere.mkdir()
    (models / "linked").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="a link leads from .*linked out of ComfyUI's model folders"):
        inside_models("linked")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "more", ([str(elsewhere)], set()))
    assert inside_models("linked") == models / "linked"


def test_folders_have_the_characters_below_them(models):
    assert character_folders() == ["/", "friends", "friends/old"]
    below = {"friends/owl.safetensors", "friends/old/bear.safetensors"}
    assert set(characters_in("friends")) == below
    assert set(characters_in("/")) == below | {"fox.safetensors", "notes.safetensors", "style.safetensors"}
    assert characters_in("friend") == []


def test_several_characters_are_loaded_for_their_adapter(models, adapter: HostedAdapter):
    for name in ("fox", "friends/owl"):
        save(models / f"{name}.safetensors", adapter.fingerprint)
    characters, names = LoadCharacters.run("/", adapter).result
    assert names == ["fox", "friends/owl"]
    assert [hosted.character.fingerprint for hosted in characters] == [adapter.fingerprint] * 2
    assert all(hosted.adapter is adapter for hosted in characters)
    assert LoadCharacters.run("friends", adapter).result[1] == ["friends/owl"]
    with pytest.raises(ValueError, match="of the 1 files in models/characters, folder friends/old, none is"):
        LoadCharacters.run("friends/old", adapter)


def test_a_changed_folder_loads_its_characters_anew(models):
    before = LoadCharacters.fingerprint_inputs("friends")
    assert LoadCharacters.fingerprint_inputs("friends") == before
    save(models / "friends/new.safetensors")
    assert LoadCharacters.fingerprint_inputs("friends") != before


def test_mixed_character_is_between_two(adapter, character, other_character):
    one, other = (HostedCharacter(each, adapter) for each in (character, other_character))
    mixed = MixCharacters.run(one, other, 0.5).result[0]
    assert mixed.adapter is adapter
    assert recorded.error(mixed.character.fused, (character.fused + other_character.fused) / 2) < 1e-6
