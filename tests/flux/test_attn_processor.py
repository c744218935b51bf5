from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import recorded

from instantcharacter.flux.attn_processor import attach, attached, detach
from instantcharacter.model.attention import CharacterAttention, FoldedCharacterAttention
from instantcharacter.model.conditioning import Subject


def test_attention_is_folded_for_inference_and_the_adapters_own_for_training(adapter):
    transformer = recorded.transformer()
    attach(transformer, adapter)
    assert {type(p.attention) for p in transformer.attn_processors.values()} == {FoldedCharacterAttention}
    attach(transformer, adapter, folded=False)
    own = [p.attention for p in transformer.attn_processors.values()]
    assert {type(attention) for attention in own} == {CharacterAttention}
    assert all(one is other for one, other in zip(own, adapter.attention, strict=True))


def test_training_gives_gradients_to_the_adapters_norms(adapter):
    transformer = recorded.transformer().requires_grad_(False)
    attach(transformer, adapter.requires_grad_(True), folded=False)
    call = recorded.transformer_inputs()
    subject = Subject(torch.randn(2, 16, 64), torch.tensor(1.0))
    joint = {"subjects": [subject], "image_tokens": 24}
    transformer(**call, joint_attention_kwargs=joint)[0].pow(2).sum().backward()
    for attention in adapter.attention:
        for norm in (attention.norm_ip_q, attention.norm_ip_k):
            assert norm.scale.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("double", "single", "expected"),
    [
        (0.9, 0.9, [True, True, True, True]),
        (0.0, 0.9, [False, False, True, True]),
        (0.9, 0.0, [True, True, False, False]),
        (0.0, None, [False, False, False, False]),
    ],
)
def test_double_and_single_blocks_have_their_own_scales(adapter, double, single, expected):
    """A block with a scale of 0 returns what FLUX's own does."""
    transformer = recorded.transformer()
    attach(transformer, adapter)
    tokens = torch.randn(2, 16, adapter.config.resampler_dim + 8)
    subject = Subject(tokens, torch.tensor(double), single_scale=None if single is None else torch.tensor(single))
    changed = []

    def compare(block, args, kwargs, ours):
        theirs = block.forward(*args, **{**kwargs, "joint_attention_kwargs": {}})
        changed.append(not all(map(torch.equal, ours, theirs)))

    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.register_forward_hook(compare, with_kwargs=True)
    joint = {"subjects": [subject], "image_tokens": 24}
    with torch.no_grad():
        transformer(**recorded.transformer_inputs(), joint_attention_kwargs=joint)
    assert changed == expected


def test_attached_names_the_adapter_until_it_is_detached(adapter):
    transformer = recorded.transformer()
    assert attached(transformer) is None
    attach(transformer, adapter)
    assert attached(transformer) == adapter.fingerprint()
    detach(transformer)
    assert attached(transformer) is None


def test_a_transformer_without_blocks_has_no_adapter():
    assert attached(SimpleNamespace(attn_processors={})) is None
