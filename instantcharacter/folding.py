"""The Q-former's last projection, folded into every block's keys and values.

A character token is ``norm_out(proj_out(latent))``: linear in the latent but for one number, the norm's 1/σ. So keys
and values, which are linear in the token, are linear in ``[latent / σ, 1 / σ]`` too, and the linear maps between
multiply out ahead of time:

    W (γ · C (P x + p) / σ + β) + b  =  (W γ C P) (x / σ)  +  (W γ C p) (1 / σ)  +  (W β + b)

with P, p ``proj_out``, γ, β ``norm_out``, and C the centring of a layer norm. Keys and values then come from 1288
channels, not from 4096: a third of the weights on the GPU (0.9 GB instead of 2.9), of the arithmetic in a step, and of
the memory that a schedule's tokens take. Exact up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CharacterAttention
from .projector import FOLDED_CHANNELS

if TYPE_CHECKING:
    from .adapter import CharacterAdapter


@torch.no_grad()
def fold(adapter: CharacterAdapter, device: torch.device, dtype: torch.dtype) -> list[CharacterAttention]:
    """The adapter's attention for tokens that were resampled with ``folded=True``, one module a block.

    The products are taken in float32, one block at a time, on the GPU if there is one.

    Args:
        adapter: what to fold; it stays as it is.
        device: where the folded weights go.
        dtype: what they are rounded to.
    """
    compute = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resampler, config = adapter.projector.resampler, adapter.config
    project, norm = (_in_float32(m, compute) for m in (resampler.proj_out, resampler.norm_out))
    columns = torch.cat([project["weight"], project["bias"][:, None]], dim=1)
    columns = norm["weight"][:, None] * (columns - columns.mean(dim=0))
    blocks = []
    for attention in adapter.attention:
        with torch.device("meta"):
            block = CharacterAttention(
                config.attention_dim, config.attention_heads, config.resampler_dim + FOLDED_CHANNELS
            )
        state = _in_float32(attention, compute)
        for name in ("to_k_ip", "to_v_ip"):
            weight = state[f"{name}.weight"]
            state[f"{name}.bias"] = state[f"{name}.bias"] + weight @ norm["bias"]
            state[f"{name}.weight"] = F.pad(weight @ columns, (0, FOLDED_CHANNELS - 1))
        block.load_state_dict({key: tensor.to(device, dtype) for key, tensor in state.items()}, assign=True)
        blocks.append(block)
    return blocks


def _in_float32(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device, torch.float32) for key, tensor in module.state_dict().items()}
