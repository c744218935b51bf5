"""Whether this machine's torch multiplies in 8 bits on a CPU, as tests of 8-bit arithmetic need it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from instantcharacter.flux.fp8_layers import Fp8Linear


def _multiplies(by_rows: bool) -> bool:
    try:
        Fp8Linear(nn.Linear(16, 16), torch.bfloat16, by_rows)(torch.ones(16, 16, dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


needs_fp8_arithmetic = pytest.mark.skipif(
    not (_multiplies(by_rows=True) and _multiplies(by_rows=False)),
    reason=f"torch {torch.__version__} multiplies in 8 bits on GPUs alone",
)
