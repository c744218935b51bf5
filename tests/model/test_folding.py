"""Folded adapters: files for drawing alone, which generate what the whole adapter generates."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import recorded
from support.mapped import copied, linux
from torch.overrides import TorchFunctionMode

from instantcharacter import Character, CharacterAdapter, CharacterFeatures, InstantCharacterPipeline
from instantcharacter.flux.attn_processor import attach
from instantcharacter.model.attention import FoldedCharacterAttention
from instantcharacter.model.folding import fold, fold_adapter
from instantcharacter.training.flow import CharacterFlow

CPU = torch.device("cpu")


@pytest.fixture
def folded(adapter) -> CharacterAdapter:
    return fold_adapter(adapter, torch.float32)


def picture(adapter: CharacterAdapter, character: Character, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pipeline = InstantCharacterPipeline(**recorded.components()).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.set_character_adapter(adapter)
    adapter.projector.resampler.to(dtype)
    settings = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    prompt = {name: value.to(dtype) for name, value in recorded.prompt().items()}
    generator = torch.Generator().manual_seed(7)
    return pipeline(**prompt, **settings, subject_image=character, generator=generator)[0]


def test_a_folded_adapter_has_the_resampler_and_folded_attention_alone(adapter, folded):
    assert folded.folded
    assert folded.config == adapter.config
    projector = {key for key in adapter.projector.state_dict() if key.startswith("resampler.")}
    assert set(folded.projector.state_dict()) == projector
    assert {type(attention) for attention in folded.attention} == {FoldedCharacterAttention}
    assert folded.attention[0].to_k_ip.in_features == adapter.config.resampler_dim + 8
    assert not any(parameter.requires_grad for parameter in folded.attention[0].parameters())


def test_folded_attention_knows_the_scale_of_its_keys(adapter, folded):
    query_scale = torch.linspace(0.5, 2, 128)
    for whole, block in zip(adapter.attention, folded.attention, strict=True):
        assert torch.equal(block.key_scale(query_scale), whole.key_scale(query_scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folded_file_generates_the_whole_files_picture_bit_for_bit(tmp_path, adapter, character, dtype):
    """Of a character that the whole adapter made, where FLUX computes in the folded file's dtype."""
    adapter.save(tmp_path / "whole.safetensors")
    fold_adapter(adapter, dtype).save(tmp_path / "folded.safetensors")
    whole, folded = (CharacterAdapter.from_file(tmp_path / f"{name}.safetensors") for name in ("whole", "folded"))
    expected = picture(whole, character, dtype)
    assert torch.equal(picture(folded, character, dtype), expected)
    assert not torch.equal(picture(folded, Character(-character.fused, character.fingerprint), dtype), expected)


def test_a_folded_file_states_what_it_is(tmp_path, adapter, folded):
    folded.save(tmp_path / "folded.safetensors")
    again = CharacterAdapter.from_file(tmp_path / "folded.safetensors")
    assert again.folded
    assert again.config == adapter.config
    assert again.fingerprint() == folded.fingerprint() == adapter.fingerprint()
    ours, theirs = again.state_dict(), folded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_file_keeps_its_fingerprint_in_any_dtype(tmp_path, adapter, dtype):
    fold_adapter(adapter, dtype).save(tmp_path / "folded.safetensors")
    for asked_for in (None, torch.float32):
        folded = CharacterAdapter.from_file(tmp_path / "folded.safetensors", dtype=asked_for)
        assert folded.fingerprint() == adapter.fingerprint()
        assert folded.float().fingerprint() == adapter.fingerprint()


def test_another_resampler_has_another_fingerprint(adapter, folded):
    with torch.no_grad():
        folded.projector.resampler.proj_in.weight[0, 0] += 1
    assert folded.fingerprint() != adapter.fingerprint()


def test_the_attention_of_a_folded_adapter_is_not_folded_again(folded):
    for again, block in zip(fold(folded, CPU, torch.float32), folded.attention, strict=True):
        for key, weight in block.state_dict().items():
            assert torch.equal(again.state_dict()[key], weight), key


def test_a_bfloat16_file_is_as_exact_as_bfloat16_in_float32(adapter):
    """FLUX in float32 or float16 has the file's rounding: at most half a unit in the last of 8 bits."""
    exact = fold(adapter, CPU, torch.float32)
    rounded = fold(fold_adapter(adapter, torch.bfloat16), CPU, torch.float32)
    for one, other in zip(exact, rounded, strict=True):
        difference = (other.to_k_ip.weight - one.to_k_ip.weight).abs()
        assert (difference <= one.to_k_ip.weight.abs() * 2**-8).all()
        assert difference.any()


def test_products_are_exact_where_the_user_allows_tf32(adapter):
    seen, matmul = [], torch.backends.cuda.matmul

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                new = hasattr(matmul, "fp32_precision")  # torch 2.9 and newer
                seen.append(matmul.fp32_precision == "ieee" if new else not matmul.allow_tf32)
            return function(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with Watch():
            next(fold(adapter, CPU, torch.float32))
        assert matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [True] * 4


@linux
def test_a_folded_file_is_folded_without_a_copy(tmp_path, folded):
    path = tmp_path / "folded.safetensors"
    folded.save(path)
    for block in fold(CharacterAdapter.from_file(path), CPU, torch.float32):
        assert not copied(block.parameters(), path)


# What needs the whole adapter

WHOLE = "Use the whole adapter, instantcharacter_ip-adapter.bin or the file that it was folded from"


def test_a_folded_adapter_makes_no_character(folded):
    features = CharacterFeatures(*recorded.features(tokens=7))
    with pytest.raises(ValueError, match=f"is folded: its weights generate pictures, but cannot make a char.*{WHOLE}"):
        folded.create_character(features)
    with pytest.raises(ValueError, match="has no fusion"):
        folded.projector.fuse(*features)


def test_a_pipeline_says_so_before_it_runs_the_encoder(folded):
    pipeline = InstantCharacterPipeline(**recorded.components())
    pipeline.set_character_adapter(folded)
    pipeline.set_character_encoder(torch.nn.Identity())
    with pytest.raises(ValueError, match="cannot make a character"):
        pipeline.create_character(recorded.PICTURE)


def test_a_folded_adapter_is_not_folded_again(folded):
    with pytest.raises(ValueError, match=f"cannot be folded again. {WHOLE}"):
        fold_adapter(folded, torch.float32)


def test_a_folded_adapter_is_not_trained(folded):
    with pytest.raises(ValueError, match=f"cannot be trained. {WHOLE}"):
        CharacterFlow(recorded.transformer(), folded, checkpointing=False)
    with pytest.raises(ValueError, match="cannot be trained"):
        attach(recorded.transformer(), folded, folded=False)


def test_a_folded_adapter_has_no_bin(tmp_path, folded):
    with pytest.raises(ValueError, match=r"a folded adapter is saved as \.safetensors"):
        folded.save(tmp_path / "folded.bin")
    assert not list(tmp_path.iterdir())


def test_a_folded_file_without_a_fingerprint_is_refused(tmp_path, folded):
    path = tmp_path / "folded.safetensors"
    folded.save(path)
    metadata = {"format": "instantcharacter.folded_adapter", "config": json.dumps(asdict(folded.config))}
    save_file(load_file(path), tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match=r"other.safetensors .*fingerprint.* fold"):
        CharacterAdapter.from_file(tmp_path / "other.safetensors")
