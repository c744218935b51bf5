"""The judge itself: each outcome is told from the others."""

from __future__ import annotations

import json
import time

import pytest
from support import fuzzing
from support.fuzzing import Outcomes

from instantcharacter.files.reading import read_json
from instantcharacter.values import check_choice


def hang():
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("call", "is_right", "expected"),
    [
        (lambda path: path.write_text("[]") and read_json(path), lambda _: True, "clear"),
        (lambda path: json.loads("{"), lambda _: True, "raw"),
        (lambda path: 1, lambda result: result == 1, "right"),
        (lambda path: 1, lambda result: result == 2, "wrong"),
        (lambda path: hang(), lambda _: True, "hang"),
    ],
)
def test_an_outcome_is_told_from_the_others(tmp_path, monkeypatch, call, is_right, expected):
    monkeypatch.setattr(fuzzing, "LIMIT", 0.2)
    outcomes = Outcomes()
    if expected in ("right", "clear"):
        assert outcomes.judge(lambda: call(tmp_path / "a.json"), is_right) == expected
    else:
        with pytest.raises(AssertionError, match=f"^{expected}: "):
            outcomes.judge(lambda: call(tmp_path / "a.json"), is_right)
    assert outcomes.counts == {expected: 1}


def test_a_raw_error_may_be_listed():
    assert Outcomes(("Expecting property name",)).judge(lambda: json.loads("{")) == "raw"


def test_an_error_that_cannot_be_logged_is_not_clear():
    outcome, _ = fuzzing.outcome_of(lambda: check_choice("\ud800", "a", ["b"]), lambda _: True)
    assert outcome == "raw"
