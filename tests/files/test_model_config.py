"""Configs whose numbers no model has."""

from __future__ import annotations

import json

import pytest
import torch

from instantcharacter.files.model_config import check_size, read_config


@pytest.mark.parametrize(
    "value", [10**9, float("nan"), float("inf"), -(10**30), "two", True, [1], {"a": 1}, [0] * 300], ids=range(9)
)
def test_impossible_settings_are_refused(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": value}))
    with pytest.raises(ValueError, match=r"config\.json has num_layers: .*Expected"):
        read_config(tmp_path / "config.json", {"num_layers": 2})


def test_good_settings_are_read(tmp_path):
    settings = {"num_layers": 3, "eps": 1e-6, "width": None, "blocks": ["a"], "other": {"b": 1}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert read_config(tmp_path / "config.json", {"num_layers": 2, "width": 4, "blocks": ("b",)}) == settings


def test_a_model_of_more_weights_than_its_files_have_bytes_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    check_size(lambda: torch.nn.Linear(9, 9), tmp_path, "a model")
    with pytest.raises(ValueError, match="has 100 bytes, its config.json states 1099512676352 weights"):
        check_size(lambda: torch.nn.Linear(2**20, 2**20), tmp_path, "a model")
