from __future__ import annotations

from instantcharacter.files.errors import first_line


def test_first_line_skips_blank_lines():
    assert first_line(OSError("\n  one \ntwo")) == "one"


def test_error_without_a_message_is_its_class():
    assert first_line(RuntimeError()) == "RuntimeError"
