from __future__ import annotations

from pathlib import Path

import pytest
import torch

from instantcharacter.training.data import cache
from instantcharacter.training.data.cache import CachedEncoder, MemoryCache, stack

CPU = torch.device("cpu")


class Lengths:
    """A model that counts letters, and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[dict[str, torch.Tensor]]:
        self.batches.append(texts)
        return [{"length": torch.tensor([float(len(text))])} for text in texts]


def encoder(model: Lengths, folder: Path | None = None, name: str = "lengths", capacity: int = 0) -> CachedEncoder[str]:
    return CachedEncoder(name, folder, MemoryCache(capacity, CPU), str.strip, model)


def lengths(encoder: CachedEncoder[str], *texts: str) -> list[float]:
    return [tensors["length"].item() for tensors in encoder.finish([encoder.begin(text) for text in texts])]


def test_missing_items_are_computed_in_one_batch_and_in_order(tmp_path):
    model = Lengths()
    assert lengths(encoder(model, tmp_path), "a", "bb") == [1, 2]
    assert lengths(encoder(model, tmp_path), "ccc", "bb", "dddd ", "a") == [3, 2, 4, 1]
    assert model.batches == [["a", "bb"], ["ccc", "dddd"]]


def test_a_cached_item_is_not_even_decoded(tmp_path):
    lengths(encoder(Lengths(), tmp_path), "a")
    item = encoder(Lengths(), tmp_path).begin("a")
    assert item.prepared is None and item.tensors is not None


def test_encoders_of_other_names_share_nothing(tmp_path):
    memory, models = MemoryCache(1000, CPU), [Lengths(), Lengths()]
    for name, model in zip(("first", "second"), models):
        assert lengths(CachedEncoder(name, tmp_path, memory, str.strip, model), "a") == [1]
    assert [model.batches for model in models] == [[["a"]], [["a"]]]


@pytest.mark.parametrize("damage", [lambda data: data[:10], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    lengths(encoder(Lengths(), tmp_path), "a")
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage(whole := file.read_bytes()))
    model = Lengths()
    assert lengths(encoder(model, tmp_path), "a") == [1]
    assert model.batches == [["a"]] and file.read_bytes() == whole


def test_an_unreadable_file_is_computed_again(tmp_path, monkeypatch):
    lengths(encoder(Lengths(), tmp_path), "a")

    def refused(path, expected):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "read_safetensors", refused)
    assert lengths(encoder(Lengths(), tmp_path), "a") == [1]


def test_the_memory_cache_is_filled_and_then_stays():
    memory = MemoryCache(10, CPU)
    small, large = {"x": torch.zeros(1)}, {"x": torch.zeros(100)}
    assert memory.add("large", large) is large and memory.get("large") is None
    stored = memory.add("small", small)
    assert memory.get("small") is stored
    memory.add("second", small)
    assert memory.add("third", small) is small and len(memory) == 2


def test_items_in_memory_are_read_from_no_file(tmp_path, monkeypatch):
    cached = encoder(Lengths(), tmp_path, capacity=1000)
    lengths(cached, "a")
    monkeypatch.setattr(cache, "read_safetensors", None)
    assert lengths(cached, "a") == [1]


def test_cached_and_computed_tensors_are_stacked_on_the_device():
    batch = stack([{"x": torch.zeros(2)}, {"x": torch.zeros(2, device="meta")}], torch.device("meta"))
    assert batch["x"].shape == (2, 2) and batch["x"].device.type == "meta"
