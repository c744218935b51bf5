"""Characters: what is loaded is what the file says, and finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from support import mutations

from instantcharacter import Character
from instantcharacter.model.character import summary

FUSED = torch.linspace(-2, 2, 24).reshape(1, 6, 4)
METADATA = {"format": "instantcharacter.character", "fingerprint": "0123456789abcdef" * 2}
GOOD = save({"fused": FUSED, "thumbnail": torch.zeros(8, 8, 3, dtype=torch.uint8)}, METADATA)
SHAPES = [(1, 6, 4), (2, 6, 4), (0, 6, 4), (1, 0, 4), (1, 6, 0), (6, 4), (), (1, 1, 6, 4), (7, 6, 4)]
THUMBNAILS = [(8, 8, 3), (8, 8), (8, 8, 4), (8, 8, 5), (8, 8, 1), (3, 8, 8), (0, 8, 3), (), (1, 8, 8, 3), (1, 9000, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def load_and_save(path) -> tuple[Character, Character]:
    """A character, and its copy after it is saved and loaded again."""
    summary(path)
    character = Character.load(path)
    character.save(path.with_name("copy.safetensors"))
    return character, Character.load(path.with_name("copy.safetensors"))


def is_right(data: bytes):
    def judge(characters: tuple[Character, Character]) -> bool:
        character, copy = characters
        stated = mutations.content_of_safetensors(data)["fused"]
        return mutations.same(character.fused, stated) and mutations.finite(character.fused) and character.is_same(copy)

    return judge


@given(st.data())
def test_changed_characters(outcomes, tmp_path, data):
    changed = data.draw(mutations.edited_safetensors(GOOD))
    path = tmp_path / "fox.safetensors"
    outcomes.judge(mutations.write(path, changed, load_and_save), is_right(changed))
    assert changed != GOOD or outcomes.counts["right"]


@given(st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(THUMBNAILS), st.sampled_from(DTYPES))
def test_characters_of_other_kinds(outcomes, tmp_path, shape, dtype, thumbnail, thumbnail_dtype):
    tensors = {"fused": torch.ones(shape).to(dtype), "thumbnail": torch.ones(thumbnail).to(thumbnail_dtype)}
    good = len(shape) == 3 and shape[0] == 1 and all(shape) and dtype.is_floating_point

    def is_right(characters: tuple[Character, Character]) -> bool:
        character, copy = characters
        return (
            good
            and torch.equal(character.fused, tensors["fused"])
            and (character.thumbnail is None) == (copy.thumbnail is None)
        )

    call = mutations.write(tmp_path / "fox.safetensors", save(tensors, METADATA), load_and_save)
    assert outcomes.judge(call, is_right) == ("right" if good else "clear")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_numbers_that_are_not_finite_are_refused(tmp_path, number):
    fused = FUSED.clone()
    fused[0, 3, 2] = number
    (tmp_path / "fox.safetensors").write_bytes(save({"fused": fused}, METADATA))
    with pytest.raises(ValueError, match=r"fox.safetensors is damaged: a character's features .*expected finite ones"):
        Character.load(tmp_path / "fox.safetensors")


def test_a_good_character_is_right(outcomes, tmp_path):
    call = mutations.write(tmp_path / "fox.safetensors", GOOD, load_and_save)
    assert outcomes.judge(call, is_right(GOOD)) == "right"
    assert isinstance(Character.load(tmp_path / "fox.safetensors").thumbnail, Image.Image)
