from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from instantcharacter.flux.sweep import cross, describe, labelled_page, parse_values

AXES = {"scale": (0.6, 0.9), "guidance": (3.5,), "seed": (1, 2**64 - 1, 3)}


def inked(page: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Whether a part of a page is not all white."""
    return bool((np.asarray(page.crop(box)) < 255).any())


@pytest.mark.parametrize(
    ("name", "text", "values"),
    [
        ("scale", "0.6, 0.9,1", (0.6, 0.9, 1.0)),
        ("guidance", "3.5", (3.5,)),
        ("seed", "7,18446744073709551615", (7, 2**64 - 1)),
    ],
)
def test_values_are_separated_by_commas(name, text, values):
    parsed = parse_values(name, text)
    assert parsed == values
    assert [type(value) for value in parsed] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "8", "'steps' cannot be crossed; expected one of scale, guidance, seed"),
        ("scale", "", "scale is ''; expected numbers separated by commas"),
        ("scale", "0.6,,0.9", "expected numbers separated by commas"),
        ("scale", "0.6;0.9", "expected numbers separated by commas"),
        ("seed", "1.5", "expected whole numbers separated by commas"),
        ("seed", "-1", "seed is -1; expected 0 to 18446744073709551615"),
        ("scale", "nan", "scale is nan; expected -10 to 10"),
        ("guidance", "3.5,101", "guidance is 101.0; expected 0 to 100"),
    ],
)
def test_other_values_are_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_values(name, text)


def test_every_combination_comes_once_and_the_last_setting_changes_first():
    settings = cross(AXES)
    assert [(cell["scale"], cell["seed"]) for cell in settings] == [
        *((0.6, seed) for seed in AXES["seed"]),
        *((0.9, seed) for seed in AXES["seed"]),
    ]
    assert {cell["guidance"] for cell in settings} == {3.5}


def test_a_label_names_every_value_exactly():
    assert describe({"scale": 0.6, "guidance": 3.0, "seed": 2**64 - 1}) == (
        "scale 0.6, guidance 3, seed 18446744073709551615"
    )


@pytest.mark.parametrize("size", [(16, 16), (256, 128), (1024, 1536)])
def test_pictures_are_in_rows_and_columns_under_their_labels(size):
    page, corners = labelled_page(AXES, size)
    assert len(corners) == len(set(corners)) == 6
    columns, rows = sorted({x for x, _ in corners}), sorted({y for _, y in corners})
    assert corners == [(x, y) for y in rows for x in columns]
    assert (len(columns), len(rows)) == (3, 2)
    for x, y in corners:
        box = (x, y, x + size[0], y + size[1])
        assert not inked(page, box)
        assert 0 < x < box[2] < page.width
        assert 0 < y < box[3] < page.height
        assert inked(page, (x, 0, x + 60, rows[0]))
    for above, row in zip((0, rows[0] + size[1]), rows):
        assert inked(page, (columns[0], above, page.width, row))
    assert all(right - left >= size[0] for left, right in pairwise(columns))


def test_labels_of_columns_do_not_run_into_each_other():
    page, corners = labelled_page({"seed": (2**64 - 1, 2**64 - 2)}, (16, 16))
    (left, top), (right, _) = corners
    assert not inked(page, (right - 8, 0, right, top))
    assert inked(page, (left, 0, right, top))
    assert inked(page, (right, 0, page.width, top))


def test_a_long_label_has_a_page_wide_enough():
    axes = {"scale": (0.6, 0.9), "guidance": (2.5, 3.5), "seed": (2**64 - 1,)}
    page, _ = labelled_page(axes, (16, 16))
    assert not inked(page, (page.width - 8, 0, page.width, page.height))
    assert page.width > 150


def test_one_combination_is_one_picture():
    page, corners = labelled_page({"scale": (0.9,)}, (64, 64))
    assert len(corners) == 1
    assert inked(page, (0, 0, page.width, corners[0][1]))


@pytest.mark.parametrize("axes", [{"seed": range(129)}, dict.fromkeys(("scale", "guidance", "seed"), range(10**4))])
def test_more_pictures_than_a_page_has_room_for_are_refused(axes):
    with pytest.raises(ValueError, match="pictures of 1024×1024; expected at most 128 of this size"):
        labelled_page(axes, (1024, 1024))
