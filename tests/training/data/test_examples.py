from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import training_world as world

from instantcharacter.training import Source
from instantcharacter.training.data import examples
from instantcharacter.training.data.examples import Examples, new_memory_cache
from instantcharacter.training.data.frozen_models import FEATURES, FrozenModels

CPU = torch.device("cpu")
ENCODERS = {"encode_targets": ("tokens",), "encode_texts": ("prompt", "pooled"), "encode_references": FEATURES}


def first_batch(config, **settings) -> examples.Batch:
    return next(Examples(config, CPU, **settings).batches(0))[0]


@pytest.fixture
def no_models(monkeypatch):
    """Models that cost nothing, for tests of reading and decoding."""
    for name, keys in ENCODERS.items():
        monkeypatch.setattr(
            FrozenModels, name, lambda self, inputs, keys=keys: [dict.fromkeys(keys, torch.zeros(1)) for _ in inputs]
        )


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """The number of inputs by the model that encoded them."""
    counts: Counter = Counter()
    for name in ENCODERS:
        encode = getattr(FrozenModels, name)

        def counted(self, inputs, name=name, encode=encode):
            counts[name] += len(inputs)
            return encode(self, inputs)

        monkeypatch.setattr(FrozenModels, name, counted)
    return counts


def pictures(folder: Path, count: int) -> Source:
    """An image folder of small pictures."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), "red").save(folder / f"{i}.png")
    lines = [f'{{"file_name": "{i}.png", "text": "text {i}"}}' for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return Source(str(folder))


def reading(tmp_path, source) -> Examples:
    return Examples(world.config(tmp_path, tmp_path / "output", data=(source,), batch_size=10, cache=None), CPU)


def test_bad_samples_are_skipped_and_counted(tmp_path, no_models):
    source = pictures(tmp_path / "pictures", 150)
    (tmp_path / "pictures/77.png").write_bytes(b"not a picture")
    read = reading(tmp_path, source)
    batches = read.batches(0)
    positions = [next(batches)[1] for _ in range(15)]
    assert len(read.tally.bad) == 1
    assert "77.png" in read.tally.bad[0]
    assert positions[-1] == 151


def test_missing_pictures_are_bad_and_not_fatal(tmp_path, no_models):
    source = pictures(tmp_path / "pictures", 150)
    (tmp_path / "pictures/1.png").unlink()
    (tmp_path / "pictures/7.png").unlink()
    (tmp_path / "pictures/7.png").mkdir()
    read = reading(tmp_path, source)
    batches = read.batches(0)
    with pytest.raises(ValueError, match=r"2 of \d+ samples are bad") as raised:
        for _ in range(15):
            next(batches)
    assert "1.png" in str(raised.value) and "7.png" in str(raised.value)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_an_unreadable_picture_is_bad_and_not_fatal(tmp_path, monkeypatch, caplog, no_models, error, named):
    source = pictures(tmp_path / "pictures", 150)
    read_bytes = Path.read_bytes

    def refused(path):
        if path.name == "7.png":
            raise error
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    read = reading(tmp_path, source)
    batches = read.batches(0)
    for _ in range(29):
        next(batches)
    assert [named in bad for bad in read.tally.bad] == [True, True]  # once in each of two epochs
    assert [record.message for record in caplog.records] == [f"skipped {read.tally.bad[0]}"]


def test_a_transform_changes_every_batch(config):
    plain = first_batch(config)
    halved = first_batch(config, transform=lambda batch: replace(batch, latents=batch.latents / 2))
    assert torch.equal(halved.latents, plain.latents / 2)


def test_a_filled_cache_needs_no_model(config, monkeypatch):
    for name in ("AutoencoderKL", "FluxPipeline", "CharacterEncoder"):
        monkeypatch.setattr(f"instantcharacter.training.data.frozen_models.{name}", None)
    first_batch(config)


def test_only_the_kinds_of_the_config_are_cached(config, tmp_path):
    first_batch(replace(config, cache=tmp_path / "cache", cached=("texts",)))
    assert {folder.name.split("-")[0] for folder in (tmp_path / "cache").iterdir()} == {"texts"}


def test_a_memory_cache_is_shared_by_trainings_of_the_same_models_and_settings(config, computed):
    config = replace(config, cache=None, held_gib=1.0, batch_size=world.PICTURES)
    memory = new_memory_cache(config, CPU)
    first = first_batch(config, memory=memory)
    assert computed == dict.fromkeys(ENCODERS, 6)
    again = first_batch(replace(config), memory=memory)
    assert computed == dict.fromkeys(ENCODERS, 6)
    assert torch.equal(first.latents, again.latents)
    smaller = first_batch(replace(config, resolution=32), memory=memory)
    assert computed == {"encode_targets": 12, "encode_texts": 6, "encode_references": 6}
    assert (first.latents.shape[1], smaller.latents.shape[1]) == (16, 4)


def test_a_memory_cache_of_no_size_stays_empty(config):
    memory = new_memory_cache(replace(config, held_gib=1e-9), CPU)
    first_batch(config, memory=memory)
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("flux/vae", "latents"),
        ("flux/text_encoder", "pooled"),
        ("flux/text_encoder_2", "prompts"),
        ("siglip", "features"),
        ("dinov2", "features"),
    ],
)
def test_a_model_that_is_trained_again_in_place_computes_again(config, models, tmp_path, folder, changed):
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("cache"))
    config = world.config(tmp_path / "models", config.output)
    before = first_batch(config)
    file = next((tmp_path / "models" / folder).glob("*.safetensors"))
    times = file.stat()
    save_file({key: weight * 1.1 for key, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    after = first_batch(config)
    for name in ("latents", "pooled", "prompts", "features"):
        old, new = (torch.cat([*map(torch.flatten, getattr(batch, name))]) for batch in (before, after))
        assert torch.equal(old, new) == (name != changed)


def test_a_copy_of_the_models_computes_nothing_again(config, models, tmp_path, computed):
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("cache"))
    first_batch(replace(world.config(tmp_path / "models", config.output), cache=config.cache))
    assert not computed


def test_another_preparation_has_another_cache(config, monkeypatch, computed):
    first_batch(config)
    assert not computed
    monkeypatch.setattr(examples, "PREPARATION", 2)
    first_batch(config)
    assert computed == dict.fromkeys(ENCODERS, config.batch_size)


def test_files_that_were_cut_off_are_computed_again(config, tmp_path):
    config = replace(config, cache=tmp_path / "cache")
    before = first_batch(config)
    files = [*config.cache.rglob("*.safetensors")]
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    torch.testing.assert_close(first_batch(config).latents, before.latents)
    assert all(file.stat().st_size > 100 for file in files)
