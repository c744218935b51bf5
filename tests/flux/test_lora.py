"""Style LoRAs in the layouts that trainers write, and files that are none."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import recorded, tiny, tiny_models
from support.recorded import error
from torch import Tensor

from instantcharacter import InstantCharacterPipeline
from instantcharacter.cli.main import main
from instantcharacter.files.catalog import TOY_FOLDER, toy
from instantcharacter.flux.fp8 import store_in_fp8
from instantcharacter.flux.load import FluxFiles, load_flux
from instantcharacter.flux.lora import load_lora

RANK, STRENGTH = 4, 0.7
Matrices = dict[str, tuple[Tensor, Tensor]]
"""By layer: down [rank, in] and up [out, rank]."""


def matrices(state: dict[str, Tensor], layers: list[str] | None = None) -> Matrices:
    """A LoRA for these layers, or for all that are linear."""
    torch.manual_seed(0)
    weights = {key.removesuffix(".weight"): weight for key, weight in state.items() if weight.ndim == 2}
    return {
        layer: (torch.randn(RANK, weight.shape[1]) / 8, torch.randn(weight.shape[0], RANK) / 8)
        for layer, weight in weights.items()
        if layers is None or layer in layers
    }


def merged(state: dict[str, Tensor], lora: Matrices, scale: float) -> dict[str, Tensor]:
    """Weights with what a LoRA adds to them."""
    return {
        **state,
        **{f"{layer}.weight": state[f"{layer}.weight"] + scale * up @ down for layer, (down, up) in lora.items()},
    }


def written(lora: Matrices, prefix: str, ends: tuple[str, str], flat: bool = False, alpha: float | None = None) -> dict:
    """A LoRA's tensors under the keys of one layout."""
    out = {}
    for layer, pair in lora.items():
        name = prefix + (layer.replace(".", "_") if flat else layer)
        out |= {f"{name}.{end}": matrix for end, matrix in zip(ends, pair)}
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def pair(layer: str, inputs: int, outputs: int) -> dict:
    return written({layer: (torch.ones(RANK, inputs), torch.ones(outputs, RANK))}, "", AB)


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
RELEASED = {
    "kohya": lambda lora: written(lora, "lora_unet_", DOWN_UP, flat=True, alpha=1.0),
    "kohya, odd alpha": lambda lora: written(lora, "lora_unet_", DOWN_UP, flat=True, alpha=0.3),
    "ComfyUI": lambda lora: written(lora, "diffusion_model.", AB),
    "ComfyUI, down and up": lambda lora: written(lora, "diffusion_model.", DOWN_UP, alpha=2.0),
    "peft": lambda lora: written(lora, "base_model.model.", AB),
    "no prefix": lambda lora: written(lora, "", AB),
}
DIFFUSERS = {
    "diffusers": lambda lora: written(lora, "transformer.", AB),
    "diffusers, alpha": lambda lora: written(lora, "transformer.", AB, alpha=8.0),
    "peft": lambda lora: written(lora, "base_model.model.", AB),
    "peft, named": lambda lora: written(
        lora, "base_model.model.transformer.", ("lora_A.default.weight", "lora_B.default.weight")
    ),
    "no prefix": lambda lora: written(lora, "", AB),
    "OneTrainer": lambda lora: written(lora, "lora_transformer_", DOWN_UP, flat=True, alpha=1.0),
}


def pipeline_of(transformer=None, **changes) -> InstantCharacterPipeline:
    components = recorded.components()
    pipeline = InstantCharacterPipeline(
        **{**components, "transformer": transformer or recorded.transformer(), **changes}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **changes) -> Tensor:
    return pipeline(**{**recorded.run_settings(), **changes})[0]


def generate_styled(pipeline, path: Path, strength: float = STRENGTH, **changes) -> Tensor:
    load_lora(pipeline, path, "style")
    pipeline.set_adapters(["style"], [strength])
    return generate(pipeline, **changes)


def alpha_of(tensors: dict) -> float:
    return next((tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")), RANK)


@pytest.fixture
def lora_file(tmp_path):
    def save(tensors: dict, metadata: dict | None = None) -> Path:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "lora.safetensors", metadata
        )
        return tmp_path / "lora.safetensors"

    return save


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return generate(pipeline_of())


@pytest.mark.parametrize("layout", RELEASED)
def test_layouts_of_released_names_generate_as_merged_weights_do(tmp_path, lora_file, layout, plain):
    state = tiny_models.released_layout(recorded.transformer().state_dict())
    lora = matrices(state)
    tensors = RELEASED[layout](lora)
    whole = merged(state, lora, STRENGTH * alpha_of(tensors) / RANK)
    save_file({key: weight.contiguous() for key, weight in whole.items()}, tmp_path / "merged.safetensors")
    pipeline_of().vae.save_pretrained(tmp_path)
    expected = load_flux(FluxFiles(tmp_path / "merged.safetensors", vae=vae_file(tmp_path)), torch.float32)
    generated = generate_styled(pipeline_of(), lora_file(tensors))
    assert error(generated, generate(expected)) < 1e-5
    assert error(generated, plain) > 1e-2


def vae_file(folder: Path) -> Path:
    return next(folder.glob("diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("layout", DIFFUSERS)
def test_layouts_of_diffusers_names_generate_as_merged_weights_do(lora_file, layout, plain):
    transformer = recorded.transformer()
    state = transformer.state_dict()
    lora = matrices(state)
    tensors = DIFFUSERS[layout](lora)
    transformer.load_state_dict(merged(state, lora, STRENGTH * alpha_of(tensors) / RANK))
    generated = generate_styled(pipeline_of(), lora_file(tensors))
    assert error(generated, generate(pipeline_of(transformer))) < 1e-5
    assert error(generated, plain) > 1e-2


def test_xlabs_layout_generates_as_merged_weights_do(lora_file, plain):
    transformer = recorded.transformer()
    state = transformer.state_dict()
    attn, single = "transformer_blocks.1.attn", "single_transformer_blocks.1"
    fused = {
        "double_blocks.1.processor.qkv_lora1": [f"{attn}.{name}" for name in ("to_q", "to_k", "to_v")],
        "double_blocks.1.processor.qkv_lora2": [
            f"{attn}.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")
        ],
        "double_blocks.1.processor.proj_lora1": [f"{attn}.to_out.0"],
        "double_blocks.1.processor.proj_lora2": [f"{attn}.to_add_out"],
        "single_blocks.1.processor.qkv_lora": [f"{single}.attn.{name}" for name in ("to_q", "to_k", "to_v")],
        "single_blocks.1.processor.proj_lora": [f"{single}.proj_out"],
    }
    tensors, lora = {}, {}
    for name, layers in fused.items():
        parts = matrices(state, layers)
        down = parts[layers[0]][0]
        lora |= {layer: (down, parts[layer][1]) for layer in layers}
        tensors[f"{name}.down.weight"] = down
        tensors[f"{name}.up.weight"] = torch.cat([parts[layer][1] for layer in layers])
    transformer.load_state_dict(merged(state, lora, STRENGTH))
    generated = generate_styled(pipeline_of(), lora_file(tensors))
    assert error(generated, generate(pipeline_of(transformer))) < 1e-5
    assert error(generated, plain) > 1e-2


def few_step_layers(state: dict[str, Tensor], around_blocks: tuple[str, ...]) -> list[str]:
    """All linear layers of the blocks, and some around them."""
    linear = [key.removesuffix(".weight") for key, weight in state.items() if weight.ndim == 2]
    return [name for name in linear if "transformer_blocks." in name or name.startswith(around_blocks)]


EIGHT_STEPS = {
    # ByteDance's Hyper-FLUX.1-dev-8steps-lora, at its strength; keys as listed in kohya-ss/sd-scripts issue 1523
    "Hyper": (("context_embedder", "norm_out", "proj_out", "time_text_embed", "x_embedder"), "transformer.", 0.125),
    # alimama's FLUX.1-Turbo-Alpha: diffusers' layout too; whether with the prefix does not matter
    "Turbo-Alpha": (("proj_out", "x_embedder"), "transformer.", 1.0),
    "Turbo-Alpha, no prefix": (("proj_out", "x_embedder"), "", 1.0),
}


@pytest.mark.parametrize("name", EIGHT_STEPS)
def test_loras_for_eight_steps_generate_as_merged_weights_do(lora_file, name, caplog):
    around_blocks, prefix, strength = EIGHT_STEPS[name]
    transformer = recorded.transformer()
    state = transformer.state_dict()
    lora = matrices(state, few_step_layers(state, around_blocks))
    assert len(lora) > 40
    transformer.load_state_dict(merged(state, lora, strength))
    expected = generate(pipeline_of(transformer), num_inference_steps=8)
    with caplog.at_level(logging.WARNING):
        ours = generate_styled(pipeline_of(), lora_file(written(lora, prefix, AB)), strength, num_inference_steps=8)
    assert error(ours, expected) < 1e-5
    assert not caplog.text


def test_two_loras_add_up(lora_file):
    transformer = recorded.transformer()
    state = transformer.state_dict()
    first, second = matrices(state), {layer: (down / 2, -up) for layer, (down, up) in matrices(state).items()}
    pipeline = pipeline_of()
    for name, lora in (("style0", first), ("style1", second)):
        load_lora(pipeline, lora_file(written(lora, "transformer.", AB)), name)
    pipeline.set_adapters(["style0", "style1"], [0.7, 0.4])
    transformer.load_state_dict(merged(merged(state, first, 0.7), second, 0.4))
    assert error(generate(pipeline), generate(pipeline_of(transformer))) < 1e-5


def test_layers_may_have_ranks_of_their_own(lora_file):
    transformer = recorded.transformer()
    state = transformer.state_dict()
    lora = matrices(state)
    for i, (layer, (down, up)) in enumerate(lora.items()):
        lora[layer] = (down[: 1 + i % RANK], up[:, : 1 + i % RANK])
    transformer.load_state_dict(merged(state, lora, STRENGTH))
    path = lora_file(written(lora, "transformer.", AB))
    assert error(generate_styled(pipeline_of(), path), generate(pipeline_of(transformer))) < 1e-5


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0 / RANK), (True, 2.0 / math.sqrt(RANK))])
def test_alpha_in_diffusers_metadata_counts(lora_file, rslora, scale):
    transformer = recorded.transformer()
    state = transformer.state_dict()
    lora = matrices(state, ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"])
    settings = {
        "transformer.lora_alpha": 2.0,
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 8.0},
        "transformer.use_rslora": rslora,
    }
    path = lora_file(written(lora, "transformer.", AB), {"lora_adapter_metadata": json.dumps(settings)})
    first, second = ({layer: pair} for layer, pair in lora.items())
    transformer.load_state_dict(merged(merged(state, first, scale), second, 4 * scale))
    assert error(generate_styled(pipeline_of(), path, 1.0), generate(pipeline_of(transformer))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_loras_of_every_dtype_are_read(lora_file, plain, dtype):
    lora = matrices(recorded.transformer().state_dict(), ["transformer_blocks.0.attn.to_q"])
    tensors = {key: tensor.to(dtype) for key, tensor in written(lora, "transformer.", AB).items()}
    generated = generate_styled(pipeline_of(), lora_file(tensors))
    exact = {key: tensor.float() for key, tensor in tensors.items()}
    assert torch.equal(generated, generate_styled(pipeline_of(), lora_file(exact)))
    assert error(generated, plain) > 1e-3


def test_a_checkpoint_of_torchs_is_read(tmp_path, plain):
    lora = matrices(recorded.transformer().state_dict(), ["transformer_blocks.0.attn.to_q"])
    torch.save(written(lora, "transformer.", AB), tmp_path / "lora.pt")
    assert error(generate_styled(pipeline_of(), tmp_path / "lora.pt"), plain) > 1e-3
    torch.save({"state_dict": {}}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="lora.pt holds more than tensors"):
        load_lora(pipeline_of(), tmp_path / "lora.pt", "style")


# Text encoders


@pytest.fixture
def words() -> InstantCharacterPipeline:
    """A pipeline with text encoders."""
    pipeline = InstantCharacterPipeline(**tiny.tiny_components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Q_PROJ = "encoder.layers.1.self_attn.q_proj"


def clip_lora(prefix: str, ends=DOWN_UP, width=tiny.POOLED_WIDTH, **settings) -> dict:
    torch.manual_seed(1)
    pair = torch.randn(RANK, width), torch.randn(width, RANK)
    return written({f"text_model.{Q_PROJ}": pair}, prefix, ends, **settings)


@pytest.mark.parametrize(
    "tensors",
    [
        clip_lora("lora_te1_", flat=True, alpha=float(RANK)),
        clip_lora("lora_te_", flat=True),
        clip_lora("text_encoder.", AB),
        clip_lora("text_encoders.clip_l.transformer.", AB),
    ],
    ids=["kohya", "kohya, old", "diffusers", "ComfyUI"],
)
def test_clips_part_acts_as_merged_weights_do(words, lora_file, caplog, tensors):
    before = words.encode_prompt("a fox", None)[1]
    load_lora(words, lora_file(tensors), "style")
    words.set_adapters(["style"], [STRENGTH])
    styled = words.encode_prompt("a fox", None)[1]
    other = InstantCharacterPipeline(**tiny.tiny_components())
    (weight,) = (p for name, p in other.text_encoder.named_parameters() if name.endswith(f"{Q_PROJ}.weight"))
    down, up = (tensor for key, tensor in tensors.items() if not key.endswith("alpha"))
    weight.data += STRENGTH * up @ down
    assert error(styled, other.encode_prompt("a fox", None)[1]) < 1e-5
    assert error(styled, before) > 1e-3
    assert "changes CLIP alone" in caplog.text


def test_a_lora_for_clip_alone_needs_clip(lora_file):
    with pytest.raises(ValueError, match=r"lora.safetensors is no LoRA.*CLIP's \(which is not loaded\)"):
        load_lora(pipeline_of(), lora_file(clip_lora("lora_te1_", flat=True)), "style")


def flux_lora(**more: Tensor) -> dict:
    lora = matrices(recorded.transformer().state_dict(), ["transformer_blocks.0.attn.to_q"])
    return {**written(lora, "transformer.", AB), **more}


@pytest.mark.parametrize(
    ("more", "left_out"),
    [
        (clip_lora("lora_te1_", flat=True), f"lora_te1_text_model_{Q_PROJ}".replace(".", "_")),
        (written({"encoder.block.0": (torch.ones(1, 2), torch.ones(2, 1))}, "lora_te2_", DOWN_UP, True), "lora_te2_"),
        ({"diffusion_model.double_blocks.0.img_attn.proj.diff_b": torch.ones(2)}, "img_attn.proj.diff_b"),
        ({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.ones(2)}, "query_norm.diff"),
        (pair("transformer_blocks.18.attn.to_q", 256, 256), "transformer_blocks.18"),
    ],
    ids=["CLIP, not loaded", "T5", "biases", "norms", "a block that is not there"],
)
def test_what_is_not_used_of_a_lora_is_logged(lora_file, plain, caplog, more, left_out):
    generated = generate_styled(pipeline_of(), lora_file({**flux_lora(), **more}))
    assert error(generated, plain) > 1e-3
    assert "lora.safetensors: 1 of 2 layers in it are not used" in caplog.text
    assert left_out in caplog.text


def test_a_clip_part_of_another_width_is_left_out(words, lora_file, caplog):
    lora = matrices(words.transformer.state_dict(), ["transformer_blocks.0.attn.to_q"])
    tensors = written(lora, "transformer.", AB) | clip_lora("lora_te1_", flat=True, width=64)
    load_lora(words, lora_file(tensors), "style")
    assert words.get_list_adapters() == {"transformer": ["style"]}
    assert "1 of 2 layers in it are not used: lora_te1_" in caplog.text


def test_a_dora_is_used_but_for_its_magnitudes_with_a_warning(lora_file, caplog):
    without = generate_styled(pipeline_of(), lora_file(flux_lora()))
    dora = flux_lora(**{"transformer.transformer_blocks.0.attn.to_q.dora_scale": torch.ones(256, 1)})
    assert torch.equal(generate_styled(pipeline_of(), lora_file(dora)), without)
    assert "lora.safetensors is a DoRA: its magnitudes are left out" in caplog.text


def test_a_lora_that_is_used_whole_logs_nothing(lora_file, caplog):
    caplog.set_level(logging.WARNING)
    generate_styled(pipeline_of(), lora_file(flux_lora()))
    assert not caplog.records


# Files that are none


NATIVELY = "ComfyUI's own Load LoRA reads it: take .* InstantCharacter Apply"
NONE_OF_IT = {
    "Stable Diffusion or SDXL": (
        pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, 640), "FLUX.1"
    ),
    "Wan": (pair("diffusion_model.blocks.0.self_attn.q", 1536, 1536), "FLUX.1"),
    "FLUX.2": (pair("diffusion_model.double_stream_modulation_img.lin", 99, 99), "FLUX.1"),
    "Chroma": (pair("diffusion_model.distilled_guidance_layer.in_proj", 64, 256), "FLUX.1"),
    "HunyuanVideo": (pair("diffusion_model.double_blocks.0.img_attn_qkv", 256, 768), "FLUX.1"),
    "Qwen-Image": (pair("diffusion_model.transformer_blocks.0.img_mod.1", 256, 256), "FLUX.1"),
    "LTX-Video": (pair("diffusion_model.transformer_blocks.0.attn1.to_q", 256, 256), "FLUX.1"),
    "Z-Image": (pair("diffusion_model.layers.0.attention.to_q", 256, 256), "FLUX.1"),
    "IP-Adapter": (pair("double_blocks.0.processor.ip_adapter_double_stream_k_proj", 4, 4), "Load Character Adapter"),
    "LoKr": ({"lycoris_double_blocks_0_img_attn_proj.lokr_w1": torch.ones(4, 4)}, NATIVELY),
    "LoHa": ({"lycoris_double_blocks_0_img_attn_proj.hada_w1_a": torch.ones(4, 4)}, NATIVELY),
    "OFT": ({"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": torch.ones(4, 4, 4)}, NATIVELY),
    "GLoRA": ({"lora_unet_double_blocks_0_img_attn_proj.a1.weight": torch.ones(4, 4)}, NATIVELY),
    "control LoRA": (
        {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(128), **pair("img_in", 128, 256)}, NATIVELY
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE_OF_IT)
def test_what_is_no_lora_for_flux_is_refused_by_name(lora_file, name):
    tensors, advice = NONE_OF_IT[name]
    known = {"alone": tensors, "beside FLUX's layers": {**flux_lora(), **tensors}}
    for beside in known.values():
        with pytest.raises(
            ValueError, match=f"lora.safetensors looks like an? .*{name}.*, by .*; .*{advice}"
        ) as refused:
            load_lora(pipeline_of(), lora_file(beside), "style")
        assert next(iter(tensors)).split(".lora_")[0] in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["transformer.x_embedder", "diffusion_model.img_in"])
def test_a_control_lora_is_recognised_by_its_channels(lora_file, key):
    with pytest.raises(ValueError, match=rf"looks like a control LoRA .*, by {key}, which takes 128 channels"):
        load_lora(pipeline_of(), lora_file(pair(key, 128, 256)), "style")


def test_a_lora_of_another_width_is_refused(lora_file):
    with pytest.raises(ValueError, match="lora.safetensors is for a model of another width: .*takes 3072 numbers.*256"):
        load_lora(pipeline_of(), lora_file(pair("transformer.transformer_blocks.0.attn.to_q", 3072, 3072)), "style")


@pytest.mark.parametrize(
    "tensors",
    [
        pair("diffusion_model.some_blocks.0.q", 256, 256),
        {"step": torch.ones(1)},
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 256)},
        pair("transformer.transformer_blocks.0.attn.to_q", 256, 256)
        | {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.ones(2)},
        {key: torch.ones(()) for key in pair("transformer.transformer_blocks.0.attn.to_q", 1, 1)},
        {key: torch.ones(0, 0) for key in pair("transformer.transformer_blocks.0.attn.to_q", 1, 1)},
        {**flux_lora(), **pair("transformer.transformer_blocks.20.attn.to_q", 256, 256),
         **pair("transformer.transformer_blocks.21.attn.to_q", 256, 256)},
    ],
    ids=["unknown layers", "no layer", "half a layer", "two alphas", "numbers", "nothing", "most not there"],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_keys(lora_file, tensors):
    with pytest.raises(ValueError, match=r"lora.safetensors is no LoRA for what is loaded: .*such as \w+.*for FLUX.1"):
        load_lora(pipeline_of(), lora_file(tensors), "style")


def test_missing_cut_off_and_unreadable_files_are_named(tmp_path, lora_file):
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        load_lora(pipeline_of(), tmp_path / "gone.safetensors", "style")
    path = lora_file(flux_lora())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="lora.safetensors is cut off"):
        load_lora(pipeline_of(), path, "style")
    path = lora_file(flux_lora(), {"lora_adapter_metadata": "["})
    with pytest.raises(ValueError, match="lora.safetensors has settings"):
        load_lora(pipeline_of(), path, "style")


# FLUX in small storage


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, FluxFiles]:
    """FLUX in single files of each storage."""
    folder = tmp_path_factory.mktemp("flux")
    components = recorded.components()
    components["vae"].save_pretrained(folder)
    state = recorded.transformer().state_dict()
    save_file(state, folder / "float.safetensors")
    save_file({key: weight.to(torch.float8_e4m3fn) for key, weight in state.items()}, folder / "fp8.safetensors")
    return {name: FluxFiles(folder / f"{name}.safetensors", vae=vae_file(folder)) for name in ("float", "fp8")}


@pytest.mark.parametrize("name", ["float", "fp8"])
def test_flux_in_fp8_generates_with_a_lora_that_is_not_rounded(files, lora_file, name):
    path = lora_file(written(matrices(recorded.transformer().state_dict()), "transformer.", AB))
    small, rounded = load_flux(files[name], torch.float32, "fp8_e4m3fn"), pipeline_of()
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in small.transformer.parameters()}
    rounded.transformer.load_state_dict({key: w.float() for key, w in small.transformer.state_dict().items()})
    small.set_progress_bar_config(disable=True)
    assert error(generate_styled(small, path), generate_styled(rounded, path)) < 1e-5
    dtypes = {p.dtype for key, p in small.transformer.named_parameters() if "lora_" in key}
    assert dtypes == {torch.float32}
    assert small.transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn


def test_storing_in_fp8_after_the_lora_generates_the_same(lora_file):
    path = lora_file(written(matrices(recorded.transformer().state_dict()), "transformer.", AB))
    before, after = pipeline_of(), pipeline_of()
    store_in_fp8(before.transformer, torch.float32)
    load_lora(after, path, "style")
    store_in_fp8(after.transformer, torch.float32)
    after.set_adapters(["style"], [STRENGTH])
    assert error(generate_styled(before, path), generate(after)) < 1e-6


@pytest.mark.parametrize("strategy", ["none", "stream", "model", "sequential"])
def test_fp8_and_a_lora_generate_the_same_under_a_plan(files, lora_file, adapter, character, strategy):
    path = lora_file(written(matrices(recorded.transformer().state_dict()), "transformer.", AB))
    generated = []
    for offload in (None, strategy):
        pipeline = load_flux(files["fp8"], torch.float32, "fp8_e4m3fn")
        pipeline.set_progress_bar_config(disable=True)
        load_lora(pipeline, path, "style")
        pipeline.set_adapters(["style"], [STRENGTH])
        pipeline.set_character_adapter(adapter)
        if offload:
            pipeline.enable_character_offload(offload)
        generated.append(generate(pipeline, subject_image=character))
    assert error(*generated) < 1e-6


def test_gguf_generates_with_a_lora(tmp_path, files, lora_file, plain):
    pytest.importorskip("gguf")
    tiny_models.save_gguf(tmp_path / "flux.gguf")
    path = lora_file(written(matrices(recorded.transformer().state_dict()), "transformer.", AB))
    pipeline = load_flux(FluxFiles(tmp_path / "flux.gguf", vae=files["float"].vae), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generated = generate_styled(pipeline, path)
    assert error(generated, generate_styled(pipeline_of(), path)) < 0.1
    assert error(generated, plain) > 0.2


# The command line


def run_command(tmp_path: Path, *lora: object) -> int:
    settings = (
        "--model",
        "toy",
        "--reference",
        TOY_FOLDER.parent / "monster.png",
        "--prompt",
        "pixel art of a monster",
    )
    small = ("--size", 64, "--steps", 1, "--seed", 0, "--fp8", "--output", tmp_path / "out.png")
    return main(["generate", *map(str, (*settings, *small, *lora))])


def test_command_line_generates_in_fp8_with_a_lora(tmp_path):
    pictures = []
    for lora in ((), ("--lora", f"{toy('lora')}:1.0")):
        assert run_command(tmp_path, *lora) == 0
        pictures.append(Image.open(tmp_path / "out.png").tobytes())
    assert pictures[0] != pictures[1]


def test_command_line_says_in_one_line_what_a_lora_is(tmp_path, lora_file, capsys):
    assert run_command(tmp_path, "--lora", lora_file(NONE_OF_IT["LoKr"][0])) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "lora.safetensors looks like a LoKr" in message
    assert "InstantCharacter Apply" in message
