"""Two characters in one picture: who is found in each half, and the table of few pictures in few steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instantcharacter.files import catalog
from toy.evaluate import two
from toy.evaluate.measure import Toy, to_tensors
from toy.world import SIDE

REFERENCES = torch.eye(25)


@pytest.mark.parametrize("side", [0, 1])
def test_each_half_is_compared_with_its_own_the_other_and_more(side):
    """Of ten pictures; picture i has characters i and i + 1, and its candidates end with i + 15."""
    own, other, last = (REFERENCES[first : first + 10] for first in (side, 1 - side, 15))
    for halves, expected in ((own, 0), (other, 1), (last, two.AMONG - 1)):
        assert two.nearest(halves, REFERENCES[:25], side).tolist() == [expected] * 10


def test_masks_are_the_halves():
    left, right = (np.asarray(mask) for mask in two.MASKS)
    assert (left[:, : SIDE // 2] == 255).all() and (left[:, SIDE // 2 :] == 0).all()
    assert (left ^ right == 255).all()


def test_pictures_that_code_draws_have_both_and_swapped_ones_have_the_others():
    toy = Toy.load(catalog.TOY_FOLDER)
    pairs = two.Pairs.random(toy, 8, "test")
    pictures = to_tensors([shot.draw() for shot in pairs.shots])
    figures = two.judged(toy, pairs, pictures)
    assert figures["own"] > 0.9 and figures["both"] > 0.9 and figures["other"] == 0
    swapped = two.judged(toy, pairs, torch.cat([*reversed(pictures.chunk(2, dim=-1))], dim=-1))
    assert swapped["other"] > 0.9 and swapped["both"] > 0.9 and swapped["own"] == 0


def test_every_row_differs_from_the_one_with_masks_or_without_in_one_thing():
    bases = [two.CASES[name] for name in ("in masks", "no masks")]
    for name, case in two.CASES.items():
        changed = [
            sum(getattr(base, field) != getattr(case, field) for field in ("subjects", "scale", "guidance", "two"))
            for base in bases
        ]
        assert min(changed) == (case not in bases), name


@pytest.mark.slow
def test_rows_say_who_is_in_each_half_and_what_they_do():
    names = ["in masks", "in masks, guidance 1.5", "left alone in its mask", "no masks, the prompt says one", "plain"]
    adapter = catalog.TOY_FOLDER / "adapter.safetensors"
    rows = dict(two.evaluate(catalog.TOY_FOLDER, adapter, names, count=2, steps=2, seed="test"))
    assert list(rows) == ["drawn by code", *names]
    for row in rows.values():
        assert {"own", "other", "both", "left", "right", "action", "scene"} <= set(row)
        assert all(0 <= value <= 1 for value in row.values())
