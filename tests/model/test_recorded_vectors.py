"""The package against what the reference implementation computed, in float32."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from reference.reference_fill import inputs
from support import recorded
from support.recorded import error

from instantcharacter import AdapterConfig, CharacterAdapter, InstantCharacterPipeline
from instantcharacter.flux.attn_processor import attach
from instantcharacter.model.conditioning import Subject

EXPECTED = recorded.expected()
BLOCK_TOLERANCE = 1e-5
PIPELINE_TOLERANCE = 1e-4


def test_default_adapter_has_the_released_keys_and_shapes():
    released = json.loads((recorded.FOLDER / "checkpoint_keys.json").read_text())
    with torch.device("meta"):
        adapter = CharacterAdapter(AdapterConfig())
    for part, module in (("image_proj", adapter.projector), ("ip_adapter", adapter.attention)):
        assert {key: list(tensor.shape) for key, tensor in module.state_dict().items()} == released[part]


def test_features_are_the_recorded_ones(encoder):
    features = encoder(Image.open(recorded.PICTURE), fit="stretch")
    for name in ("low_res_shallow", "low_res_deep", "high_res_deep"):
        ours = getattr(features, name)[:, ::27]
        assert error(ours, EXPECTED[f"encode.{name}.every_27th_token"]) < BLOCK_TOLERANCE


def test_tokens_are_the_recorded_ones(adapter):
    fused = adapter.projector.fuse(*recorded.features())
    tokens = adapter.projector.resample(fused, torch.tensor(recorded.CONFIG["projector_timesteps"]))
    assert error(tokens, EXPECTED["projector.tokens"]) < BLOCK_TOLERANCE


def test_attention_modules_are_in_the_recorded_order(adapter):
    transformer = recorded.transformer()
    attach(transformer, adapter)
    assert list(transformer.attn_processors) == recorded.CONFIG["attn_processor_order"]


@pytest.mark.parametrize("scale", [None, *recorded.CONFIG["scales"]])
def test_transformer_is_the_recorded_one(adapter, scale):
    transformer = recorded.transformer()
    attach(transformer, adapter, folded=False)
    call = recorded.transformer_inputs()
    if scale is not None:
        subject = Subject(inputs("character_tokens", (2, 16, 64), recorded.SEED), torch.tensor(scale))
        call["joint_attention_kwargs"] = {"subjects": [subject], "image_tokens": 24}
    with torch.no_grad():
        (ours,) = transformer(**call)
    assert (
        error(ours, EXPECTED["transformer.plain" if scale is None else f"transformer.scale_{scale}"]) < BLOCK_TOLERANCE
    )


@pytest.fixture
def drawing(pipeline, encoder) -> InstantCharacterPipeline:
    pipeline.set_character_encoder(encoder)
    return pipeline


def draw(pipeline, **changes):
    picture = Image.open(recorded.PICTURE)
    return pipeline(**{**recorded.run_settings(), "subject_image": picture, "subject_fit": "stretch", **changes})[0]


def test_pipeline_is_the_recorded_one(drawing):
    assert error(draw(drawing), EXPECTED["pipeline.latents"]) < PIPELINE_TOLERANCE


def test_pipeline_at_another_scale_is_the_recorded_one(drawing):
    assert error(draw(drawing, subject_scale=1.3), EXPECTED["pipeline.latents_scale_1.3"]) < PIPELINE_TOLERANCE


def test_true_cfg_is_the_recorded_one(drawing):
    latents = draw(drawing, true_cfg_scale=2.0, **recorded.negative_prompt())
    assert error(latents, EXPECTED["pipeline.true_cfg_2.0"]) < PIPELINE_TOLERANCE


def test_style_lora_is_the_recorded_one(drawing):
    drawing.load_lora_weights(recorded.FOLDER, weight_name=recorded.LORA.name, adapter_name="style")
    drawing.set_adapters(["style"], [0.8])
    assert error(draw(drawing), EXPECTED["pipeline.style_lora_0.8"]) < PIPELINE_TOLERANCE


def test_decoded_picture_is_the_recorded_one(drawing):
    vae = drawing.vae
    latents = drawing._unpack_latents(draw(drawing), 64, 96, drawing.vae_scale_factor)
    decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    assert error(decoded, EXPECTED["pipeline.decoded"]) < PIPELINE_TOLERANCE
    assert torch.allclose(draw(drawing, output_type="pt"), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)
