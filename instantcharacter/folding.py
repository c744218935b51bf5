"""The Q-former's last projection, folded into every block's keys and values.

A character token is ``norm_out(proj_out(latent))``: linear in the latent but for one number, the norm's 1/σ. So keys
and values, which are linear in the token, are linear in ``[latent / σ, 1 / σ]`` too, and the linear maps between
multiply out ahead of time:

    W (γ · C (P x + p) / σ + β) + b  =  (W γ C P) (x / σ)  +  (W γ C p) (1 / σ)  +  (W β + b)

with P, p ``proj_out``, γ, β ``norm_out``, and C the centring of a layer norm. Keys and values then come from 1288
channels, not from 4096: a third of their weights on the GPU (0.9 GB instead of 2.9), of their arithmetic in a step, and
of the memory that a schedule's tokens take. Exact up to rounding. The scales on the keys are multiplied out as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, attend, attend_to_character
from .projector import FOLDED_CHANNELS

if TYPE_CHECKING:
    from .adapter import CharacterAdapter


class FoldedAttention(nn.Module):
    """One block's :class:`CharacterAttention` with all that is fixed multiplied out; for drawing, not for training."""

    key_scale: Tensor

    def __init__(self, channels: int, dim: int, key_scale: Tensor) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(channels, dim)
        self.to_v_ip = nn.Linear(channels, dim)
        self.register_buffer("key_scale", key_scale)

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend = attend) -> Tensor:
        """As :meth:`CharacterAttention.forward`, for tokens that were resampled with ``folded=True``."""
        return attend_to_character(query, self.to_k_ip(tokens), self.to_v_ip(tokens), self.key_scale, attend)


@torch.no_grad()
def fold(adapter: CharacterAdapter, query_scales: list[Tensor]) -> Iterator[FoldedAttention]:
    """The adapter's attention modules, folded, one block at a time; the adapter stays as it is.

    The products are taken in float32, on the GPU if there is one.

    Args:
        adapter: what to fold.
        query_scales: the scale of FLUX's query norm, [head_dim] for each block; its dtype and device are taken.
    """
    compute = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resampler, config = adapter.projector.resampler, adapter.config
    project, norm = (_in_float32(module, compute) for module in (resampler.proj_out, resampler.norm_out))
    columns = torch.cat([project["weight"], project["bias"][:, None]], dim=1)
    columns = norm["weight"][:, None] * (columns - columns.mean(dim=0))
    for attention, query_scale in zip(adapter.attention, query_scales, strict=True):
        key_scale = attention.key_scale(query_scale.to(attention.norm_ip_q.scale.device))
        with torch.device("meta"):
            folded = FoldedAttention(config.resampler_dim + FOLDED_CHANNELS, config.attention_dim, key_scale)
        weights = _in_float32(attention, compute)
        state = {"key_scale": key_scale.to(query_scale)}
        for name in ("to_k_ip", "to_v_ip"):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            state[f"{name}.weight"] = F.pad(weight @ columns, (0, FOLDED_CHANNELS - 1)).to(query_scale)
            state[f"{name}.bias"] = (bias + weight @ norm["bias"]).to(query_scale)
        folded.load_state_dict(state, assign=True)
        yield folded.requires_grad_(False)


def _in_float32(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device, torch.float32) for key, tensor in module.state_dict().items()}
