from __future__ import annotations

from instantcharacter.files.errors import first_few, first_line, quoted


def test_first_line_skips_blank_lines():
    assert first_line(OSError("\n  one \ntwo")) == "one"


def test_error_without_a_message_is_its_class():
    assert first_line(RuntimeError()) == "RuntimeError"


def test_quotations_are_short_and_printable():
    assert first_line(ValueError("\x1b[31mred\x1b[0m \x07")) == "red \\x07"
    assert quoted("\ud800") == "\\ud800"
    assert len(quoted("a" * 10_000)) < 400
    assert first_few(["a", "b", "c", "d"]) == "a, b, c, …"
