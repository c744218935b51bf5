from __future__ import annotations

import pytest

from instantcharacter.training.data.samples import BadSample
from instantcharacter.training.data.tally import Tally


def test_more_than_one_bad_sample_in_a_hundred_ends_the_training():
    tally = Tally()
    for _ in range(98):
        tally.count()
    tally.count(BadSample("a.png: not a picture"))
    with pytest.raises(ValueError, match=r"2 of 100 samples are bad.*\na.png: not a picture\nb.png: gone"):
        tally.count(BadSample("b.png: gone"))


def test_a_bad_sample_is_warned_of_once(caplog):
    tally = Tally()
    for _ in range(250):
        tally.count()
    for _ in range(2):
        tally.count(BadSample("a.png: gone"))
    assert (tally.seen, tally.bad) == (252, ["a.png: gone"] * 2)
    assert [record.message for record in caplog.records] == ["skipped a.png: gone"]
