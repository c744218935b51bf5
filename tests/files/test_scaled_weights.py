from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.single_files import MODELS, copied, single_file_models
from transformers import T5Config, T5EncoderModel


@pytest.fixture(scope="module")
def models() -> dict[str, tuple]:
    return single_file_models()


LAYOUTS = ["scaled_fp8", "comfy_quant", "metadata"]


def is_quantised(key: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and key.endswith(".weight") and "relative_attention_bias" not in key


def scaled(state, layout, format="float8_e4m3fn", by_row=False) -> tuple[dict, dict]:
    """Weights in fp8 with scales as ComfyUI's files have them, and the metadata that goes with them."""
    out, layers, dtype = {}, {}, getattr(torch, format)
    for key, weight in state.items():
        if not is_quantised(key, weight):
            out[key] = weight.clone()
            continue
        most = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()[None]
        scale = (most / torch.finfo(dtype).max).clamp(min=1e-12)
        layer = key.removesuffix(".weight")
        out[key] = (weight / scale).to(dtype)
        out[f"{layer}.scale_weight" if layout == "scaled_fp8" else f"{layer}.weight_scale"] = scale
        out[f"{layer}.scale_input" if layout == "scaled_fp8" else f"{layer}.input_scale"] = torch.ones(1)
        layers[layer] = {"format": format}
        if layout == "comfy_quant":
            text = json.dumps(layers[layer]).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    if layout == "scaled_fp8":
        out["scaled_fp8"] = torch.empty(2, dtype=dtype)
    return out, {"_quantization_metadata": json.dumps({"layers": layers})} if layout == "metadata" else {}


def float_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: parameter.detach().float() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_applied(models, tmp_path, name, layout):
    model, state, config = models[name]
    out, metadata = scaled(state, layout)
    save_file(out, tmp_path / "scaled.safetensors", metadata)
    save_file({key: weight.clone() for key, weight in state.items()}, tmp_path / "plain.safetensors")
    plain, loaded = (
        float_weights(model.load(tmp_path / f"{file}.safetensors", config, torch.float32))
        for file in ("plain", "scaled")
    )
    assert plain.keys() == loaded.keys()
    changed = 0
    for key, weight in plain.items():
        assert ((loaded[key] - weight).abs() <= weight.abs() / 16 + weight.abs().max() / 448 / 512).all(), key
        changed += not torch.equal(loaded[key], weight)
    assert changed  # fp8 rounds


@pytest.mark.parametrize(("format", "by_row"), [("float8_e5m2", False), ("float8_e4m3fn", True)])
def test_scales_per_row_and_in_another_format_are_applied(models, tmp_path, format, by_row):
    model, state, config = models["t5"]
    out, _ = scaled(state, "comfy_quant", format, by_row)
    save_file(out, tmp_path / "scaled.safetensors")
    loaded = model.load(tmp_path / "scaled.safetensors", config, torch.bfloat16)
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    expected = (out[key].float() * out[key.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
    assert torch.equal(loaded.get_parameter(key), expected)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_unknown_formats_are_named(models, tmp_path, format, layout):
    model, state, _ = models["t5"]
    out, metadata = scaled(state, "metadata")
    if layout == "comfy_quant":
        text = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        out["encoder.block.0.layer.0.SelfAttention.k.comfy_quant"] = text
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"shared": {"format": format}}})}
    save_file(out, tmp_path / "t5.safetensors", metadata)
    with pytest.raises(ValueError, match=f"t5.safetensors is stored as {format}.*take it in 16 bits"):
        model.read_config(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("metadata", ["{", "[]", '{"layers": 3}', '{"layers": {"shared": []}}'])
def test_unreadable_metadata_is_refused(models, tmp_path, metadata):
    model, state, _ = models["t5"]
    save_file(scaled(state, "metadata")[0], tmp_path / "t5.safetensors", {"_quantization_metadata": metadata})
    with pytest.raises(ValueError, match="t5.safetensors does not say how its weights are stored"):
        model.read_config(tmp_path / "t5.safetensors")


def test_a_scale_of_another_shape_or_of_a_weight_that_is_not_fp8_is_refused(models, tmp_path):
    model, state, config = models["t5"]
    out, _ = scaled(state, "scaled_fp8")
    key = "encoder.block.0.layer.0.SelfAttention.k"
    for changed in ({f"{key}.scale_weight": torch.ones(3)}, {f"{key}.weight": torch.ones(64, 64)}):
        save_file({**out, **changed}, tmp_path / "t5.safetensors")
        with pytest.raises(ValueError, match="t5.safetensors: encoder.block.0.*expected fp8 with one scale"):
            model.load(tmp_path / "t5.safetensors", config, torch.float32)


LOAD = """
import sys, torch
from instantcharacter.flux.load import T5_XXL
from pathlib import Path
from transformers import T5Config

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
config = T5Config(vocab_size=258, d_model=1024, d_kv=64, d_ff=4096, num_layers=4, num_heads=16)
model = T5_XXL.load(Path(sys.argv[1]), config, torch.bfloat16)
[parameter.detach().view(torch.uint8).max() for parameter in model.parameters()]  # reads every page
print((peak() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
# Weights that become 16 bits from 8 count one and a half times: the file's clean pages stay in memory.
@pytest.mark.parametrize("layout", [None, "scaled_fp8"])
def test_dequantising_needs_little_host_memory_beside_the_weights(tmp_path, layout):
    config = T5Config(vocab_size=258, d_model=1024, d_kv=64, d_ff=4096, num_layers=4, num_heads=16)
    state = copied(T5EncoderModel(config).to(torch.bfloat16).state_dict())
    out, _ = scaled(state, layout) if layout else (state, {})
    save_file(out, tmp_path / "t5.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "t5.safetensors")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert 0.9 < float(done.stdout.split()[-1]) < 1.6
