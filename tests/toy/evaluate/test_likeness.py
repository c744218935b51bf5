"""The table of what makes a picture more like its character, of few pictures in few steps."""

from __future__ import annotations

import numpy as np
import pytest

from instantcharacter.files import catalog
from toy.evaluate import likeness
from toy.world import MONSTER, SIDE, draw_reference

ROWS = ["scale 1.2", "guidance 1.5", "end 0.5", "busy ground", "standing, waving, jumping"]


def test_the_first_row_is_of_the_worlds_own_references():
    assert likeness.CASES[likeness.BASE].views == (likeness.alone,)
    assert likeness.alone(MONSTER).tobytes() == draw_reference(MONSTER).tobytes()


def test_every_row_differs_from_the_first_in_one_thing():
    base = likeness.CASES[likeness.BASE]
    for name, case in likeness.CASES.items():
        changed = [getattr(case, field) != getattr(base, field) for field in ("views", "scale", "end", "guidance")]
        assert sum(changed) == (name != likeness.BASE), name


def test_cut_out_has_the_figure_of_the_busy_picture_and_nothing_of_its_ground():
    busy, cut = (np.asarray(view(MONSTER), dtype=int) for view in (likeness.busy, likeness.cut))
    assert (busy[0] < 255).any(axis=1).all()
    assert (cut[[0, -1]] == 255).all() and (cut[:, [0, -1]] == 255).all()
    alone = np.asarray(likeness.alone(MONSTER))
    height = np.ptp(np.nonzero((alone < 250).any(axis=(1, 2)))[0])
    assert np.ptp(np.nonzero((cut < 250).any(axis=(1, 2)))[0]) == pytest.approx(height, abs=2)


def test_other_references_are_as_large():
    for case in likeness.CASES.values():
        for view in case.views:
            picture = view(MONSTER)
            assert picture.mode == "RGB" and picture.width == picture.height <= SIDE + 20


@pytest.mark.slow
def test_rows_have_what_is_right_and_its_difference_from_the_first():
    rows = dict(likeness.evaluate(catalog.TOY_FOLDER, ROWS, count=2, steps=2))
    assert list(rows) == [likeness.BASE, *ROWS]
    base = rows.pop(likeness.BASE)
    questions = {"similarity", "identity", "action", "scene", "style"}
    assert set(base) == questions | {f"± {question}" for question in questions}
    assert all(base[f"± {question}"] == 0 for question in questions)
    for row in rows.values():
        assert row["± similarity"] > 0
        assert all(0 <= row[question] <= 1 for question in questions - {"similarity"})
