"""The tables of mixes and views, of few pictures in few steps."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from instantcharacter.files import catalog
from toy.evaluate import mixing
from toy.evaluate.measure import Toy
from toy.world import MONSTER, draw_reference, random_traits


@pytest.mark.slow
def test_rows_go_from_one_character_to_the_other(monkeypatch):
    monkeypatch.setattr(mixing, "WEIGHTS", (0.0, 1.0))
    evaluation = mixing.Evaluation(catalog.TOY_FOLDER, count=4, steps=6)
    rows = dict(evaluation.mixes(["fused"]))
    assert list(rows) == ["read rightly", "fused 0.0", "fused 1.0"]
    first, last = rows["fused 0.0"], rows["fused 1.0"]
    assert first["A"] > 0.5 > first["B"]
    assert last["B"] > 0.5 > last["A"]
    assert first["hue to B"] < 0.3 < 0.7 < last["hue to B"]


@pytest.mark.slow
def test_views_are_measured_in_every_way():
    rows = dict(mixing.Evaluation(catalog.TOY_FOLDER, count=2, steps=2).views())
    ways = ("1 view", "2 together", "mean of 2", "3 together", "mean of 3")
    assert list(rows) == [f"{kind}, {way}" for kind in ("cut out", "in scenes") for way in ways]
    assert all({"identity", "action", "similarity"} <= set(row) for row in rows.values())


def test_traits_are_read_from_drawn_references():
    other = replace(
        random_traits(random.Random(2), held_out=True), shape="tall", hat="crown", pattern="stripes", hue=0.0
    )
    reader = mixing.TraitReader(Toy.load(catalog.TOY_FOLDER), [(MONSTER, other)])
    mixed = replace(MONSTER, hat="crown")
    for traits, expected in ((MONSTER, set()), (other, {"shape", "hat", "pattern"}), (mixed, {"hat"})):
        (row,) = reader.from_b(mixing.to_tensors([draw_reference(traits)]))
        assert {name for name, is_b in row.items() if is_b} == expected
