"""The timestep-aware Q-former: fused features to character tokens.

Modules and names are those of the released checkpoint's ``image_proj.resampler``; a ``ModuleList`` stands where the
checkpoint numbers its modules. Paper: arXiv 2504.12395, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from .config import AdapterConfig

TIME_CHANNELS = 320
"""Channels of the timestep's sinusoidal embedding."""
FOLDED_CHANNELS = 8
"""Channels of a folded token after those of its latent: 1 / σ, then zeros up to a width that GPUs multiply fast."""


class Resampler(nn.Module):
    """Learned queries attend to the fused features, in layers that the timestep modulates.

    Args:
        config: the sizes; below, D is ``resampler_dim`` and Q ``num_tokens``.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.resampler_dim
        self.latents = nn.Parameter(torch.randn(1, config.num_tokens, dim) / dim**0.5)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, dim, act_fn="silu")
        self.proj_in = nn.Linear(config.feature_dim, dim)
        self.layers = nn.ModuleList(ResamplerLayer(dim, config.resampler_heads) for _ in range(config.resampler_layers))
        self.proj_out = nn.Linear(dim, config.token_dim)
        self.norm_out = nn.LayerNorm(config.token_dim)

    def forward(self, fused: Tensor, timestep: Tensor, folded: bool = False) -> Tensor:
        """See :meth:`~.CharacterProjector.resample`."""
        latents = self._latents(fused, timestep)
        tokens = self.proj_out(latents)
        if not folded:
            return self.norm_out(tokens)
        variance = tokens.float().var(dim=-1, keepdim=True, correction=0)
        inverse = (variance + self.norm_out.eps).rsqrt()
        return torch.cat([latents * inverse, F.pad(inverse, (0, FOLDED_CHANNELS - 1))], dim=-1).to(latents.dtype)

    def _latents(self, fused: Tensor, timestep: Tensor) -> Tensor:
        """The queries after the last layer, [B, Q, D]."""
        sinusoid = get_timestep_embedding(timestep, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embedding(sinusoid.to(fused)).unsqueeze(1)
        features = self.proj_in(fused) + time
        queries = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(features, queries, time)
        return queries


class ResamplerLayer(nn.ModuleList):
    """Attention and feed-forward, each with a residual connection, and the adaLN that modulates both."""

    def __init__(self, dim: int, heads: int) -> None:
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))
        super().__init__([PerceiverAttention(dim, heads), ModulatedFeedForward(dim), modulation])

    def forward(self, features: Tensor, queries: Tensor, time: Tensor) -> Tensor:
        """``features`` [B, M, D], ``queries`` [B, Q, D], ``time`` [B, 1, D] → [B, Q, D]."""
        attention, feed_forward, modulation = self
        shift_attn, scale_attn, shift_ff, scale_ff = modulation(time).chunk(4, dim=-1)
        queries = queries + attention(features, queries, shift_attn, scale_attn)
        return queries + feed_forward(queries, shift_ff, scale_ff)


class PerceiverAttention(nn.Module):
    """Queries attend to the features and to themselves; softmax in float32, no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor, queries: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """``features`` [B, M, D], ``queries`` [B, Q, D], ``shift`` and ``scale`` [B, 1, D] → [B, Q, D]."""
        queries = modulate(self.norm2(queries), shift, scale)
        key, value = self.to_kv(torch.cat([self.norm1(features), queries], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(out.transpose(1, 2).flatten(2))


class ModulatedFeedForward(nn.ModuleList):
    """Layer norm, modulation, and an MLP with GELU and a hidden width of 4·D, no biases."""

    def __init__(self, dim: int) -> None:
        up, down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        super().__init__([nn.LayerNorm(dim), up, nn.GELU(), down])

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """``x`` [B, Q, D], ``shift`` and ``scale`` [B, 1, D] → [B, Q, D]."""
        norm, up, act, down = self
        return down(act(up(modulate(norm(x), shift, scale))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, in one kernel."""
    return torch.addcmul(shift, x, 1 + scale)
