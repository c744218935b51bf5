"""Guidance by the character, on a transformer that predicts 3 with a character and 1 without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toy.evaluate.measure import guided


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, joint_attention_kwargs=None, return_dict=True):
        self.calls += 1
        return (torch.tensor(3.0 if (joint_attention_kwargs or {}).get("subjects") else 1.0),)


@pytest.mark.parametrize(("guidance", "expected", "calls"), [(1, 3, 1), (1.5, 4, 2), (2, 5, 2), (0, 1, 2)])
def test_guidance_goes_beyond_the_character_and_ends_with_its_context(guidance, expected, calls):
    transformer = Transformer()
    with guided(transformer, guidance):
        (velocity,) = transformer(joint_attention_kwargs={"subjects": [object()]}, return_dict=False)
    assert (velocity, transformer.calls) == (expected, calls)
    assert transformer(joint_attention_kwargs={"subjects": [object()]}) == (3,)
    assert transformer.calls == calls + 1


def test_guidance_without_a_character_is_one_call():
    transformer = Transformer()
    with guided(transformer, 2):
        assert transformer() == (1,)
    assert transformer.calls == 1
