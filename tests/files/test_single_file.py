from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.single_files import MODELS, copied, single_file_models


@pytest.fixture(scope="module")
def models() -> dict[str, tuple]:
    return single_file_models()


@pytest.mark.parametrize("name", MODELS)
def test_unknown_weights_are_named(models, tmp_path, name):
    model, state, config = models[name]
    key = next(key for key in state if "encoder" in key).removesuffix(".weight")
    save_file({**copied(state), f"{key}.gate": torch.ones(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file.safetensors has 1 weights that .* has no place for, .*\.gate first"):
        model.load(tmp_path / "file.safetensors", config, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_keys_of_other_models_and_old_files_are_ignored(models, tmp_path, name):
    model, state, config = models[name]
    others = {
        f"{model.prefix}embeddings.position_ids": torch.arange(3)[None],
        "spiece_model": torch.zeros(3, dtype=torch.uint8),
        "logit_scale": torch.zeros(()),
        "head.probe": torch.zeros(1),
    }
    if name == "t5":
        others["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    save_file({**copied(state), **others}, tmp_path / "file.safetensors")
    model.load(tmp_path / "file.safetensors", config, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_scales_do_not_widen_the_dtype_of_a_file(models, tmp_path, name):
    model, state, config = models[name]
    state = {key: weight.bfloat16() for key, weight in copied(state).items()}
    key = next(key for key, weight in state.items() if "encoder" in key and weight.ndim == 2)
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[key.replace("weight", "scale_weight")] = torch.tensor(2.0)
    save_file(state, tmp_path / "file.safetensors")
    loaded = model.load(tmp_path / "file.safetensors", config, None)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
