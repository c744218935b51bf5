from __future__ import annotations

import pytest

from instantcharacter.files.names import check_path


@pytest.mark.parametrize(
    "path",
    [
        "fox",
        "friends/fox",
        "friends\\fox",
        "./fox",
        "../fox",
        "狐狸",
        "console",
        "com",
        "a.b.c",
        ".cache/x",
        "",
    ],
)
def test_names_of_files_are_accepted(path):
    check_path(path)


@pytest.mark.parametrize(
    "path",
    [
        *("CON", "con.safetensors", "friends/nul", "friends\\aux.txt", "COM1", "lpt9 .x", "conin$"),
        *("a:b", "fox:", "a<b", "what?", "a*", 'a"b', "a|b", "fox.", "fox ", "fox. /a", "\x1b[31m", "a\nb", "C:\\a"),
    ],
)
def test_names_that_some_system_cannot_have_are_refused(path):
    with pytest.raises(ValueError, match="cannot be a file: expected no name such as CON"):
        check_path(path)


@pytest.mark.parametrize("path", ["\ud800", "f\udcf6x", "a\0b", "x" * 256, "é" * 128, "a/" * 501])
def test_paths_that_no_system_can_have_are_refused_in_words_that_can_be_logged(path):
    with pytest.raises(ValueError, match="cannot be a file: expected UTF-8, 255 bytes a name, 1000 in all") as refused:
        check_path(path)
    assert str(refused.value).encode()
    assert len(str(refused.value)) < 200


def test_a_name_may_be_shorter_by_request():
    check_path("x" * 200, 200)
    with pytest.raises(ValueError, match="200 bytes a name"):
        check_path("x" * 201, 200)
