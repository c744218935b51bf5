from __future__ import annotations

import pytest
import torch

from instantcharacter import CharacterAdapter
from instantcharacter.training.data.examples import Batch
from toy import models
from toy.evaluate import ablations


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("all", (1, 1, 1, 1)),
        ("SigLIP alone", (1, 0, 1, 1)),
        ("DINOv2 alone", (0, 1, 1, 1)),
        ("deep alone", (1, 1, 0, 0)),
        ("deep and shallow", (1, 1, 1, 0)),
        ("deep and tiles", (1, 1, 0, 1)),
    ],
)
def test_a_variant_has_only_its_features(name, left):
    width = models.SIGLIP.hidden_size
    features = tuple(torch.ones(1, rows, 2 * width) for rows in (3, 1, 4))
    batch = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), features)
    shallow, deep, tiles = ablations.VARIANTS[name].mask_batch(batch).features
    found = (deep[..., :width].any(), deep[..., width:].any(), shallow.any(), tiles.any())
    assert tuple(map(int, found)) == left


def test_without_the_timestep_tokens_are_the_same_at_any():
    fused = torch.randn(1, 6, models.ADAPTER.feature_dim, generator=torch.Generator().manual_seed(0))
    for name, same in (("all", False), ("without the timestep", True)):
        adapter = ablations.VARIANTS[name].fix_timestep(CharacterAdapter(models.ADAPTER))
        early, late = (adapter.projector.resample(fused, torch.tensor([t])) for t in (900.0, 100.0))
        assert torch.equal(early, late) == same
