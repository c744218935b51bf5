from __future__ import annotations

import numpy as np
import pytest
import torch

from instantcharacter.values import check_choice, check_count, check_number, shown

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_numbers_within_their_bounds_pass(value):
    check_number("scale", value, 0, 1)


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, NAN, INF, 10**400, "0.5", None, True, [0.5], 1j, np.ones(1), torch.ones(1)]
)
def test_others_are_refused_as_numbers(value):
    with pytest.raises(ValueError, match="^scale is .*; expected a finite number from 0 to 1$"):
        check_number("scale", value, 0, 1)


def test_counts_are_whole_numbers():
    for value in (1, 512, np.int32(8)):
        check_count("steps", value, 1, 512)
    for value in (0, 513, 8.0, np.float64(8), True, "8", None, NAN, 10**5000):
        with pytest.raises(ValueError, match="^steps is .*; expected a whole number from 1 to 512$"):
            check_count("steps", value, 1, 512)


def test_a_choice_is_one_of_some_texts():
    check_choice("fit", "pad", ("pad", "stretch"))
    for value in ("crop", None, [], np.array(["pad", "stretch"]), {}):
        with pytest.raises(ValueError, match="^fit is .*; expected one of pad, stretch$"):
            check_choice("fit", value, ("pad", "stretch"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        (0.5, "0.5"),
        (np.float32(0.5), "0.5"),
        ("fox \ud800", "'fox \\ud800'"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        ([1, 2], "a list of 2"),
        (object(), "a object"),
        (torch.zeros(1, 2), "a Tensor [1, 2] in torch.float32"),
        (np.zeros(3), "a ndarray [3] in float64"),
    ],
)
def test_a_value_in_a_message_is_short_and_can_be_printed(value, expected):
    assert shown(value) == expected
    assert shown(value).isascii()


def test_a_number_that_python_does_not_print_is_counted():
    assert shown(10**5000) == "a number of 16610 bits"
