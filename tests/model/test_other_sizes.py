"""The package against the mathematics written out, at sizes and seeds that were not recorded."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from reference.reference_fill import fill_module_, inputs
from support import naive, recorded
from support.recorded import error

from instantcharacter import AdapterConfig
from instantcharacter.flux.attn_processor import attach
from instantcharacter.model.attention import CharacterAttention
from instantcharacter.model.conditioning import Subject
from instantcharacter.model.folding import fold

CONFIGS = [
    AdapterConfig(48, 1, 3, 32, 1, 4, 5, 40, 256, 2, 4),
    AdapterConfig(72, 3, 6, 96, 3, 3, 33, 24, 384, 3, 4),
]
SEEDS = [1, 202]


def features(config, seed, tokens=19):
    return recorded.features(tokens, seed, config.feature_dim)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("config", CONFIGS, ids=["small", "odd"])
def test_tokens_follow_the_mathematics(config, seed):
    adapter = recorded.adapter(config, seed)
    state = adapter.projector.state_dict()
    fused = adapter.projector.fuse(*features(config, seed))
    assert error(fused, naive.fuse(state, config.fusion_heads, *features(config, seed))) < 1e-5
    for timestep in (1000.0, 412.5, 0.0):
        tokens = adapter.projector.resample(fused, torch.tensor([timestep]))
        assert error(tokens, naive.resample(state, config.resampler_heads, fused, timestep)) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_follows_the_mathematics_on_the_raw_query(seed, batch):
    attention = fill_module_(CharacterAttention(dim=96, heads=3, token_dim=40), "ip_adapter.7.", seed)
    raw, flux_scale = inputs("raw", (batch, 11, 96), seed), 1 + 0.5 * inputs("flux", (32,), seed)
    tokens = inputs("tokens", (1, 6, 40), seed)
    query = naive.rms(raw, flux_scale, 3).unflatten(-1, (3, -1))
    seen = attention(query, tokens, attention.key_scale(flux_scale), torch.tensor(1.0)).flatten(2)
    by_hand = naive.character_attention(attention.state_dict(), 3, raw, tokens.expand(batch, -1, -1))
    assert error(seen, by_hand) < 1e-5


@pytest.mark.parametrize("config", [recorded.ADAPTER_CONFIG, *CONFIGS], ids=["recorded", "small", "odd"])
def test_folded_attention_sees_what_the_unfolded_sees(config):
    adapter = recorded.adapter(config, seed=5)
    fused = adapter.projector.fuse(*features(config, 5))
    timestep = torch.tensor([640.0])
    tokens = adapter.projector.resample(fused, timestep)
    folded_tokens = adapter.projector.resample(fused, timestep, folded=True)
    head_dim = config.attention_dim // config.attention_heads
    query, scale = inputs("query", (2, 9, config.attention_heads, head_dim), 5), torch.full((head_dim,), 0.7)
    for attention, folded in zip(adapter.attention, fold(adapter, scale.device, scale.dtype), strict=True):
        key_scale, strength = attention.key_scale(scale), torch.tensor(0.8)
        seen = folded(query, folded_tokens, key_scale, strength)
        assert error(seen, attention(query, tokens, key_scale, strength)) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (8, 4)])
def test_transformer_follows_the_mathematics(seed, rows, columns):
    adapter, scale = recorded.adapter(seed=seed), 0.75
    transformer = recorded.transformer(seed)
    call = recorded.transformer_inputs(seed, rows, columns)
    fused = adapter.projector.fuse(*features(adapter.config, seed))
    timestep = torch.tensor([300.0])
    by_hand = written_out(transformer, adapter, call, adapter.projector.resample(fused, timestep), scale)
    attach(transformer, adapter)
    subject = Subject(adapter.projector.resample(fused, timestep, folded=True), torch.tensor(scale))
    (ours,) = transformer(**call, joint_attention_kwargs={"subjects": [subject], "image_tokens": rows * columns})
    assert error(ours, by_hand) < 1e-5


def written_out(transformer: FluxTransformer2DModel, adapter, call, tokens, scale):
    """The transformer's output with its attention, and the character's, computed step by step."""
    before = transformer.attn_processors
    image_tokens = call["hidden_states"].shape[1]
    states = [attention.state_dict() for attention in adapter.attention]
    processors = {
        name: naive.Processor(state, tokens, scale, image_tokens) for name, state in zip(before, states, strict=True)
    }
    transformer.set_attn_processor(processors)
    (out,) = transformer(**call)
    transformer.set_attn_processor(before)
    return out
