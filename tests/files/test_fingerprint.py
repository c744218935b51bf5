from __future__ import annotations

import os
import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from instantcharacter.files import fingerprint as module
from instantcharacter.files.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path):
    """A model in two shards."""
    (tmp_path / "model").mkdir()
    save(tmp_path / "model/model-00001-of-00002.safetensors", 0)
    save(tmp_path / "model/model-00002-of-00002.safetensors", 1)
    (tmp_path / "model/config.json").write_text('{"hidden_size": 8}')
    return tmp_path / "model"


def save(file, seed):
    save_file({"weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))}, file)


def test_a_folder_is_identified_by_its_files_content(folder, tmp_path):
    before = fingerprint(folder)
    assert len(before) == 32
    (folder / "README.md").write_text("read me")
    (folder / ".cache").mkdir()
    os.utime(folder / "config.json", (0, 0))
    assert fingerprint(str(folder)) == before == fingerprint(shutil.copytree(folder, tmp_path / "copy"))
    seen = {before}
    save(folder / "model-00002-of-00002.safetensors", 2)
    seen.add(fingerprint(folder))
    (folder / "config.json").write_text('{"hidden_size": 4}')
    seen.add(fingerprint(folder))
    (folder / "model-00001-of-00002.safetensors").unlink()
    seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_only_the_named_subfolders_count(folder, tmp_path):
    for part in ("vae", "text_encoder"):
        shutil.copytree(folder, tmp_path / "flux" / part)
    flux = tmp_path / "flux"
    vae, both = fingerprint(flux, "vae"), fingerprint(flux, "vae", "text_encoder")
    save(flux / "text_encoder/model-00001-of-00002.safetensors", 3)
    assert fingerprint(flux, "vae") == vae
    assert fingerprint(flux, "vae", "text_encoder") != both


def test_a_single_file_is_identified_with_the_config_beside_it(folder):
    file = folder / "model-00001-of-00002.safetensors"
    before = fingerprint(file)
    save(folder / "model-00002-of-00002.safetensors", 2)
    assert fingerprint(file) == before
    (folder / "config.json").write_text('{"hidden_size": 4}')
    other = fingerprint(file)
    save(file, 3)
    assert len({before, other, fingerprint(file)}) == 3


@pytest.mark.parametrize("part", [0, 1 / 3, 1 / 2, 1])
def test_samples_of_a_large_file_reach_from_end_to_end(tmp_path, monkeypatch, part):
    monkeypatch.setattr(module, "WHOLE", 1000)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as large:
        large.truncate(50_000_000)
    before = fingerprint(file)
    with file.open("r+b") as large:
        large.seek(round(part * 49_900_000))
        large.write(100_000 * b"\1")  # as much as lies between two samples, and more
    assert file.stat().st_size == 50_000_000
    assert fingerprint(file) != before


def test_a_hub_model_is_identified_by_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--somebody--model"
    (repo / "refs").mkdir(parents=True)
    found = []
    for revision in ("a" * 40, "b" * 40):
        (repo / "snapshots" / revision).mkdir(parents=True)
        (repo / "snapshots" / revision / "config.json").write_text("{}")
        (repo / "refs/main").write_text(revision)
        found.append(fingerprint("somebody/model"))
    assert found == ["a" * 40, "b" * 40]


@pytest.mark.parametrize("source", ["somebody/unknown", "/no/such/folder", "no such name"])
def test_an_unknown_model_is_identified_by_its_name(tmp_path, monkeypatch, source):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert fingerprint(source) == source
