from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import get_args

import pytest

from instantcharacter import Strength, offload
from instantcharacter.cli.options import (
    CACHE_THRESHOLD,
    SIZE,
    TOY_SIZE,
    EncodeOptions,
    GenerateOptions,
    Strategy,
    WeightDtype,
)
from instantcharacter.cli.parser import parse
from instantcharacter.files import catalog
from instantcharacter.flux import first_block_cache, fp8

GENERATE = ["generate", "--prompt=a fox", "--output=fox.png", "--reference=a.png"]


def test_options_are_frozen():
    options = parse(GENERATE)
    with pytest.raises(FrozenInstanceError):
        options.prompt = "an owl"


def test_defaults_of_the_parser_are_those_of_the_dataclass():
    options = GenerateOptions(prompt="a fox", output=Path("fox.png"), reference=("a.png",))
    assert parse(GENERATE) == options


def test_repeated_options_become_tuples():
    options = parse([*GENERATE, "--reference=b.png", "--scale", "0.5", "0.9", "--lora=a:0.5", "--lora=b"])
    assert options.reference == ("a.png", "b.png")
    assert options.scale == (0.5, 0.9)
    assert options.lora == ((Path("a"), 0.5), (Path("b"), 1.0))


def test_each_character_has_its_strength_over_steps_and_blocks():
    options = parse([*GENERATE, "--scale", "0.5", "1.2:0.9:0.6", "--scale-double", "1", "0.8"])
    assert options.scales(2) == [0.5, Strength(1.2, 0.9, 0.6, double_blocks=0.8)]
    assert parse([*GENERATE, "--scale-single=1.1"]).scales(2) == [Strength(0.9, 0.9, 0.9, 1, 1.1)] * 2
    assert parse(GENERATE).scales(3) == [0.9] * 3


@pytest.mark.parametrize("flag", ["scale", "scale-double", "scale-single"])
def test_a_strength_for_all_or_one_each(flag):
    options = parse([*GENERATE, f"--{flag}", "0.5", "0.6"])
    with pytest.raises(ValueError, match=f"2 --{flag} for 3 characters: give one for all, or one each"):
        options.scales(3)


def test_toy_model_has_its_own_size_unless_one_is_given():
    assert parse(GENERATE).size == SIZE
    assert parse([*GENERATE, "--model=toy"]).size == TOY_SIZE
    assert parse([*GENERATE, "--model=toy", "--size=64"]).size == (64, 64)


def test_toy_stands_for_the_path_of_a_toy_model():
    options = EncodeOptions(output=Path("a"), siglip="toy").with_toy_paths()
    assert options.siglip == str(catalog.toy("siglip"))
    assert options.dinov2 == catalog.DINOV2


def test_toy_flux_comes_with_the_other_toys_except_those_given():
    options = GenerateOptions(prompt="", output=Path("a"), model="toy", dinov2="mine").with_toy_paths()
    assert options.model == str(catalog.toy("flux"))
    assert (options.siglip, options.dinov2) == (str(catalog.toy("siglip")), "mine")


def test_missing_toy_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "TOY_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="clone it"):
        EncodeOptions(output=Path("a"), adapter="toy").with_toy_paths()


@pytest.mark.parametrize(
    ("flags", "weight_dtype"), [([], "default"), (["--fp8"], "fp8_e4m3fn"), (["--fp8-fast"], "fp8_e4m3fn_fast")]
)
def test_a_flag_chooses_the_dtype_of_weights(flags, weight_dtype):
    assert parse([*GENERATE, *flags]).weight_dtype == weight_dtype


def test_weights_have_one_dtype(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*GENERATE, "--fp8", "--fp8-fast"])
    assert capsys.readouterr().err.endswith("error: argument --fp8-fast: not allowed with argument --fp8\n")


def test_dtypes_of_weights_are_those_of_the_library():
    assert get_args(WeightDtype) == get_args(fp8.WeightDtype)


def test_strategies_are_those_of_the_offloader():
    assert get_args(Strategy) == offload.STRATEGIES


def test_the_cache_has_the_pipelines_threshold_unless_one_is_given():
    assert CACHE_THRESHOLD == first_block_cache.THRESHOLD
    assert parse(GENERATE).cache == 0
    assert parse([*GENERATE, "--cache"]).cache == CACHE_THRESHOLD
    assert parse([*GENERATE, "--cache", "0.08"]).cache == 0.08
    with pytest.raises(SystemExit):
        parse([*GENERATE, "--cache=-1"])
