from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import recorded, tiny
from transformers import AutoConfig, SiglipConfig, SiglipVisionConfig, T5Config, T5EncoderModel

from instantcharacter import CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.character.encoders import DINOV2_NORM, SIGLIP_NORM, _normalised
from instantcharacter.flux.load import CLIP_L, T5_XXL

SIGLIP, DINOV2 = recorded.FOLDER / "siglip", recorded.FOLDER / "dinov2"


def assert_sees_the_same(one: CharacterEncoder, other: CharacterEncoder) -> None:
    picture = Image.open(recorded.PICTURE)
    for ours, theirs in zip(one(picture), other(picture), strict=True):
        assert torch.equal(ours, theirs)


def single_file(folder, tmp_path, change=lambda state: state):
    """A model's weights as one file in a folder of its own, its config beside it."""
    shutil.copy(folder / "config.json", tmp_path)
    path = tmp_path / f"{folder.name}.safetensors"
    save_file(change(load_file(folder / "model.safetensors")), path)
    return path


def without_prefix(state):
    return {key.removeprefix("vision_model."): tensor for key, tensor in state.items()}


def with_text_tower(state):
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 2), "logit_scale": torch.zeros(1)}
    return {**state, **text}


@pytest.mark.parametrize("change", [dict, without_prefix, with_text_tower], ids=["plain", "no prefix", "text tower"])
def test_siglip_is_read_from_a_single_file(encoder, tmp_path, change):
    path = single_file(SIGLIP, tmp_path, change)
    assert_sees_the_same(CharacterEncoder.from_pretrained(path, DINOV2), encoder)


def test_siglip_is_read_from_a_hub_folder_with_a_text_tower(encoder, tmp_path):
    """As google/siglip-so400m-patch14-384 is laid out."""
    vision = SiglipVisionConfig.from_pretrained(SIGLIP)
    SiglipConfig(vision_config=vision.to_dict()).save_pretrained(tmp_path)
    state = with_text_tower(load_file(SIGLIP / "model.safetensors"))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_sees_the_same(CharacterEncoder.from_pretrained(tmp_path, DINOV2), encoder)


def test_dinov2_is_read_from_a_single_file(encoder, tmp_path):
    assert_sees_the_same(CharacterEncoder.from_pretrained(SIGLIP, single_file(DINOV2, tmp_path)), encoder)


@pytest.mark.parametrize(("encoder", "width", "layers"), [(encoders.SIGLIP, 1152, 27), (encoders.DINOV2, 1536, 40)])
def test_released_sizes_need_no_config(encoder, width, layers, tmp_path):
    save_file({encoder.prefix + encoder.telling[0]: torch.zeros(width, 3, 14, 14)}, tmp_path / "a.safetensors")
    config = encoder.read_config(tmp_path / "a.safetensors")
    assert (config.hidden_size, config.num_hidden_layers) == (width, layers)


def test_dtype_is_that_asked_for(tmp_path):
    encoder = CharacterEncoder.from_pretrained(SIGLIP, single_file(DINOV2, tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in encoder(recorded.PICTURE)} == {torch.bfloat16}


def test_weights_are_not_trained(encoder):
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        CharacterEncoder.from_pretrained(tmp_path / "gone.safetensors", DINOV2)


def test_cut_off_file_is_refused(tmp_path):
    path = single_file(SIGLIP, tmp_path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut off.*SigLIP"):
        CharacterEncoder.from_pretrained(path, DINOV2)


def test_another_models_file_is_refused(tmp_path):
    save_file({"unet.weight": torch.zeros(3)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"holds \['unet.weight'\], not SigLIP"):
        CharacterEncoder.from_pretrained(tmp_path / "unet.safetensors", DINOV2)


def test_unknown_size_without_config_is_refused(tmp_path):
    path = single_file(SIGLIP, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"width 32.*1152.*config.json beside it"):
        CharacterEncoder.from_pretrained(path, DINOV2)


def test_exchanged_encoders_are_refused():
    with pytest.raises(ValueError, match="SigLIP"):
        CharacterEncoder.from_pretrained(DINOV2, SIGLIP)


def test_a_missing_weight_is_refused(tmp_path):
    def without_a_layer(state):
        return {key: tensor for key, tensor in state.items() if ".layers.3." not in key}

    with pytest.raises(ValueError, match=r"lacks 16 weights.*layers.3"):
        CharacterEncoder.from_pretrained(single_file(SIGLIP, tmp_path, without_a_layer), DINOV2)


def test_too_few_layers_are_refused(tmp_path):
    shutil.copytree(SIGLIP, tmp_path / "siglip")
    config = tmp_path / "siglip" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 27', '"num_hidden_layers": 12'))
    with pytest.raises(ValueError, match="has 12 layers"):
        CharacterEncoder.from_pretrained(tmp_path / "siglip", DINOV2)


@pytest.mark.parametrize("name", ["siglip", "dinov2"])
def test_folder_with_code_of_its_own_is_refused_and_nothing_in_it_is_run(tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(recorded.FOLDER / name, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    config = folder / "config.json"
    code = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | code))
    folders = {"siglip": SIGLIP, "dinov2": DINOV2} | {name: folder}
    with pytest.raises(ValueError, match=r"config\.json names code of its own"):
        CharacterEncoder.from_pretrained(**folders)
    model = {"siglip": encoders.SIGLIP, "dinov2": encoders.DINOV2}[name]
    model.load(folder, model.config.from_pretrained(folder), torch.float32)  # and if it were not
    assert not (tmp_path / "was_run").exists()


# Weights with scales


@pytest.fixture(scope="module")
def models() -> dict[str, tuple]:
    """Each model that comes in one file, with its weights and the config that another size has beside them."""
    text = tiny.tiny_components()
    encoders_ = {name: AutoConfig.from_pretrained(folder) for name, folder in (("siglip", SIGLIP), ("dinov2", DINOV2))}
    for config in encoders_.values():
        config.vision_use_head = False
    return {
        "siglip": (encoders.SIGLIP, load_file(SIGLIP / "model.safetensors"), encoders_["siglip"]),
        "dinov2": (encoders.DINOV2, load_file(DINOV2 / "model.safetensors"), encoders_["dinov2"]),
        "clip_l": (CLIP_L, text["text_encoder"].state_dict(), text["text_encoder"].config),
        "t5": (T5_XXL, text["text_encoder_2"].state_dict(), text["text_encoder_2"].config),
    }


MODELS = ["siglip", "dinov2", "clip_l", "t5"]
GENERATIONS = ["scaled_fp8", "comfy_quant", "metadata"]


def is_scaled(key: str, weight: torch.Tensor) -> bool:
    return weight.ndim == 2 and key.endswith(".weight") and "relative_attention_bias" not in key


def scaled(state, generation, form="float8_e4m3fn", by_row=False) -> tuple[dict, dict]:
    """Weights in fp8 with scales as ComfyUI's files have them, and the metadata that goes with them."""
    out, layers, dtype = {}, {}, getattr(torch, form)
    for key, weight in state.items():
        if not is_scaled(key, weight):
            out[key] = weight.clone()
            continue
        most = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().amax()[None]
        scale = (most / torch.finfo(dtype).max).clamp(min=1e-12)
        layer = key.removesuffix(".weight")
        out[key] = (weight / scale).to(dtype)
        out[f"{layer}.scale_weight" if generation == "scaled_fp8" else f"{layer}.weight_scale"] = scale
        out[f"{layer}.scale_input" if generation == "scaled_fp8" else f"{layer}.input_scale"] = torch.ones(1)
        layers[layer] = {"format": form}
        if generation == "comfy_quant":
            told = json.dumps(layers[layer]).encode()
            out[f"{layer}.comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    if generation == "scaled_fp8":
        out["scaled_fp8"] = torch.empty(2, dtype=dtype)
    return out, {"_quantization_metadata": json.dumps({"layers": layers})} if generation == "metadata" else {}


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: parameter.detach().float() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_scales_are_applied(models, tmp_path, name, generation):
    model, state, config = models[name]
    out, metadata = scaled(state, generation)
    save_file(out, tmp_path / "scaled.safetensors", metadata)
    save_file({key: weight.clone() for key, weight in state.items()}, tmp_path / "plain.safetensors")
    plain, loaded = (
        numbers(model.load(tmp_path / f"{file}.safetensors", config, torch.float32)) for file in ("plain", "scaled")
    )
    assert plain.keys() == loaded.keys()
    changed = 0
    for key, weight in plain.items():
        assert ((loaded[key] - weight).abs() <= weight.abs() / 16 + weight.abs().max() / 448 / 512).all(), key
        changed += not torch.equal(loaded[key], weight)
    assert changed  # fp8 rounds


@pytest.mark.parametrize(("form", "by_row"), [("float8_e5m2", False), ("float8_e4m3fn", True)])
def test_scales_of_other_shapes_and_types_are_applied_in_the_dtype_asked_for(models, tmp_path, form, by_row):
    model, state, config = models["t5"]
    out, _ = scaled(state, "comfy_quant", form, by_row)
    save_file(out, tmp_path / "scaled.safetensors")
    loaded = model.load(tmp_path / "scaled.safetensors", config, torch.bfloat16)
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    expected = (out[key].float() * out[key.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
    assert torch.equal(loaded.get_parameter(key), expected)


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4"])
@pytest.mark.parametrize("generation", GENERATIONS[1:])
def test_forms_that_are_not_read_are_named(models, tmp_path, form, generation):
    model, state, _ = models["t5"]
    out, metadata = scaled(state, "metadata")
    if generation == "comfy_quant":
        told = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
        out["encoder.block.0.layer.0.SelfAttention.k.comfy_quant"] = told
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"shared": {"format": form}}})}
    save_file(out, tmp_path / "t5.safetensors", metadata)
    with pytest.raises(ValueError, match=f"t5.safetensors is stored as {form}.*take it in 16 bits"):
        model.read_config(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("told", ["{", "[]", '{"layers": 3}', '{"layers": {"shared": []}}'])
def test_unreadable_words_on_the_form_are_refused(models, tmp_path, told):
    model, state, _ = models["t5"]
    save_file(scaled(state, "metadata")[0], tmp_path / "t5.safetensors", {"_quantization_metadata": told})
    with pytest.raises(ValueError, match="t5.safetensors does not say how its weights are stored"):
        model.read_config(tmp_path / "t5.safetensors")


def test_a_scale_that_fits_no_weight_is_refused(models, tmp_path):
    model, state, config = models["t5"]
    out, _ = scaled(state, "scaled_fp8")
    key = "encoder.block.0.layer.0.SelfAttention.k"
    for changed in ({f"{key}.scale_weight": torch.ones(3)}, {f"{key}.weight": torch.ones(64, 64)}):
        save_file({**out, **changed}, tmp_path / "t5.safetensors")
        with pytest.raises(ValueError, match="t5.safetensors: encoder.block.0.*expected fp8 with one scale"):
            model.load(tmp_path / "t5.safetensors", config, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_the_model_has_no_place_for_are_named(models, tmp_path, name):
    model, state, config = models[name]
    key = next(key for key in state if "encoder" in key).removesuffix(".weight")
    save_file({**copied(state), f"{key}.gate": torch.ones(1)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"file.safetensors has 1 weights that .* has no place for, .*\.gate first"):
        model.load(tmp_path / "file.safetensors", config, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_what_files_have_beside_the_weights_does_no_harm(models, tmp_path, name):
    model, state, config = models[name]
    beside = {
        f"{model.prefix}embeddings.position_ids": torch.arange(3)[None],
        "spiece_model": torch.zeros(3, dtype=torch.uint8),
        "logit_scale": torch.zeros(()),
        "head.probe": torch.zeros(1),
    }
    if name == "t5":
        beside["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    save_file({**copied(state), **beside}, tmp_path / "file.safetensors")
    model.load(tmp_path / "file.safetensors", config, torch.float32)


def copied(state: dict) -> dict:
    """A state dict in which no two names share a weight."""
    return {key: weight.clone() for key, weight in state.items()}


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
[parameter.detach().view(torch.uint8).max() for parameter in model.parameters()]  # every page of it is read
print((peak() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count of memory")
# What is widened from 8 bits to 16 counts one and a half times: the pages of the file stay, though they are clean.
@pytest.mark.parametrize("generation", [None, "scaled_fp8"])
def test_dequantising_takes_little_more_host_memory_than_the_weights(tmp_path, generation):
    config = T5Config(vocab_size=258, d_model=1024, d_kv=64, d_ff=4096, num_layers=4, num_heads=16)
    state = copied(T5EncoderModel(config).to(torch.bfloat16).state_dict())
    out, _ = scaled(state, generation) if generation else (state, {})
    save_file(out, tmp_path / "t5.safetensors")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "t5.safetensors")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    assert 0.9 < float(done.stdout.split()[-1]) < 1.6


@pytest.mark.parametrize("norm", [SIGLIP_NORM, DINOV2_NORM])
def test_pixels_are_normalised_as_the_models_were_trained(norm):
    picture = Image.open(recorded.PICTURE).convert("RGB")
    (pixels,) = _normalised(torch.from_numpy(np.asarray(picture).copy())[None], *norm)
    mean, std = norm
    for channel in range(3):
        byte = picture.getpixel((17, 40))[channel]
        assert pixels[channel, 40, 17].item() == pytest.approx((byte / 255 - mean[channel]) / std[channel], abs=1e-6)


def test_fit_changes_what_is_seen(encoder):
    pad, stretch = (encoder(recorded.PICTURE, fit=fit) for fit in ("pad", "stretch"))
    assert not torch.equal(pad.low_res_deep, stretch.low_res_deep)
