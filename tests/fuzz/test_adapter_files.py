"""Adapters in both forms, and the sizes beside a ``.bin``: what is loaded is what the file says."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import mutations, recorded

from instantcharacter import AdapterConfig, CharacterAdapter, CharacterFeatures
from instantcharacter.character.tokens import TokenCache
from instantcharacter.model.folding import fold_adapter

SIZES = AdapterConfig(
    feature_dim=8,
    fusion_layers=1,
    fusion_heads=1,
    resampler_dim=8,
    resampler_layers=1,
    resampler_heads=1,
    num_tokens=2,
    token_dim=8,
    attention_dim=8,
    attention_heads=1,
    num_attention_blocks=2,
)
CPU = torch.device("cpu")
FEATURES = CharacterFeatures(*recorded.features(tokens=2, width=8))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    """The files of one adapter, by suffix."""
    folder = tmp_path_factory.mktemp("good")
    adapter = recorded.adapter(SIZES)
    for suffix in (".bin", ".safetensors"):
        adapter.save(folder / f"a{suffix}")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


def use(path) -> CharacterAdapter:
    """Load an adapter, and do with it what a picture needs of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = CharacterAdapter.from_file(path)
    if not adapter.folded:
        character = adapter.create_character(FEATURES)
        folded = fold_adapter(adapter, torch.float32)
        folded.use = TokenCache(folded.projector).tokens(character, [500.0], CPU, torch.float32)
        assert mutations.finite(character.fused, *folded.use, *folded.attention.parameters())
    return adapter


def says(adapter: CharacterAdapter, content: dict) -> bool:
    names = {"projector": "image_proj", "attention": "ip_adapter"}
    weights = {f"{names[key.partition('.')[0]]}.{key.partition('.')[2]}": w for key, w in adapter.state_dict().items()}
    return all(key in content and mutations.same(weight, content[key]) for key, weight in weights.items())


@given(st.data())
def test_changed_safetensors(outcomes, tmp_path, good, data):
    changed = data.draw(mutations.edited_safetensors(good[".safetensors"]))
    call = mutations.write(tmp_path / "a.safetensors", changed, use)
    outcomes.judge(call, lambda adapter: says(adapter, mutations.content_of_safetensors(changed)))


def bin_content(path, good: bytes) -> dict:
    """The numbers of a ``.bin`` as torch reads them; those of the good one for a file that torch does not read."""
    try:
        parts = torch.load(path, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError):
        parts = torch.load(io.BytesIO(good), weights_only=True)
    return {
        f"{part}.{key}": t.float().numpy() for part in ("image_proj", "ip_adapter") for key, t in parts[part].items()
    }


@given(st.data())
def test_changed_bytes_of_a_bin(outcomes, tmp_path, good, data):
    (tmp_path / "a.json").write_text(json.dumps(asdict(SIZES)))
    changed = data.draw(mutations.edited_bytes(good[".bin"], 30_000))
    outcomes.judge(
        mutations.write(tmp_path / "a.bin", changed, use),
        lambda adapter: says(adapter, bin_content(tmp_path / "a.bin", good[".bin"])),
    )


@st.composite
def rezipped(draw: st.DrawFn, data: bytes) -> bytes:
    """A ``.bin`` whose entries are changed, gone, compressed or doubled."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        changed = draw(st.sampled_from([name for name in old.namelist() if name.endswith("data.pkl")] + old.namelist()))
        how = draw(st.sampled_from(["bytes", "bytes", "bytes", "gone", "short", "long", "packed", "twice"]))
        for name in old.namelist():
            content, packing = old.read(name), zipfile.ZIP_STORED
            if name == changed:
                match how:
                    case "bytes":
                        content = draw(mutations.edited_bytes(content, len(content)))
                    case "gone":
                        continue
                    case "short":
                        content = content[: len(content) // 2]
                    case "long":
                        content *= 2
                    case "packed":
                        packing = zipfile.ZIP_DEFLATED
                    case "twice":
                        new.writestr(name, content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new.writestr(name, content, packing)
    return buffer.getvalue()


@given(st.data())
def test_changed_entries_of_a_bin(outcomes, tmp_path, good, data):
    (tmp_path / "a.json").write_text(json.dumps(asdict(SIZES)))
    changed = data.draw(rezipped(good[".bin"]))
    outcomes.judge(
        mutations.write(tmp_path / "a.bin", changed, use),
        lambda adapter: says(adapter, bin_content(tmp_path / "a.bin", good[".bin"])),
    )


def odd_tensors() -> dict[str, object]:
    plain = torch.ones(8, 8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return {
        "integers": plain.to(torch.int64),
        "bytes": plain.to(torch.uint8),
        "booleans": plain.bool(),
        "complex": plain.to(torch.complex64),
        "sparse": plain.to_sparse(),
        "csr": plain.to_sparse_csr(),
        "meta": plain.to("meta"),
        "nested": nested,
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "conjugated": plain.to(torch.complex64).conj(),
        "repeated": torch.ones(1).expand(8, 8),
        "empty": torch.empty(0, 8),
        "scalar": torch.tensor(1.0),
        "transposed": torch.ones(8, 4).T,
        "none": None,
        "number": 1.0,
        "list": [1.0],
        "dictionary": {"weight": plain},
    }


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds_are_refused(outcomes, tmp_path, good):
    (tmp_path / "a.json").write_text(json.dumps(asdict(SIZES)))
    (tmp_path / "good.bin").write_bytes(good[".bin"])
    parts = torch.load(tmp_path / "good.bin", weights_only=True)
    for kind, value in odd_tensors().items():
        parts["ip_adapter"]["0.to_k_ip.weight"] = value
        torch.save(parts, tmp_path / "a.bin")
        assert outcomes.judge(lambda: use(tmp_path / "a.bin")) == "clear", kind


@given(st.data())
def test_changed_sizes_beside_a_bin(outcomes, tmp_path, good, data):
    (tmp_path / "a.bin").write_bytes(good[".bin"])
    (tmp_path / "a.json").write_bytes(data.draw(mutations.json_bytes(asdict(SIZES))))
    outcomes.judge(
        lambda: use(tmp_path / "a.bin"), lambda adapter: says(adapter, bin_content(tmp_path / "a.bin", good[".bin"]))
    )


@pytest.mark.parametrize("size", ["num_attention_blocks", "resampler_layers", "fusion_layers", "num_tokens"])
def test_impossible_sizes_are_refused_at_once(outcomes, tmp_path, good, size):
    (tmp_path / "a.bin").write_bytes(good[".bin"])
    for number in (10**9, 2**62, 10**30, True, float("nan"), "9", None, [1]):
        (tmp_path / "a.json").write_text(json.dumps({**asdict(SIZES), size: number}))
        assert outcomes.judge(lambda: CharacterAdapter.from_file(tmp_path / "a.bin")) == "clear"


def test_a_file_that_was_zipped_again_is_refused(tmp_path, good):
    with zipfile.ZipFile(io.BytesIO(good[".bin"])) as old, zipfile.ZipFile(tmp_path / "a.bin", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"a\.bin cannot be read .*compression"):
        CharacterAdapter.from_file(tmp_path / "a.bin", SIZES)


def test_good_adapters_are_right(outcomes, tmp_path, good):
    (tmp_path / "a.json").write_text(json.dumps(asdict(SIZES)))
    call = mutations.write(tmp_path / "a.bin", good[".bin"], use)
    assert outcomes.judge(call, lambda adapter: says(adapter, bin_content(tmp_path / "a.bin", good[".bin"]))) == "right"
    call = mutations.write(tmp_path / "a.safetensors", good[".safetensors"], use)
    content = mutations.content_of_safetensors(good[".safetensors"])
    assert outcomes.judge(call, lambda adapter: says(adapter, content)) == "right"
