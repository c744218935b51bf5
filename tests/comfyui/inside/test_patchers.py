"""Modules that ComfyUI loads and unloads without copying their weights to host memory."""

from __future__ import annotations

import sys

import comfy.model_management as management
import pytest
import torch
from PIL import Image
from support import recorded
from support.comfyui_sampling import sample
from support.mapped import copied
from torch import nn

from instantcharacter.comfyui.conditioning import CharacterConditioning
from instantcharacter.comfyui.hosting import load
from instantcharacter.comfyui.images import to_image
from instantcharacter.comfyui.internals import loaded_models, unload
from instantcharacter.comfyui.loading import encode, load_adapter, load_encoder
from instantcharacter.comfyui.model_patch import apply
from instantcharacter.comfyui.patchers import HostedPatcher
from instantcharacter.model.folding import fold_adapter

ENCODERS = [recorded.FOLDER / name / "model.safetensors" for name in ("siglip", "dinov2")]
PICTURE = to_image(Image.open(recorded.PICTURE))[None]


@pytest.fixture
def linear():
    """A module of 64 × 64 float32 weights, and its patcher, which has them in bfloat16 on the device."""
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    return module, HostedPatcher(module, torch.bfloat16)


def addresses(module: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in module.parameters()]


@pytest.mark.parametrize("inference", [True, False])
def test_an_unloaded_module_has_the_tensors_from_before(linear, inference):
    module, patcher = linear
    before, address = module[0].weight, addresses(module)
    with torch.inference_mode(inference):  # as ComfyUI runs nodes
        for _ in range(2):
            assert load(patcher)[0].weight.dtype == torch.bfloat16
            assert module[0].weight.device.type == management.get_torch_device().type
            assert patcher in [loaded.model for loaded in loaded_models()]
            unload(patcher)
            assert patcher not in [loaded.model for loaded in loaded_models()]
            assert module[0].weight is before
            assert before.dtype == torch.float32
            assert before.device.type == "cpu"
            assert addresses(module) == address


def test_a_module_counts_with_the_size_that_it_has_on_the_device(linear):
    module, patcher = linear
    assert patcher.model_size() == 64 * 64 * 2
    load(patcher)
    assert patcher.loaded_size() == management.module_size(module) == 64 * 64 * 2


def test_a_module_is_unloaded_whole_where_a_part_would_do(linear):
    module, patcher = linear
    load(patcher)
    (loaded,) = [loaded for loaded in loaded_models() if loaded.model is patcher]
    loaded_models().remove(loaded)  # as ComfyUI does when a model says that it is unloaded
    assert loaded.model_unload(memory_to_free=1)
    assert module[0].weight.dtype == torch.float32
    assert patcher.loaded_size() == 0


def test_a_module_that_does_not_fit_is_in_host_memory(linear, monkeypatch):
    module, patcher = linear
    address = addresses(module)

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "to", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            load(patcher)
    assert addresses(module) == address
    assert load(patcher)[0].weight.dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_after_a_character_is_made_all_weights_are_in_their_files(tmp_path):
    """3.3 GiB of encoders and 2.4 GB of fusion stayed in host memory."""
    path = tmp_path / "whole.safetensors"
    recorded.adapter().save(path)
    adapter, encoder = load_adapter(path), load_encoder(*ENCODERS)
    first = encode(PICTURE, encoder, adapter).character.fused
    management.unload_all_models()
    assert not copied(adapter.adapter.parameters(), path)
    assert not copied(encoder.model.parameters(), *ENCODERS)
    assert torch.equal(encode(PICTURE, encoder, adapter).character.fused, first)


def test_a_folded_file_applies_a_character_of_the_whole_one(tmp_path, model):
    """Bit for bit, since FLUX computes in its dtype."""
    recorded.adapter().save(tmp_path / "whole.safetensors")
    fold_adapter(recorded.adapter(), torch.float32).save(tmp_path / "folded.safetensors")
    whole, folded = (load_adapter(tmp_path / f"{name}.safetensors") for name in ("whole", "folded"))
    character = encode(PICTURE, load_encoder(*ENCODERS), whole).character
    plain = sample(model)
    expected = sample(apply(model, CharacterConditioning(whole, character, 0.9)))
    assert torch.equal(sample(apply(model, CharacterConditioning(folded, character, 0.9))), expected)
    assert not torch.equal(expected, plain)


def test_a_folded_file_makes_no_character_and_loads_no_encoder(tmp_path):
    fold_adapter(recorded.adapter(), torch.float32).save(tmp_path / "folded.safetensors")
    adapter, encoder = load_adapter(tmp_path / "folded.safetensors"), load_encoder(*ENCODERS)
    with pytest.raises(ValueError, match="is folded: its weights generate pictures, but cannot make a character"):
        encode(PICTURE, encoder, adapter)
    assert encoder not in [loaded.model for loaded in loaded_models()]
