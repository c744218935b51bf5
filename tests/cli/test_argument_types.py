from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from support import recorded

from instantcharacter import Strength
from instantcharacter.cli.argument_types import axis, file_name, lora, number, prompt, scale, size, whole_number


@pytest.mark.parametrize(("text", "value"), [("64", (64, 64)), ("64x128", (64, 128)), ("1024X768", (1024, 768))])
def test_size_is_width_and_height_or_a_square(text, value):
    assert size(text) == value


@pytest.mark.parametrize(
    "text",
    ["100x100", "big", "0", "64x", "64x64x64", "-64", "x", "0x0", "16384x16400", "9" * 5000, "\u0661\u0666", "16.0"],
)
def test_other_sizes_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="expected WIDTHxHEIGHT"):
        size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("style.safetensors", (Path("style.safetensors"), 1.0)),
        ("style.safetensors:0.5", (Path("style.safetensors"), 0.5)),
        ("C:/style.safetensors", (Path("C:/style.safetensors"), 1.0)),
        ("C:/style.safetensors:-2", (Path("C:/style.safetensors"), -2.0)),
    ],
)
def test_lora_is_a_path_and_a_weight(text, value):
    assert lora(text) == value


def test_axis_is_a_setting_and_its_values():
    assert axis("scale=0.6,0.9") == ("scale", (0.6, 0.9))
    assert axis("seed=7") == ("seed", (7,))
    with pytest.raises(ArgumentTypeError, match="'steps' cannot be crossed; expected one of scale, guidance, seed"):
        axis("steps=4,8")


def test_a_scale_is_a_number_or_a_strength_over_the_steps():
    assert scale("-0.5") == -0.5
    assert scale("1.2:0.9:0.6") == Strength(1.2, 0.9, 0.6)
    with pytest.raises(ArgumentTypeError, match=r"1:2: expected one number, or START:MIDDLE:END, such as 1.2:0.9:0.6"):
        scale("1:2")


def test_numbers_outside_of_their_bounds_are_refused():
    assert number(0, 1)("0.5") == 0.5
    assert whole_number(1, 3)("3") == 3
    for parse, text in ((number(0, 1), "1.1"), (number(0, 1), "nan"), (whole_number(1, 3), "4")):
        with pytest.raises(ArgumentTypeError, match="expected"):
            parse(text)


@pytest.mark.parametrize("text", ["nan", "inf", "1e30", "9" * 5000, "a", "", "1.5x"])
def test_what_is_no_number_is_refused_with_the_bounds(text):
    for parse, expected in ((number(0, 10), "a number, 0 to 10"), (whole_number(1, 3), "a whole number, 1 to 3")):
        with pytest.raises(ArgumentTypeError, match=f"^'.{{0,99}}': expected {expected}$"):
            parse(text)


def test_prompt_is_a_text_in_utf_8():
    assert prompt("a fox \N{FOX FACE}\n") == "a fox \N{FOX FACE}\n"
    with pytest.raises(ArgumentTypeError, match="expected a text in UTF-8"):
        prompt("a \udcff")


def test_unknown_model_file_is_refused_with_the_known_names():
    assert file_name("siglip") == "siglip"
    with pytest.raises(ArgumentTypeError, match="expected one of flux, clip_l"):
        file_name("everything")


@pytest.mark.parametrize(
    "arguments",
    [
        "--size 100x100",
        "--size big",
        "--steps 0",
        "--scale nan",
        "--scale 1:2",
        "--scale 1:0.9:-0.1",
        "--scale 1:0.9:nan",
        "--scale 1::0.9",
        "--scale-double -1",
        "--scale-single nan",
        "--guidance -1",
        "--seed -1",
        "--lora a:nan",
        "--guidance inf",
        "--seed 1e30",
        "--size 0x0",
        "--grid steps=4,8",
        "--grid scale",
        "--grid seed=1.5",
        "--fit x",
    ],
)
def test_impossible_values_are_status_2(generate, arguments):
    with pytest.raises(SystemExit) as stop:
        generate("--reference", recorded.PICTURE, *arguments.split())
    assert stop.value.code == 2
