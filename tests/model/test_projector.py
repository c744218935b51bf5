from __future__ import annotations

import pytest
import torch


def test_wrong_fused_features_and_timesteps_are_refused(adapter):
    with pytest.raises(ValueError, match=r"\[1, 9, 64\]; expected \[batch, tokens, 80\]"):
        adapter.projector.resample(torch.zeros(1, 9, 64), torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"timestep is \[3\]; expected \[1\] or \[2\]"):
        adapter.projector.resample(torch.zeros(2, 9, 80), torch.tensor([1.0, 2.0, 3.0]))
