"""The table of what blurs, of few pictures in few steps."""

from __future__ import annotations

import random
from dataclasses import astuple

import pytest
import torch
from safetensors.torch import save_file

from instantcharacter.files import catalog
from toy.evaluate import traits
from toy.evaluate.trait_judge import COLOURS, DISCRETE, SIZES, TraitJudge
from toy.world import MONSTER

ROWS = [
    *("drawn by code", "VAE", "FLUX, half of the steps", "FLUX", "FLUX, guidance 1"),
    *("adapter 0.9", "adapter 0.9, guidance 1"),
    *("pixel art, drawn by code", "pixel art, VAE", "pixel art, LoRA", "pixel art, LoRA, adapter 0.9"),
]


def test_characters_alike_share_shape_and_colour_and_no_combination():
    characters = traits.alike(random.Random(0), MONSTER, 63)
    assert len(characters) == len(set(characters)) == 63
    shared = (MONSTER.shape, MONSTER.hue, MONSTER.paleness)
    assert {(other.shape, other.hue, other.paleness) for other in characters} == {shared}
    assert astuple(MONSTER)[:5] not in {astuple(other)[:5] for other in characters}
    assert {other.held_out for other in characters} == {False, True}


def test_a_missing_judge_is_named_before_any_other_model_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="trait_judge"):
        next(traits.evaluate(tmp_path, tmp_path, tmp_path / "trait_judge.safetensors", count=2, steps=2))


@pytest.mark.slow
def test_rows_have_every_trait_and_what_became_of_the_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(traits, "ALIKE", 3)
    torch.manual_seed(0)
    save_file(TraitJudge().state_dict(), tmp_path / "judge.safetensors")
    toys = catalog.TOY_FOLDER, catalog.toy("adapter"), tmp_path / "judge.safetensors"
    rows = dict(traits.evaluate(*toys, count=2, steps=2))
    assert list(rows) == ROWS
    wanted = {*DISCRETE, *COLOURS, *SIZES, "traits", "identity of 16", "identity of 3 alike", "sharpness", "pixel art"}
    assert all(wanted < set(row) for row in rows.values())
    for prefix in ("", "pixel art, "):
        code, vae = rows[prefix + "drawn by code"], rows[prefix + "VAE"]
        assert code["sharpness"] == 1 and code["pixels off"] == 0
        assert code["identity of 16"] == 1
        assert 0.3 < vae["sharpness"] < 1 and 0 < vae["pixels off"] < 0.05
    assert rows["drawn by code"]["pixel art"] == 0
    assert rows["pixel art, drawn by code"]["on a grid"] == pytest.approx(1)
    half, whole = rows["FLUX, half of the steps"], rows["FLUX"]
    assert rows["VAE"]["pixels off"] < half["pixels off"] < whole["pixels off"]
    assert len({row["pixels off"] for row in rows.values()}) == len(ROWS) - 1  # of code both are 0
