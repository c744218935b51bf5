"""The table of strengths, of few pictures in few steps."""

from __future__ import annotations

import pytest
import torch

from instantcharacter import Strength
from instantcharacter.files import catalog
from toy.evaluate import strengths
from toy.evaluate.strengths import gain

NAMES = ["0.6:1.2:0.6", "0.4", "1.2", "0.9:0.9:0.9, double 0.0, single 1.3"]


@pytest.mark.slow
def test_constants_come_first_and_the_others_have_gains_over_them():
    rows = dict(strengths.evaluate(catalog.TOY_FOLDER, NAMES, count=2, steps=3))
    assert list(rows) == ["0.4", "1.2", "0.6:1.2:0.6", "0.9:0.9:0.9, double 0.0, single 1.3"]
    assert [("gain in likeness" in row) for row in rows.values()] == [False, False, True, True]
    assert len({row["likeness"] for row in rows.values()}) == 4
    assert all(set(strengths.FIGURES) <= set(row) for row in rows.values())


def answers(prompt: float, likeness: float) -> dict[str, torch.Tensor]:
    """Of 100 pictures around these means, by the same amounts in each."""
    spread = torch.linspace(-0.05, 0.05, 100)
    return {"prompt": prompt + spread, "likeness": likeness - spread}


@pytest.mark.parametrize(
    ("prompt", "likeness", "expected"), [(0.9, 0.7, 0.0), (0.9, 0.8, 0.1), (0.85, 0.75, 0.0), (0.99, 0.5, 0.0)]
)
def test_a_gain_is_beyond_the_constants_with_the_same_prompt(prompt, likeness, expected):
    constants = [answers(0.98, 0.5), answers(0.9, 0.7), answers(0.8, 0.8)]
    difference, error = gain("likeness", answers(prompt, likeness), constants)
    assert difference == pytest.approx(expected, abs=1e-6)
    assert error < 0.02


def test_a_constant_that_loses_on_both_does_not_count():
    constants = [answers(0.96, 0.7), answers(0.97, 0.75), answers(0.9, 0.78)]
    for prompt in (0.96, 0.965, 0.97):
        assert gain("likeness", answers(prompt, 0.76), constants)[0] == pytest.approx(0.01, abs=1e-6)


def test_names_are_what_the_command_line_takes():
    assert strengths.STRENGTHS["0.9"] == 0.9
    assert strengths.STRENGTHS["1.2:0.9:0.6"] == Strength(1.2, 0.9, 0.6)
    assert strengths.STRENGTHS["0.9:0.9:0.9, double 1.5, single 0.7"] == Strength(0.9, 0.9, 0.9, 1.5, 0.7)
