from __future__ import annotations

import re
from pathlib import Path

import pytest

from instantcharacter.training import Source, TrainingConfig, read_config

STAGES = Path(__file__).parents[2] / "instantcharacter/training/stages"


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_the_stages_of_the_paper_are_read(stage):
    config = read_config(STAGES / f"{stage}.yaml")
    pairs = {source.pairs for source in config.data}
    assert pairs == {"stage1": {False}, "stage2": {True}, "stage3": {False, True}}[stage]
    assert (config.resolution > 512) == (stage == "stage3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stepz: 3", "no setting 'stepz'"),
        ("steps: many", "steps is 'many'; expected int"),
        ("steps: 0", "steps is 0; expected at least 1"),
        ("steps: true", "steps is True; expected int"),
        ("resolution: 500", "resolution is 500; expected a multiple of 16"),
        ("optimizer: sgd", "optimizer is 'sgd'; expected adamw or adamw8bit"),
        ("drop_text: 1.0", "drop_text is 1.0"),
        ("learning_rate: [1]", "learning_rate is"),
        ("data: []", "names no source"),
        ("data: pictures", "expected a list"),
        ("data: [{pairs: true}]", "data 0: path is missing"),
        ("sizes: {num_tokens: 0}", "num_tokens is 0"),
        ("cache: 3", "cache is 3; expected Path"),
        ("learning_rate: -1e-4", "learning_rate is -0.0001; expected 0 or more"),
        ("learning_rate: .nan", "learning_rate is nan; expected 0 or more"),
        ("learning_rate: 1" + 400 * "0", "expected float"),
        ("weight_decay: -1", "weight_decay is -1.0; expected 0 or more"),
        ("weight_decay: .inf", "weight_decay is inf; expected 0 or more"),
        ("warmup: -1", "warmup is -1; expected 0 or more"),
        ("clip: 0", "clip is 0.0; expected more than 0"),
        ("clip: .nan", "clip is nan; expected more than 0"),
        ("guidance: .nan", "guidance is nan; expected 0 or more"),
        ("held_gib: -1", "held_gib is -1.0; expected 0 or more"),
        ("held_gib: .inf", "held_gib is inf; expected 0 or more"),
        ("ema: .nan", "ema is nan; expected 0 or more, and less than 1"),
        ("preview_steps: 0", "preview_steps is 0; expected at least 1"),
        ("seed: -1", "seed is -1; expected 0 to 2**64 - 1"),
        ("seed: 18446744073709551616", "seed is 18446744073709551616; expected 0 to 2**64 - 1"),
        ("data: [{path: p, share: -1}]", "c.yaml: data 0: share is -1.0; expected 0 or more"),
        ("data: [{path: p, share: .nan}]", "share is nan; expected 0 or more"),
        ("data: [{path: p, share: 0}]", "all sources have a share of 0"),
    ],
)
def test_an_invalid_config_says_which_setting_and_what_is_expected(tmp_path, change, message):
    settings = {"output": "o", "data": "[{path: p}]"} | dict([change.split(": ", 1)])
    (tmp_path / "c.yaml").write_text("\n".join(f"{key}: {value}" for key, value in settings.items()))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(tmp_path / "c.yaml")


def test_a_config_needs_an_output_and_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    for text, message in (("data: [{path: p}]", "output is missing"), ("{", "is not YAML"), ("3", "expected settings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_is_read_as_windows_saves_it(tmp_path, encoding):
    (tmp_path / "c.yaml").write_bytes("output: ü\r\ndata: [{path: p}]\r\n".encode(encoding))
    assert read_config(tmp_path / "c.yaml").output == Path("ü")


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "c.yaml").write_text("output: o\ndata: [{path: p, share: 2}]\nlearning_rate: 1e-4\nadapter: a.bin\n")
    config = read_config(tmp_path / "c.yaml")
    assert config == TrainingConfig(Path("o"), (Source("p", share=2.0),), learning_rate=1e-4, adapter=Path("a.bin"))
