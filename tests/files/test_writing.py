from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError, safe_open

from instantcharacter.files.writing import write_pickle, write_safetensors

TENSORS = {"a": torch.arange(3.0), "b": torch.zeros(50, 100)}


def test_tensors_and_metadata_are_written(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", TENSORS, {"format": "mine"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mine"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    write_pickle(tmp_path / "a.pt", {"tensors": TENSORS, "step": 3})
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    assert read["step"] == 3
    assert all(torch.equal(read["tensors"][name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("error", [SafetensorError("no number"), RuntimeError("no number")])
def test_error_without_the_systems_number_says_what_the_library_said(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"no number: '.*/a'"):
        write_pickle(tmp_path / "a", TENSORS)
