"""The projector: features of a picture to character tokens.

It has two halves. ``fuse`` mixes the encoders' layers and the picture's scales; it depends on the picture alone and
runs once per character. ``resample`` is the timestep-aware Q-former and runs once per timestep. Paper:
arXiv 2504.12395, section 3.2; names and shapes are those of the released checkpoint's ``image_proj``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from .config import AdapterConfig
from .resampler import Resampler


class CharacterProjector(nn.Module):
    """Fusion of a picture's features, and the resampler.

    Args:
        config: the sizes; below, F is ``feature_dim`` and N the number of tokens of one 384-pixel crop (729 for the
            released encoders).
        fusion: whether it has the modules of :meth:`fuse`; a folded adapter has the resampler alone.
    """

    def __init__(self, config: AdapterConfig, fusion: bool = True) -> None:
        super().__init__()
        if fusion:
            dim = config.feature_dim
            self.cross_layer_blocks = _fusion_blocks(config)
            self.cross_scale_blocks = _fusion_blocks(config)
            self.proj = Mlp(dim)
            self.proj_cross_layer = Mlp(dim)
            self.proj_cross_scale = Mlp(dim)
        self.resampler = Resampler(config)

    def fuse(self, low_res_shallow: Tensor, low_res_deep: Tensor, high_res_deep: Tensor) -> Tensor:
        """Mix shallow with deep features, and the whole picture with its tiles.

        Args:
            low_res_shallow: [B, 3·N, F], three early layers of the whole picture, concatenated.
            low_res_deep: [B, N, F], the last layer of the whole picture.
            high_res_deep: [B, 4·N, F], the last layer of the four tiles, concatenated.

        Returns:
            [B, 2·N, F]: the fused scales, then the fused layers.

        Raises:
            ValueError: features of another width, or of different batch sizes, or a projector without fusion.
        """
        if not self.fusion_modules():
            raise ValueError("this projector is a folded adapter's and has no fusion: fuse with the whole adapter's")
        self._check_features(low_res_shallow, low_res_deep, high_res_deep)
        cross_layer = cross_scale = low_res_deep
        for block in self.cross_layer_blocks:
            cross_layer = block(cross_layer, encoder_hidden_states=low_res_shallow)
        for block in self.cross_scale_blocks:
            cross_scale = block(cross_scale, encoder_hidden_states=high_res_deep)
        scales = self.proj(low_res_deep) + self.proj_cross_scale(cross_scale)
        return torch.cat([scales, self.proj_cross_layer(cross_layer)], dim=1)

    def resample(self, fused: Tensor, timestep: Tensor, folded: bool = False) -> Tensor:
        """Character tokens at a timestep.

        Args:
            fused: [B, M, F], from :meth:`fuse`; of several pictures of one character, concatenated along M.
            timestep: [B] or [1], in [0, 1000]. If B is 1, [T] gives a row for each timestep.
            folded: leave the output projection to :class:`~.FoldedCharacterAttention`, see :mod:`.folding`.

        Returns:
            [B, num_tokens, token_dim]; folded, [B, num_tokens, resampler_dim + 8].

        Raises:
            ValueError: ``fused`` of another width, or timesteps of another number than the batch.
        """
        width = self.resampler.proj_in.in_features
        if fused.ndim != 3 or fused.shape[-1] != width:
            raise ValueError(f"fused features are {list(fused.shape)}; expected [batch, tokens, {width}]")
        if timestep.ndim != 1 or not (len(timestep) == len(fused) or 1 in (len(timestep), len(fused))):
            raise ValueError(f"timestep is {list(timestep.shape)}; expected [1] or [{len(fused)}], one a character")
        return self.resampler(fused, timestep, folded)

    def fusion_modules(self) -> list[nn.Module]:
        """The modules of :meth:`fuse`: all but the resampler."""
        return [module for module in self.children() if module is not self.resampler]

    def _check_features(self, *features: Tensor) -> None:
        width = self.proj.fc1.in_features
        for tensor in features:
            if tensor.ndim != 3 or tensor.shape[-1] != width or len(tensor) != len(features[0]):
                raise ValueError(
                    f"features are {[list(t.shape) for t in features]}; expected three of [batch, tokens, {width}]. "
                    "SigLIP and DINOv2 widths must add up to the adapter's feature_dim."
                )


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear, with a hidden width of 2·F."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, N, F] → [B, N, F]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _fusion_blocks(config: AdapterConfig) -> nn.ModuleList:
    """Pre-norm transformer blocks with self-attention, cross-attention and a GEGLU feed-forward."""
    dim, heads = config.feature_dim, config.fusion_heads
    return nn.ModuleList(
        BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=dim, norm_eps=1e-6)
        for _ in range(config.fusion_layers)
    )
