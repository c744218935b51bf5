from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, Dinov2Model, SiglipVisionModel, T5EncoderModel

from instantcharacter import CharacterAdapter
from instantcharacter.character import encoders
from instantcharacter.flux import load
from instantcharacter.flux.components import components_of
from instantcharacter.model.attention import FoldedCharacterAttention
from instantcharacter.offload import RELEASED, measure
from instantcharacter.offload.sizes import blocks_of, module_bytes


def test_released_sizes_are_those_of_the_released_models():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
            for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
                block.folded = FoldedCharacterAttention(3072, 24, 1288)
                block.register_buffer("key_scale", torch.empty(128))
            siglip = encoders.SIGLIP.config(**encoders.SIGLIP.released)
            siglip.vision_use_head = False
            vae = {name: value for name, value in load.VAE.items() if name != "_class_name"}
            models = SimpleNamespace(
                text_encoder=CLIPTextModel(load.CLIP_L.config(**load.CLIP_L.released)),
                text_encoder_2=T5EncoderModel(load.T5_XXL.config(**load.T5_XXL.released)),
                vae=AutoencoderKL(**vae),
                transformer=transformer,
            )
            encoder = SimpleNamespace(
                siglip=SiglipVisionModel(siglip),
                dinov2=Dinov2Model(encoders.DINOV2.config(**encoders.DINOV2.released)),
            )
            adapter = CharacterAdapter()
    finally:
        torch.set_default_dtype(torch.float32)
    measured = measure(components_of(models, encoder, adapter))
    assert list(measured) == list(RELEASED)
    for name, component in RELEASED.items():
        # some versions of transformers keep position ids of other types as buffers, which are not weights
        assert measured[name].size == pytest.approx(component.size, rel=1e-4), name
        assert measured[name].onload_bytes == pytest.approx(component.onload_bytes, rel=1e-3), name


def test_tensors_that_modules_share_count_once():
    shared = nn.Linear(4, 4, bias=False)
    assert module_bytes(nn.ModuleList([shared, shared, nn.Linear(2, 2, bias=False)])) == 64 + 16


def test_blocks_are_those_of_the_outermost_lists():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Module() for _ in range(3))
    model.blocks[0].inner = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of("transformer", model) == list(model.blocks)
    assert blocks_of("vae", model) == []


def test_a_component_is_measured_with_its_largest_layer_and_its_blocks():
    model = nn.Module()
    model.embed = nn.Linear(4, 8, bias=False)
    model.blocks = nn.ModuleList(nn.Linear(size, size, bias=False) for size in (2, 3))
    (size,) = measure({"transformer": [model]}).values()
    assert (size.modules[0].rest, size.modules[0].blocks) == (128, (16, 36))
    assert (size.size, size.onload_bytes, size.largest_layer) == (180, 128 + 2 * 36, 128)
    assert (size.phase, size.dtype) == ("denoise", "float32")
