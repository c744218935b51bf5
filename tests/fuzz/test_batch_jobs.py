"""Files of jobs: whatever is in them, good lines are read and bad ones are named, each with one line of text."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import recorded

from instantcharacter.batch.jobs import FIELDS, read_jobs

ODD = ["", " ", "a|b", "|", "\0", "..", "nan", "inf", "-1", "1e999", "0x10", "1:2:3", "64x64", "99999999999x16"]
ODD += ["a:b:nan", "\ud800", "a.png", "../a.png", "C:\\a.png", "x" * 5000, "~", "/dev/null"]
ODD += [str(recorded.PICTURE), str(recorded.LORA)]
TEXTS = st.text(max_size=20) | st.sampled_from(ODD)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)
ROWS = st.dictionaries(st.sampled_from([*FIELDS, "colour", ""]), VALUES, max_size=6)
GOOD = {"prompt": "a fox", "reference": str(recorded.PICTURE)}


def is_right(rows: int | None = None) -> Any:
    """Whether every line is a job or a bad line with a printable reason, and none is both."""

    def check(result: Any) -> bool:
        jobs, bad = result
        lines = [*(job.line for job in jobs), *(line for line, _ in bad)]
        readable = all(fault.strip() and "\n" not in fault and fault.encode() for _, fault in bad)
        return readable and len(set(lines)) == len(lines) and (rows is None or len(lines) == rows)

    return check


@pytest.mark.parametrize("name", ["jobs.jsonl", "jobs.csv"])
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: f"prompt,seed\n{text}".encode(errors="replace"))
)
def test_any_file(tmp_path, outcomes, name, content):
    (tmp_path / name).write_bytes(content)
    outcomes.judge(lambda: read_jobs(tmp_path / name), is_right())


@given(rows=st.lists(ROWS | ROWS.map(lambda row: {**row, **GOOD}), min_size=1, max_size=5))
def test_any_values(tmp_path, outcomes, rows):
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    outcomes.judge(lambda: read_jobs(path), is_right(len(rows)))


@given(cells=st.lists(st.tuples(st.sampled_from([*FIELDS]), TEXTS), max_size=5, unique_by=lambda cell: cell[0]))
def test_any_cells(tmp_path, outcomes, cells):
    path, row = tmp_path / "jobs.csv", {**GOOD, **dict(cells)}
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        csv.writer(file).writerows([[*row], [*row.values()]])
    outcomes.judge(lambda: read_jobs(path), is_right())
