"""The Q-former's last projection, folded into every block's keys and values.

A character token is ``norm_out(proj_out(latent))``: linear in the latent but for one number, the norm's 1/σ. So keys
and values, which are linear in the token, are linear in ``[latent / σ, 1 / σ]`` too, and the linear maps between
multiply out ahead of time:

    W (γ · C (P x + p) / σ + β) + b  =  (W γ C P) (x / σ)  +  (W γ C p) (1 / σ)  +  (W β + b)

with P, p ``proj_out``, γ, β ``norm_out``, and C the centring of a layer norm. Keys and values then come from 1288
channels, not from 4096: a third of their weights on the GPU (0.9 GB instead of 2.9), of their arithmetic in a step, and
of the memory that a schedule's tokens take. Exact up to rounding.
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
    """One block's :class:`CharacterAttention` with all that is fixed multiplied out; for drawing, not for training.

    Args:
        channels: width of folded tokens.
        dim: width of the FLUX transformer.
        linear: the class of the two projections; a host may have its own, which moves weights as it likes.
    """

    def __init__(self, channels: int, dim: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.to_k_ip = linear(channels, dim)
        self.to_v_ip = linear(channels, dim)

    def forward(self, query: Tensor, tokens: Tensor, key_scale: Tensor, attend: Attend = attend) -> Tensor:
        """As :meth:`CharacterAttention.forward`, for tokens that were resampled with ``folded=True``.

        The scale on the keys, which :meth:`CharacterAttention.key_scale` gives, is worked out once and given.
        """
        return attend_to_character(query, self.to_k_ip(tokens), self.to_v_ip(tokens), key_scale, attend)


@torch.no_grad()
def fold(
    adapter: CharacterAdapter,
    device: torch.device,
    dtype: torch.dtype,
    linear: type[nn.Linear] = nn.Linear,
    compute_on: torch.device | None = None,
) -> Iterator[FoldedAttention]:
    """The adapter's attention modules, folded, one block at a time; the adapter stays as it is.

    The products are taken in float32.

    Args:
        adapter: what to fold.
        device: where the folded weights go.
        dtype: what they become.
        linear: see :class:`FoldedAttention`.
        compute_on: where they are multiplied, ``device`` if not given: a second on a GPU, a minute on a CPU.
    """
    compute = compute_on or device
    resampler, config = adapter.projector.resampler, adapter.config
    project, norm = (_in_float32(module, compute) for module in (resampler.proj_out, resampler.norm_out))
    columns = torch.cat([project["weight"], project["bias"][:, None]], dim=1)
    columns = norm["weight"][:, None] * (columns - columns.mean(dim=0))
    for attention in adapter.attention:
        with torch.device("meta"):
            folded = FoldedAttention(config.resampler_dim + FOLDED_CHANNELS, config.attention_dim, linear)
        weights = _in_float32(attention, compute)
        state = {}
        for name in ("to_k_ip", "to_v_ip"):
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            state[f"{name}.weight"] = F.pad(weight @ columns, (0, FOLDED_CHANNELS - 1)).to(device, dtype)
            state[f"{name}.bias"] = (bias + weight @ norm["bias"]).to(device, dtype)
        folded.load_state_dict(state, assign=True)
        yield folded.requires_grad_(False)


def _in_float32(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    return {key: tensor.to(device, torch.float32) for key, tensor in module.state_dict().items()}
