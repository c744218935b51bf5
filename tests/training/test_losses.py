from __future__ import annotations

import pytest
import torch

from instantcharacter.training.losses import LossesByLevel, mean_losses


def test_losses_are_averaged_in_all_and_by_noise_level():
    losses = LossesByLevel(torch.device("cpu"))
    losses.add(torch.tensor([0.05, 0.31, 1.0]), torch.tensor([1.0, 2.0, 6.0]))
    losses.add(torch.tensor([0.39]), torch.tensor([4.0]))
    assert mean_losses(losses.sums) == {
        "loss": pytest.approx(13 / 4),
        "loss at σ 0.0": 1,
        "loss at σ 0.3": 3,
        "loss at σ 0.9": 6,
    }
