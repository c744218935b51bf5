from __future__ import annotations

import pytest

from instantcharacter.batch import values


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (values.number(0, 1), "much", "'much': expected a number, 0 to 1"),
        (values.number(0, 1), "nan", "'nan': expected a number, 0 to 1"),
        (values.whole_number(1, 9), "2.5", "'2.5': expected a whole number, 1 to 9"),
        (values.whole_number(1, 9), "0", "'0': expected a whole number, 1 to 9"),
        (values.scale, "1:2", "expected one number, or START:MIDDLE:END"),
        (values.lora, "style.safetensors:nan", "'nan': expected a number, -10 to 10"),
        (values.size, "16400x64", "up to 16384"),
        (values.size, "100x100", "expected WIDTHxHEIGHT in multiples of 16"),
    ],
)
def test_a_fault_says_what_was_found_and_expected(parse, text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
