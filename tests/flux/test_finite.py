"""Damaged models end in an error, not in a black picture."""

from __future__ import annotations

import math

import pytest
import torch
from support import recorded
from support.tiny import tiny_pipeline

from instantcharacter.flux.finite import check_loaded


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_2"])
def test_a_damaged_model_ends_in_an_error(part, value):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "latent"}
    assert pipeline("a fox", **settings).images.isfinite().all()
    weight = max(getattr(pipeline, part).parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        weight.fill_(value)
    pipeline.clear_cache()
    with pytest.raises(ValueError, match="FLUX predicts NaN or infinities, which would be a black picture"):
        pipeline("a fox", **settings)


def test_nothing_stays_on_the_transformer(pipeline):
    before = len(pipeline.transformer._forward_hooks)
    pipeline(**recorded.run_settings())
    assert len(pipeline.transformer._forward_hooks) == before


def test_a_damaged_vae_is_refused():
    parts = recorded.components()
    check_loaded(parts["transformer"], parts["vae"], "FLUX.gguf", "VAE.safetensors")
    with torch.no_grad():
        next(parts["vae"].parameters()).view(-1)[3] = math.nan
    with pytest.raises(ValueError, match=r"VAE\.safetensors has a VAE with weights from nan .*expected finite numbers"):
        check_loaded(parts["transformer"], parts["vae"], "FLUX.gguf", "VAE.safetensors")


@pytest.mark.parametrize(("part", "name"), [("transformer", "FLUX"), ("vae", "VAE")])
def test_a_model_with_weights_that_its_file_lacks_is_refused(part, name):
    parts = recorded.components()
    parts[part].register_parameter("lost", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(ValueError, match=f"{name}.* lacks 1 weights of its {name}, lost first: fetch it again"):
        check_loaded(parts["transformer"], parts["vae"], "FLUX.gguf", "VAE.safetensors")
