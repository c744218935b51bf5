from __future__ import annotations

import pytest

from instantcharacter.batch.rows import BadLine, read_rows


@pytest.fixture
def rows(tmp_path):
    """Reads a file of this name with this content."""

    def read(name: str, content: str | bytes) -> list:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_rows(path))

    return read


def test_json_lines_and_csv_have_the_same_rows(rows):
    expected = [(2, {"prompt": "a fox, asleep", "seed": "5"}), (4, {"prompt": "an owl"})]
    assert rows("a.csv", 'prompt,seed\r\n"a fox, asleep",5\r\n\r\nan owl,\r\n') == expected
    assert rows("a.jsonl", '\n{"prompt": "a fox, asleep", "seed": "5"}\n \n{"prompt": "an owl"}') == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_every_unicode_encoding_is_read(rows, encoding):
    assert rows("a.jsonl", '{"prompt": "狐狸\u2028 x"}\n'.encode(encoding)) == [(1, {"prompt": "狐狸\u2028 x"})]


def test_a_row_begins_at_its_first_line(rows):
    found = rows("a.csv", 'prompt,seed\n"a fox\nasleep",5\nan owl,6\n')
    assert [line for line, _ in found] == [2, 4]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"prompt": "a fox"', "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('{"prompt": "a", "prompt": "b"}', "a name twice"),
        (b'{"prompt": "\xff"}', "no UTF-8"),
        ('{"prompt": "\\ud800"}', "no UTF-8"),
        ("[" * 100_000, "not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_broken_line_of_json_is_bad_and_the_others_are_read(rows, line, fault):
    line = line if isinstance(line, bytes) else line.encode()
    first, bad, last = rows("a.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert (first, last) == ((1, {"prompt": "a"}), (3, {"prompt": "b"}))
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    assert fault in bad.fault


@pytest.mark.parametrize(
    ("line", "fault"), [("a,b,c", "3 cells; expected 2"), ('"a"b,5', "not CSV"), (b"\xff,5", "no UTF-8")]
)
def test_a_broken_line_of_csv_is_bad_and_the_others_are_read(rows, line, fault):
    line = line if isinstance(line, bytes) else line.encode()
    bad, last = rows("a.csv", b"prompt,seed\n" + line + b"\nb,6\n")
    assert last == (3, {"prompt": "b", "seed": "6"})
    assert bad.line == 2
    assert fault in bad.fault


@pytest.mark.parametrize("header", ["seed,size\n", "prompt;seed\n", "prompt,prompt\n"])
def test_a_csv_file_needs_a_header(rows, header):
    with pytest.raises(ValueError, match="expected a header"):
        rows("a.csv", header + "1,2\n")


def test_other_files_are_refused(rows):
    with pytest.raises(ValueError, match=r"expected a .jsonl file with a JSON object a line, or a .csv file"):
        rows("a.txt", "a fox")
