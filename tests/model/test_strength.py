from __future__ import annotations

import re

import pytest

from instantcharacter import Strength
from instantcharacter.model.strength import has_effect, scales_at


def test_it_runs_in_straight_lines_from_start_through_middle_to_end():
    strength = Strength(1.25, 1.0, 0.5)
    assert [strength.at(progress)[0] for progress in (0, 0.25, 0.5, 0.75, 1)] == [1.25, 1.125, 1.0, 0.75, 0.5]


def test_kinds_of_blocks_have_factors_of_their_own():
    strength = Strength(1.0, 1.0, 0.5, double_blocks=0.5, single_blocks=2)
    assert strength.at(0) == (0.5, 2)
    assert strength.at(1) == (0.25, 1)


def test_a_constant_is_exact_at_every_step():
    strength = Strength(0.9, 0.9, 0.9)
    assert {strength.at(i / 28) for i in range(29)} == {(0.9, 0.9)} == {scales_at(0.9, i / 28) for i in range(29)}
    assert strength.is_constant
    assert not Strength(0.9, 0.9, 0.8).is_constant
    assert not Strength(0.8, 0.9, 0.8).is_constant


def test_a_factor_multiplies_the_steps_and_not_the_blocks():
    assert Strength(1.0, 0.5, 0.25, 2, 3) * 2 == Strength(2.0, 1.0, 0.5, 2, 3)
    assert (Strength(1, 1, 1) * 0.9).at(0.3) == (0.9, 0.9)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        *[(0, False), (0.0, False), (-0.5, True), (0.9, True)],
        *[(Strength(0, 0, 0), False), (Strength(0, 0, 0.1), True), (Strength(0, 1, 0), True)],
        *[(Strength(1, 1, 1, 0, 0), False), (Strength(1, 1, 1, 0, 1), True), (Strength(1, 1, 1, 1, 0), True)],
    ],
)
def test_it_has_an_effect_unless_it_is_zero_everywhere(scale, expected):
    assert has_effect(scale) is expected


@pytest.mark.parametrize("name", ["start", "middle", "end", "double_blocks", "single_blocks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1e30, "0.9", None, True])
def test_values_that_are_no_strength_are_refused(name, value):
    values = {"start": 1.0, "middle": 1.0, "end": 1.0, name: value}
    with pytest.raises(
        ValueError, match=re.escape(f"strength's {name} is {value!r}; expected a finite number from 0 to 10")
    ):
        Strength(**values)
