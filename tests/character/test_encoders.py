from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import recorded
from transformers import SiglipConfig, SiglipVisionConfig

from instantcharacter import CharacterEncoder
from instantcharacter.character import encoders
from instantcharacter.character.encoders import DINOV2_NORM, SIGLIP_NORM, concat_features, image_to_crops, normalise

SIGLIP, DINOV2 = recorded.FOLDER / "siglip", recorded.FOLDER / "dinov2"


def assert_same_features(one: CharacterEncoder, other: CharacterEncoder) -> None:
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
    assert_same_features(CharacterEncoder.from_pretrained(path, DINOV2), encoder)


def test_siglip_is_read_from_a_hub_folder_with_a_text_tower(encoder, tmp_path):
    """As google/siglip-so400m-patch14-384 is laid out."""
    vision = SiglipVisionConfig.from_pretrained(SIGLIP)
    SiglipConfig(vision_config=vision.to_dict()).save_pretrained(tmp_path)
    state = with_text_tower(load_file(SIGLIP / "model.safetensors"))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_features(CharacterEncoder.from_pretrained(tmp_path, DINOV2), encoder)


def test_dinov2_is_read_from_a_single_file(encoder, tmp_path):
    assert_same_features(CharacterEncoder.from_pretrained(SIGLIP, single_file(DINOV2, tmp_path)), encoder)


@pytest.mark.parametrize(("encoder", "width", "layers"), [(encoders.SIGLIP, 1152, 27), (encoders.DINOV2, 1536, 40)])
def test_released_sizes_need_no_config(encoder, width, layers, tmp_path):
    save_file({encoder.prefix + encoder.width_key[0]: torch.zeros(width, 3, 14, 14)}, tmp_path / "a.safetensors")
    config = encoder.read_config(tmp_path / "a.safetensors")
    assert (config.hidden_size, config.num_hidden_layers) == (width, layers)


def test_weights_and_features_have_the_requested_dtype(tmp_path):
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


def test_swapped_encoders_are_refused():
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
def test_code_in_a_folder_is_refused_and_not_run(tmp_path, name):
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
    model.load(folder, model.config.from_pretrained(folder), torch.float32)  # nor does transformers run it
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("norm", [SIGLIP_NORM, DINOV2_NORM])
def test_pixels_are_normalised_as_the_models_were_trained(norm):
    picture = Image.open(recorded.PICTURE).convert("RGB")
    (pixels,) = normalise(torch.from_numpy(np.asarray(picture).copy())[None], *norm)
    mean, std = norm
    for channel in range(3):
        byte = picture.getpixel((17, 40))[channel]
        assert pixels[channel, 40, 17].item() == pytest.approx((byte / 255 - mean[channel]) / std[channel], abs=1e-6)


def test_fit_changes_the_features(encoder):
    pad, stretch = (encoder(recorded.PICTURE, fit=fit) for fit in ("pad", "stretch"))
    assert not torch.equal(pad.low_res_deep, stretch.low_res_deep)


def test_a_batch_of_pictures_has_the_features_of_each(encoder):
    pictures = [Image.open(recorded.PICTURE), Image.open(recorded.PICTURE).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    together = encoder.encode_images(torch.stack([image_to_crops(picture) for picture in pictures]))
    for i, picture in enumerate(pictures):
        for features, alone in zip(together, encoder(picture), strict=True):
            assert recorded.error(features[i : i + 1], alone) < 1e-5


def test_class_token_is_dropped():
    siglip, dinov2 = torch.zeros(1, 4, 3), torch.arange(5.0).reshape(1, 5, 1).expand(1, 5, 2)
    features = concat_features([siglip, siglip], [dinov2, dinov2])
    assert features.shape == (1, 8, 5)
    assert features[0, :, 4].tolist() == [1, 2, 3, 4, 1, 2, 3, 4]
