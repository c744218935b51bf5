from __future__ import annotations

import json
import os
import pickle
import warnings
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from support import recorded
from support.mapped import copied, linux

from instantcharacter import AdapterConfig, CharacterAdapter

CONFIG = recorded.ADAPTER_CONFIG


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(params=[".bin", ".safetensors"])
def path(request, tmp_path, adapter):
    path = tmp_path / f"adapter{request.param}"
    adapter.save(path)
    return path


def test_what_is_saved_is_loaded(path, adapter):
    assert same_weights(CharacterAdapter.from_file(path, CONFIG), adapter)


@linux
def test_weights_that_keep_the_files_dtype_are_not_copied(path):
    """The 2.9 GB of unfolded attention, and the fusion until a character is made, are file cache and nothing else."""
    assert not copied(CharacterAdapter.from_file(path, CONFIG).parameters(), path)
    assert copied(CharacterAdapter.from_file(path, CONFIG, dtype=torch.bfloat16).parameters(), path)


def test_bin_has_the_released_layout(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    assert {part: {key: list(tensor.shape) for key, tensor in state.items()} for part, state in parts.items()} == (
        recorded.CONFIG["adapter_keys"]
    )


def test_safetensors_carry_their_sizes(tmp_path, adapter):
    adapter.save(tmp_path / "a.safetensors")
    assert CharacterAdapter.from_file(tmp_path / "a.safetensors").config == CONFIG


def test_weights_take_the_dtype_asked_for(path):
    adapter = CharacterAdapter.from_file(path, CONFIG, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}


def test_loaded_adapter_can_be_trained(path):
    adapter = CharacterAdapter.from_file(path, CONFIG)
    fused = adapter.projector.fuse(*recorded.features(tokens=7))
    tokens = adapter.projector.resample(fused, torch.tensor([500.0]))
    query, scale = torch.randn(1, 5, 2, 128), torch.rand(128) + 0.5
    sum(
        attention(query, tokens, attention.key_scale(scale), torch.tensor(1.0)).pow(2).sum()
        for attention in adapter.attention
    ).backward()
    without = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_sizes_of_a_bin_may_be_beside_it(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text(json.dumps(asdict(adapter.config)))
    loaded = CharacterAdapter.from_file(tmp_path / "a.bin")
    assert loaded.config == adapter.config
    assert loaded.fingerprint() == adapter.fingerprint()
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json states sizes that cannot be read"):
        CharacterAdapter.from_file(tmp_path / "a.bin")


def test_released_sizes_are_expected_of_a_bin_without_config(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ weights.*Expected an InstantCharacter adapter"):
        CharacterAdapter.from_file(tmp_path / "a.bin")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="nothing"):
        CharacterAdapter.from_file(tmp_path / f"nothing{suffix}")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_cut_off_file_is_refused(path, fraction):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ValueError, match=r"empty|cut off"):
        CharacterAdapter.from_file(path, CONFIG)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_file_of_another_kind_is_refused(tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><html>Access to this model is restricted</html>" * 20)
    with pytest.raises(ValueError, match="Expected an InstantCharacter adapter"):
        CharacterAdapter.from_file(path)


def test_another_models_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"\['state_dict'\]"):
        CharacterAdapter.from_file(tmp_path / "other.bin")
    save_file({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        CharacterAdapter.from_file(tmp_path / "other.safetensors")


PAIR = {"0.to_k_ip.weight": torch.zeros(4, 4)}
OTHERS = {
    "InstantX's": {"image_proj": {"proj.0.weight": torch.zeros(4, 4)}, "ip_adapter": PAIR},
    "XLabs'": {
        "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": torch.zeros(4, 4),
        "ip_adapter_proj_model.proj.weight": torch.zeros(4, 4),
    },
    "PuLID": {"pulid_ca.0.norm1.weight": torch.zeros(4), "pulid_encoder.latents": torch.zeros(1, 2)},
    "Stable Diffusion": {"image_proj": {"proj.weight": torch.zeros(4, 4)}, "ip_adapter": PAIR},
    "PhotoMaker": {"id_encoder": {"x.weight": torch.zeros(2)}, "lora_weights": {}},
    "a LoRA": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.zeros(4, 4)},
    "FLUX itself": {"double_blocks.0.img_attn.proj.weight": torch.zeros(4, 4)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_are_named(tmp_path, name):
    torch.save(OTHERS[name], tmp_path / "other.bin")
    flat = {
        f"{key}{rest and '.'}{rest}": tensor
        for key, value in OTHERS[name].items()
        for rest, tensor in (value.items() if isinstance(value, dict) else [("", value)])
    }
    save_file({key: tensor.clone() for key, tensor in flat.items()}, tmp_path / "other.safetensors")
    for file in (tmp_path / "other.bin", tmp_path / "other.safetensors"):
        with pytest.raises(ValueError, match=f"{file.name} .*It looks like .*{name}.*Expected an InstantCharacter"):
            CharacterAdapter.from_file(file)


def test_an_adapter_that_lacks_a_weight_looks_like_no_other(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    del parts["ip_adapter"]["0.to_k_ip.weight"]
    torch.save(parts, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="lacks 1 of") as refused:
        CharacterAdapter.from_file(tmp_path / "a.bin", CONFIG)
    assert "looks like" not in str(refused.value)


def test_what_training_left_beside_the_weights_does_no_harm(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    torch.save({**parts, "step": 40_000}, tmp_path / "a.bin")
    assert same_weights(CharacterAdapter.from_file(tmp_path / "a.bin", CONFIG), adapter)


def test_what_is_no_tensor_is_refused(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    parts["ip_adapter"]["0.to_k_ip.bias"] = [0.0, 1.0]
    torch.save(parts, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="not a tensor: ip_adapter.0.to_k_ip.bias"):
        CharacterAdapter.from_file(tmp_path / "a.bin", CONFIG)


@pytest.mark.parametrize("config", ["not json", '{"width": 3}', '{"num_tokens": 0}', "[1]"])
def test_unreadable_sizes_are_refused(tmp_path, config):
    save_file({"image_proj.x": torch.zeros(1)}, tmp_path / "a.safetensors", {"config": config})
    with pytest.raises(ValueError, match="sizes that cannot be read"):
        CharacterAdapter.from_file(tmp_path / "a.safetensors")


class Harmful:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_not_run(tmp_path):
    marker = tmp_path / "was_run"
    torch.save({"image_proj": Harmful(marker), "ip_adapter": {}}, tmp_path / "bad.bin")
    with pytest.raises(ValueError, match="tensors alone"):
        CharacterAdapter.from_file(tmp_path / "bad.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(ValueError, match="not a checkpoint"):
        CharacterAdapter.from_file(tmp_path / "plain.bin")
    assert not marker.exists()


def test_weights_of_other_sizes_are_named(path):
    other = AdapterConfig(**{**CONFIG.__dict__, "token_dim": 32})
    with pytest.raises(ValueError, match=r"to_k_ip.weight is \[256, 64\], not \[256, 32\]|proj_out"):
        CharacterAdapter.from_file(path, other)


def test_a_missing_weight_is_named(tmp_path, adapter):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    del parts["ip_adapter"]["2.to_v_ip.bias"]
    torch.save(parts, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ weights: attention.2.to_v_ip.bias"):
        CharacterAdapter.from_file(tmp_path / "a.bin", CONFIG)


def test_unexpected_weights_give_one_warning(tmp_path, adapter, caplog):
    adapter.save(tmp_path / "a.bin")
    parts = torch.load(tmp_path / "a.bin", weights_only=True)
    parts["ip_adapter"] |= {"extra.one": torch.zeros(1), "extra.two": torch.zeros(1)}
    torch.save(parts, tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = CharacterAdapter.from_file(tmp_path / "a.bin", CONFIG)
    assert same_weights(loaded, adapter)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 weights that are not used" in caplog.text


def test_interrupted_saving_leaves_the_old_file(tmp_path, adapter, monkeypatch):
    path = tmp_path / "a.safetensors"
    adapter.save(path)
    before = path.read_bytes()

    def full_disk(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("instantcharacter.files.writing.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        adapter.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_other_file_endings_are_refused(tmp_path, adapter):
    with pytest.raises(ValueError, match=r"not as \.ckpt"):
        adapter.save(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"feature_dim": 2688.5}, "feature_dim is 2688.5"),
        ({"attention_dim": 3071}, "3071 is not a multiple of attention_heads 24"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**sizes)


def test_fingerprint_is_the_same_in_bfloat16_and_from_a_file(path, adapter):
    fingerprint = adapter.fingerprint()
    assert CharacterAdapter.from_file(path, CONFIG).fingerprint() == fingerprint
    assert CharacterAdapter.from_file(path, CONFIG, dtype=torch.bfloat16).fingerprint() == fingerprint


def test_fingerprint_tells_adapters_apart():
    assert recorded.adapter(seed=1).fingerprint() != recorded.adapter(seed=2).fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fingerprint_of_a_file_is_kept_in_any_dtype(path, tmp_path, dtype):
    """A card without bfloat16 has the adapter in float16: its characters are the same ones."""
    loaded = CharacterAdapter.from_file(path, CONFIG, dtype=dtype)
    fingerprint = CharacterAdapter.from_file(path, CONFIG).fingerprint()
    assert loaded.fingerprint() == fingerprint
    loaded.save(tmp_path / "copy.safetensors")
    copy = CharacterAdapter.from_file(tmp_path / "copy.safetensors")
    assert copy.fingerprint() == copy.float().fingerprint() == fingerprint


def test_weights_that_were_changed_have_another_fingerprint(path):
    loaded = CharacterAdapter.from_file(path, CONFIG)
    fingerprint = loaded.fingerprint()
    with torch.no_grad():
        loaded.projector.proj.fc1.weight[0, 0] += 1
    assert loaded.fingerprint() != fingerprint
