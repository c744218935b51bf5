"""Picture features to character tokens.

The projector has two halves. ``fuse`` mixes the encoders' layers and picture scales and depends on the picture alone:
it runs once per character. ``resample`` is the timestep-aware Q-former and runs once per timestep. Paper:
arXiv 2504.12395, section 3.2; names and shapes are those of the released checkpoint's ``image_proj``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from .config import AdapterConfig

TIME_CHANNELS = 320
FOLDED_CHANNELS = 8
"""What folded tokens have beside the Q-former's channels: 1 / σ, then zeros up to a width that GPUs multiply fast."""


class CharacterProjector(nn.Module):
    """Encoder features in, character tokens out.

    Sizes come from :class:`~.config.AdapterConfig`; below, F is ``feature_dim`` and N the number of
    tokens of one 384-pixel view (729 for the released encoders).
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        dim = config.feature_dim
        self.cross_layer_blocks = _fusion_blocks(config)
        self.cross_scale_blocks = _fusion_blocks(config)
        self.proj = Mlp(dim)
        self.proj_cross_layer = Mlp(dim)
        self.proj_cross_scale = Mlp(dim)
        self.resampler = Resampler(config)

    def fuse(self, low_res_shallow: Tensor, low_res_deep: Tensor, high_res_deep: Tensor) -> Tensor:
        """Mix shallow with deep features, and the whole picture with its tiles; no timestep, so once per character.

        Args:
            low_res_shallow: [B, 3·N, F], three early layers of the whole picture, one after the other.
            low_res_deep: [B, N, F], the last layer of the whole picture.
            high_res_deep: [B, 4·N, F], the last layer of the four tiles, one after the other.

        Returns:
            [B, 2·N, F]: the two scales summed, then the layers.

        Raises:
            ValueError: features of another width, or of different batch sizes.
        """
        self._check_features(low_res_shallow, low_res_deep, high_res_deep)
        layers = scales = low_res_deep
        for block in self.cross_layer_blocks:
            layers = block(layers, encoder_hidden_states=low_res_shallow)
        for block in self.cross_scale_blocks:
            scales = block(scales, encoder_hidden_states=high_res_deep)
        scales = self.proj(low_res_deep) + self.proj_cross_scale(scales)
        return torch.cat([scales, self.proj_cross_layer(layers)], dim=1)

    def resample(self, fused: Tensor, timestep: Tensor, folded: bool = False) -> Tensor:
        """Character tokens at a timestep.

        Args:
            fused: [B, M, F], what :meth:`fuse` returned.
            timestep: [B] or [1], in [0, 1000]. With B = 1 a longer one gives a row for each timestep.
            folded: leave the last projection to the attention, see :mod:`.folding`.

        Returns:
            [B, num_tokens, token_dim]; folded, [B, num_tokens, resampler_dim + 8].

        Raises:
            ValueError: ``fused`` of another width, or a timestep that fits no batch.
        """
        width = self.resampler.proj_in.in_features
        if fused.ndim != 3 or fused.shape[-1] != width:
            raise ValueError(f"fused features are {list(fused.shape)}; expected [batch, tokens, {width}]")
        if timestep.ndim != 1 or not (len(timestep) == len(fused) or 1 in (len(timestep), len(fused))):
            raise ValueError(f"timestep is {list(timestep.shape)}; expected [1] or [{len(fused)}], one a character")
        return self.resampler(fused, timestep, folded)

    def _check_features(self, *features: Tensor) -> None:
        width = self.proj.fc1.in_features
        for tensor in features:
            if tensor.ndim != 3 or tensor.shape[-1] != width or len(tensor) != len(features[0]):
                raise ValueError(
                    f"features are {[list(t.shape) for t in features]}; expected three of [batch, tokens, {width}]. "
                    "SigLIP and DINOv2 widths must add up to the adapter's feature_dim."
                )


class Resampler(nn.Module):
    """The timestep-aware Q-former: learned queries read the fused features, each layer modulated by the timestep."""

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
        latents = self._read(fused, timestep)
        tokens = self.proj_out(latents)
        if not folded:
            return self.norm_out(tokens)
        variance = tokens.float().var(dim=-1, keepdim=True, correction=0)
        inverse = (variance + self.norm_out.eps).rsqrt()
        return torch.cat([latents * inverse, F.pad(inverse, (0, FOLDED_CHANNELS - 1))], dim=-1).to(latents.dtype)

    def _read(self, fused: Tensor, timestep: Tensor) -> Tensor:
        """The queries after the last layer, [B, num_tokens, resampler_dim]."""
        sinusoid = get_timestep_embedding(timestep, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        time = self.time_embedding(sinusoid.to(fused)).unsqueeze(1)
        features = self.proj_in(fused) + time
        queries = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(features, queries, time)
        return queries


class ResamplerLayer(nn.ModuleList):
    """Attention, feed-forward, and the timestep's shift and scale for both; a list, as the checkpoint's keys are."""

    def __init__(self, dim: int, heads: int) -> None:
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 4 * dim))
        super().__init__([PerceiverAttention(dim, heads), ModulatedFeedForward(dim), modulation])

    def forward(self, features: Tensor, queries: Tensor, time: Tensor) -> Tensor:
        """``features`` [B, M, D], ``queries`` [B, Q, D], ``time`` [B, 1, D] → the queries after this layer."""
        attention, feed_forward, modulation = self
        shift_attn, scale_attn, shift_ff, scale_ff = modulation(time).chunk(4, dim=-1)
        queries = queries + attention(features, queries, shift_attn, scale_attn)
        return queries + feed_forward(queries, shift_ff, scale_ff)


class PerceiverAttention(nn.Module):
    """Queries attend to the features and to themselves."""

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
    """Norm, modulation, and two linear layers with a hidden layer of four times the width; a list for its keys."""

    def __init__(self, dim: int) -> None:
        up, down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        super().__init__([nn.LayerNorm(dim), up, nn.GELU(), down])

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """``x`` [B, Q, D], ``shift`` and ``scale`` [B, 1, D] → [B, Q, D]."""
        norm, up, act, down = self
        return down(act(up(modulate(norm(x), shift, scale))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, in one pass over ``x``."""
    return torch.addcmul(shift, x, 1 + scale)


class Mlp(nn.Module):
    """Two linear layers with a hidden layer of twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _fusion_blocks(config: AdapterConfig) -> nn.ModuleList:
    dim, heads = config.feature_dim, config.fusion_heads
    return nn.ModuleList(
        BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=dim, norm_eps=1e-6)
        for _ in range(config.fusion_layers)
    )
