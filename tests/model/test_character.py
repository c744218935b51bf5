from __future__ import annotations

import base64
import json
from io import BytesIO

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import save_file
from support import recorded

from instantcharacter import Character, CharacterFeatures
from instantcharacter.files.pictures import thumbnail
from instantcharacter.model.character import summary


def test_character_is_the_fused_features(adapter):
    features = recorded.features(tokens=9)
    character = adapter.create_character(CharacterFeatures(*features))
    assert torch.equal(character.fused, adapter.projector.fuse(*features))
    assert character.fingerprint == adapter.fingerprint()


def test_views_of_one_character_are_read_together(adapter):
    views = [CharacterFeatures(*recorded.features(tokens=9, seed=seed)) for seed in (1, 2)]
    character = adapter.create_character(*views)
    apart = [adapter.create_character(view).fused for view in views]
    assert torch.equal(character.fused, torch.cat(apart, dim=1))
    timestep = torch.tensor([500.0])
    together, first = (adapter.projector.resample(fused, timestep) for fused in (character.fused, apart[0]))
    assert together.shape == first.shape
    assert recorded.error(together, first) > 1e-3


def test_thumbnail_is_kept_with_the_character(adapter, tmp_path):
    features = CharacterFeatures(*recorded.features(tokens=9))
    adapter.create_character(features, picture=recorded.PICTURE).save(tmp_path / "fox.safetensors")
    loaded = Character.load(tmp_path / "fox.safetensors").thumbnail
    assert loaded.tobytes() == thumbnail(recorded.PICTURE).tobytes()
    adapter.create_character(features).save(tmp_path / "unknown.safetensors")
    assert Character.load(tmp_path / "unknown.safetensors").thumbnail is None


def test_file_has_its_thumbnail_where_comfyui_looks_for_a_cover(character, tmp_path):
    character.thumbnail = thumbnail(recorded.PICTURE)
    character.save(tmp_path / "fox.safetensors")
    with safe_open(tmp_path / "fox.safetensors", "pt") as file:
        (cover,) = json.loads(file.metadata()["ssmd_cover_images"])
    picture = Image.open(BytesIO(base64.b64decode(cover)))
    difference = ImageChops.difference(picture.convert("L"), character.thumbnail.convert("L"))
    assert sum(difference.histogram()[32:]) < 0.02 * picture.width * picture.height  # a JPEG
    Character(character.fused, character.fingerprint).save(tmp_path / "unknown.safetensors")
    with safe_open(tmp_path / "unknown.safetensors", "pt") as file:
        assert "ssmd_cover_images" not in file.metadata()


def test_summary_is_read_from_the_header(adapter, character, tmp_path):
    character.thumbnail = thumbnail(recorded.PICTURE)
    character.save(tmp_path / "fox.safetensors")
    assert summary(tmp_path / "fox.safetensors") == (character.fingerprint, True)
    Character(character.fused, "0" * 32).save(tmp_path / "unknown.safetensors")
    assert summary(tmp_path / "unknown.safetensors") == ("0" * 32, False)
    adapter.save(tmp_path / "adapter.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("some text, not tensors")
    for name in ("adapter", "empty", "text"):
        assert summary(tmp_path / f"{name}.safetensors") is None
    with pytest.raises(FileNotFoundError, match="Expected a character file"):
        summary(tmp_path / "gone.safetensors")


def test_mixed_character_is_the_weighted_mean(character):
    white, black = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    other = Character(character.fused + 4, character.fingerprint, black)
    character.thumbnail = white
    mixed = character.mix(other, 0.25)
    assert recorded.error(mixed.fused, character.fused + 1) < 1e-6
    assert mixed.fingerprint == character.fingerprint
    assert mixed.thumbnail.getpixel((0, 0)) == (191, 191, 191)
    assert character.mix(other, 0).is_same(character)
    assert character.mix(other, 1).is_same(other)
    other.thumbnail = None
    assert character.mix(other, 0.25).thumbnail is white


def test_only_characters_of_one_adapter_and_size_are_mixed(character):
    with pytest.raises(ValueError, match="made by different adapters.*cannot be mixed"):
        character.mix(Character(character.fused, "0" * 32), 0.5)
    with pytest.raises(ValueError, match="feature tokens, and cannot be mixed"):
        character.mix(Character(torch.cat([character.fused] * 2, dim=1), character.fingerprint), 0.5)
    for weight in (-0.1, 1.1, float("nan"), "0.5", None):
        with pytest.raises(
            ValueError, match="weight of the second character is .*; expected a finite number from 0 to 1"
        ):
            character.mix(character, weight)
    with pytest.raises(ValueError, match="mixed with a Tensor .*; expected another character"):
        character.mix(character.fused, 0.5)


def test_thumbnails_of_other_sizes_and_modes_are_mixed(character):
    other = Character(character.fused, character.fingerprint, Image.new("L", (9, 5)))
    character.thumbnail = Image.new("RGB", (8, 8), "white")
    assert character.mix(other, 0.5).thumbnail.size == (8, 8)
    other.thumbnail = Image.new("RGB", (0, 4))
    assert character.mix(other, 0.5).thumbnail is character.thumbnail


@pytest.mark.parametrize(
    "fused",
    [
        *[torch.zeros(shape) for shape in ((0, 3, 80), (2, 3, 80), (1, 0, 80), (3, 80))],
        *[torch.full((1, 3, 80), value) for value in (float("nan"), float("inf"), 1e30)],
        *[torch.zeros(1, 3, 80, dtype=torch.int64), torch.zeros(1, 3, 80, device="meta"), None, [[[0.0]]]],
    ],
)
def test_features_of_another_shape_or_kind_or_not_finite_are_refused(fused):
    with pytest.raises(ValueError, match="a character's features"):
        Character(fused, "0" * 32)


def test_features_that_changed_in_place_are_refused_when_they_are_used(character):
    character.fused = character.fused.clone()
    character.fused[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="a character's features has values from nan to nan; expected finite ones"):
        character.check_made_by(character.fingerprint)


def test_character_of_no_picture_is_refused(adapter):
    with pytest.raises(ValueError, match="at least one picture"):
        adapter.create_character()


def test_saved_character_is_loaded(character, tmp_path):
    character.save(tmp_path / "fox.safetensors")
    loaded = Character.load(tmp_path / "fox.safetensors")
    assert torch.equal(loaded.fused, character.fused)
    assert loaded.fingerprint == character.fingerprint


def test_released_size_is_about_8_mb(tmp_path):
    Character(torch.zeros(1, 1458, 2688, dtype=torch.bfloat16), "0" * 32).save(tmp_path / "a.safetensors")
    assert 7.5e6 < (tmp_path / "a.safetensors").stat().st_size < 8.5e6


def test_other_files_are_refused(adapter, tmp_path):
    save_file({"fused": torch.zeros(1, 2, 3)}, tmp_path / "no_metadata.safetensors")
    adapter.save(tmp_path / "adapter.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("some text, not tensors")
    for name in ("no_metadata", "adapter", "empty", "text"):
        with pytest.raises(ValueError, match=rf"{name}.safetensors is .*Expected a character file"):
            Character.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="Expected a character file"):
        Character.load(tmp_path / "gone.safetensors")


def test_nothing_but_a_character_is_replaced(adapter, character, tmp_path):
    adapter.save(tmp_path / "adapter.safetensors")
    (tmp_path / "text.safetensors").write_text("my notes")
    for name in ("adapter", "text"):
        before = (tmp_path / f"{name}.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match=f"{name}.safetensors is there already and is not a character"):
            character.save(tmp_path / f"{name}.safetensors")
        assert (tmp_path / f"{name}.safetensors").read_bytes() == before
    Character(character.fused + 1, "0" * 32).save(tmp_path / "fox.safetensors")
    character.save(tmp_path / "fox.safetensors")
    assert Character.load(tmp_path / "fox.safetensors").fingerprint == character.fingerprint


def test_cut_off_character_is_refused(character, tmp_path):
    character.save(tmp_path / "fox.safetensors")
    whole = (tmp_path / "fox.safetensors").read_bytes()
    (tmp_path / "fox.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="cut off"):
        Character.load(tmp_path / "fox.safetensors")


def test_features_of_another_width_are_refused(adapter):
    with pytest.raises(ValueError, match=r"expected three of \[batch, tokens, 80\]"):
        adapter.create_character(CharacterFeatures(*recorded.features(tokens=9, width=64)))


def test_several_pictures_at_once_are_refused(adapter):
    features = [tensor.expand(2, -1, -1) for tensor in recorded.features(tokens=9)]
    with pytest.raises(ValueError, match="one picture, not of 2"):
        adapter.create_character(CharacterFeatures(*features))


@pytest.mark.parametrize("fused", [torch.zeros(9, 80), torch.zeros(2, 9, 80), torch.zeros(1, 9, 80, dtype=torch.int64)])
def test_fused_features_of_another_shape_or_dtype_are_refused(tmp_path, fused):
    metadata = {"format": "instantcharacter.character", "fingerprint": "0" * 32}
    save_file({"fused": fused}, tmp_path / "fox.safetensors", metadata)
    with pytest.raises(ValueError, match=r"fox.safetensors is damaged: .*expected a tensor \[1, any, any\]"):
        Character.load(tmp_path / "fox.safetensors")


def test_a_character_of_another_adapter_is_refused(character):
    character.check_made_by(character.fingerprint)
    with pytest.raises(ValueError, match="Make it again from its picture"):
        character.check_made_by("0" * 32)
