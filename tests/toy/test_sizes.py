from __future__ import annotations

from instantcharacter import CharacterAdapter
from toy import models
from toy.evaluate.judge import Judge


def test_all_toy_models_fit_25_megabytes():
    networks = [models.new_vae(), models.new_flux(), models.new_clip(), models.new_t5()]
    networks += [models.new_siglip(), models.new_dinov2(), Judge(), CharacterAdapter(models.ADAPTER)]
    parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert 2 * parameters < 24.4e6  # in 16 bits; the rest is for tokenizers, configs and a LoRA
