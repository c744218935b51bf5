from __future__ import annotations

import pytest
import torch

from toy.evaluate import judge


def test_retrieval_is_certain_for_the_same_and_chance_for_unrelated_identities():
    references = torch.nn.functional.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    unrelated = torch.nn.functional.normalize(torch.randn(4000, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    assert judge.retrieved(references, references).all()
    assert judge.retrieved(unrelated, references).float().mean().item() == pytest.approx(1 / 16, abs=0.015)


def test_a_half_of_a_picture_is_in_the_middle_of_a_black_one():
    picture = torch.arange(256.0).expand(1, 3, 256, 256)
    left, right = judge.halves(picture)
    assert left.shape == right.shape == picture.shape
    assert torch.equal(left[..., 64:192], picture[..., :128]) and torch.equal(right[..., 64:192], picture[..., 128:])
    assert not left[..., :64].any() and not right[..., 192:].any()
