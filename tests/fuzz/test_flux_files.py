"""FLUX in one file, as safetensors and GGUF, and LoRAs for it."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from support import mutations, recorded
from support.recorded import fill_module_
from support.tiny_models import write_gguf

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux.load import FluxFiles, load_flux
from instantcharacter.flux.lora import load_lora

FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
}
SETTINGS = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 4}, "transformer.use_rslora": False}


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    return fill_module_(FluxTransformer2DModel(**FLUX), "transformer.", 11)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**recorded.CONFIG["vae"]).save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def good(transformer) -> bytes:
    return save({key: weight.contiguous() for key, weight in transformer.state_dict().items()})


def loaded(vae):
    return lambda path: load_flux(FluxFiles(path, vae=vae), torch.float32).transformer


@given(st.data())
def test_changed_safetensors(outcomes, tmp_path, good, vae, data):
    changed = data.draw(mutations.edited_safetensors(good))

    def is_right(model) -> bool:
        content = mutations.content_of_safetensors(changed)
        state = model.state_dict()  # NaN in it: the pipeline refuses what comes of it
        return all(mutations.same(state[key], content.get(key)) or not mutations.finite(state[key]) for key in state)

    outcomes.judge(mutations.write(tmp_path / "f.safetensors", changed, loaded(vae)), is_right)


@pytest.fixture(scope="module")
def good_gguf(tmp_path_factory, transformer) -> bytes:
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "flux.gguf"
    fields = {"general.name": "a name", "some.numbers": [1, 2, 3], "some.texts": ["a", "b"]}
    write_gguf(path, transformer.state_dict(), fields)
    return path.read_bytes()


@given(st.data())
def test_changed_gguf(outcomes, tmp_path, good_gguf, vae, transformer, data):
    changed = data.draw(mutations.edited_bytes(good_gguf, 6000))
    shapes = {key: weight.shape for key, weight in transformer.state_dict().items()}

    def is_right(model) -> bool:
        state = model.state_dict()
        return {key: getattr(weight, "quant_shape", weight.shape) for key, weight in state.items()} == shapes

    outcomes.judge(mutations.write(tmp_path / "f.gguf", changed, loaded(vae)), is_right)


def gguf_with(values: bytes, count: int, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values


def test_gguf_headers_that_state_too_much(outcomes, tmp_path, vae):
    name = struct.pack("<Q", 1) + b"a"
    headers = [gguf_with(name + struct.pack("<IIQ", 9, kind, 2**40) + b"\0" * 99, 1) for kind in range(14)]
    headers += [
        gguf_with(b"", 2**60),
        gguf_with(b"", 0, 2**60),
        gguf_with(struct.pack("<Q", 2**60), 1),
        gguf_with((name + struct.pack("<IIQ", 9, 0, 2**20)) * 9, 9),
        gguf_with(name + struct.pack("<I4QIQ", 4, 2**16, 2**16, 2**16, 2**16, 0, 0), 0, 1),
        gguf_with((name + struct.pack("<IQIQ", 1, 8, 0, 0)) * 500, 0, 500) + b"\0" * 32,
        gguf_with(name + struct.pack("<IQIQ", 1, 0, 0, 0), 0, 1),
    ]
    for header in headers:
        assert outcomes.judge(mutations.write(tmp_path / "f.gguf", header, loaded(vae))) == "clear"


@pytest.mark.parametrize("blocks", ["double_blocks", "transformer_blocks"])
def test_thousands_of_empty_blocks_are_refused_at_once(outcomes, tmp_path, vae, transformer, blocks):
    state = dict(transformer.state_dict())
    state |= {f"{blocks}.{i}.x": torch.zeros(1) for i in range(3000)}
    save_file({key: weight.contiguous() for key, weight in state.items()}, tmp_path / "f.safetensors")
    assert outcomes.judge(lambda: loaded(vae)(tmp_path / "f.safetensors")) == "clear"


@pytest.fixture(scope="module")
def pipeline(transformer) -> InstantCharacterPipeline:
    return InstantCharacterPipeline(**{**recorded.components(), "transformer": transformer})


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    layers = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k")
    torch.manual_seed(0)
    pairs = {f"transformer.{layer}.lora_A.weight": torch.randn(2, 128) for layer in layers}
    return pairs | {f"transformer.{layer}.lora_B.weight": torch.randn(128, 2) for layer in layers}


def styled(pipeline):
    """Loads a LoRA, and gives its matrices."""

    def load(path) -> list[torch.Tensor]:
        try:
            load_lora(pipeline, path, "style")
            return [p.clone() for name, p in pipeline.transformer.named_parameters() if ".lora_" in name]
        finally:
            pipeline.unload_lora_weights()

    return load


def is_finite(matrices: list[torch.Tensor]) -> bool:
    return bool(matrices) and mutations.finite(*matrices)


@given(st.data())
def test_changed_loras(outcomes, tmp_path, pipeline, lora, data):
    good = save(lora, {"lora_adapter_metadata": json.dumps(SETTINGS)})
    changed = data.draw(mutations.edited_safetensors(good))
    outcomes.judge(mutations.write(tmp_path / "l.safetensors", changed, styled(pipeline)), is_finite)


@given(st.data())
def test_changed_settings_of_loras(outcomes, tmp_path, pipeline, lora, data):
    text = data.draw(mutations.json_bytes(SETTINGS)).decode(errors="replace")
    changed = save(lora, {"lora_adapter_metadata": text})
    outcomes.judge(mutations.write(tmp_path / "l.safetensors", changed, styled(pipeline)), is_finite)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e38, 0, -2, True, 2j])
def test_alphas_of_loras(outcomes, tmp_path, pipeline, lora, alpha):
    key = "transformer.transformer_blocks.0.attn.to_q.alpha"
    torch.save({**lora, key: torch.tensor(alpha)}, tmp_path / "l.pt")
    outcome = outcomes.judge(lambda: styled(pipeline)(tmp_path / "l.pt"), is_finite)
    assert outcome == ("right" if alpha in (0, -2) and alpha is not True else "clear")


def test_good_files_are_right(outcomes, tmp_path, good, good_gguf, vae, pipeline, lora):
    for name, content in (("f.safetensors", good), ("f.gguf", good_gguf)):
        assert outcomes.judge(mutations.write(tmp_path / name, content, loaded(vae))) == "right"
    save_file(lora, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(SETTINGS)})
    assert outcomes.judge(lambda: styled(pipeline)(tmp_path / "l.safetensors"), is_finite) == "right"
