from __future__ import annotations

import pytest
import torch
from reference.reference_fill import fill_module_, inputs
from support.recorded import error

from instantcharacter.model.attention import CharacterAttention, FoldedCharacterAttention, check_query_scale, sdpa

QUERY_SCALE = torch.linspace(0.5, 2, 32)


@pytest.fixture
def attention() -> CharacterAttention:
    return fill_module_(CharacterAttention(dim=96, heads=3, token_dim=40), "ip_adapter.0.", 3)


def test_gradients_reach_every_weight_through_the_key_scale(attention):
    attention.requires_grad_(True)
    query, tokens = inputs("query", (2, 7, 3, 32), 3), inputs("tokens", (2, 5, 40), 3)
    attention(query, tokens, attention.key_scale(QUERY_SCALE), torch.tensor(1.0)).pow(2).sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert name == "to_k_ip.bias" or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["own", "folded"])
def test_output_grows_with_the_scale(attention, kind):
    if kind == "folded":
        attention_ = FoldedCharacterAttention(96, 3, 40)
        attention_.load_state_dict(attention.state_dict())
    else:
        attention_ = attention
    query, tokens, key_scale = inputs("query", (1, 7, 3, 32), 3), inputs("tokens", (1, 5, 40), 3), torch.ones(32)
    full, half = (attention_(query, tokens, key_scale, torch.tensor(scale)) for scale in (1.0, 0.5))
    assert full.shape == (1, 7, 3, 32)
    assert error(2 * half, full) < 1e-6


def test_tokens_of_one_character_serve_the_whole_batch(attention):
    query, tokens, strength = inputs("query", (3, 7, 3, 32), 3), inputs("tokens", (1, 5, 40), 3), torch.tensor(1.0)
    shared = attention(query, tokens, QUERY_SCALE, strength)
    assert error(shared, attention(query, tokens.repeat(3, 1, 1), QUERY_SCALE, strength)) < 1e-6


def test_kernel_gets_queries_keys_and_values_by_head(attention):
    shapes = []

    def attend(query, key, value):
        shapes.extend(tuple(x.shape) for x in (query, key, value))
        return sdpa(query, key, value)

    query, tokens = inputs("query", (2, 7, 3, 32), 3), inputs("tokens", (1, 5, 40), 3)
    attention(query, tokens, QUERY_SCALE, torch.tensor(1.0), attend)
    assert shapes == [(2, 7, 3, 32), (2, 5, 3, 32), (2, 5, 3, 32)]


def test_a_query_scale_of_0_is_refused():
    check_query_scale(QUERY_SCALE)
    with pytest.raises(ValueError, match="scale of 0"):
        check_query_scale(torch.tensor([1.0, 0.0]))
