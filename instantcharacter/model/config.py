"""The sizes of an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..files.errors import quoted

LAYERS = ("fusion_layers", "resampler_layers", "num_attention_blocks")
MOST_LAYERS = 1000
"""Layers are modules: a number from a file must not fill the memory with them before its weights are counted."""
WIDEST = 1 << 20


@dataclass(frozen=True)
class AdapterConfig:
    """The sizes of an adapter; the defaults are those of the released checkpoint.

    Attributes:
        feature_dim: width of the features of SigLIP and DINOv2, 1152 + 1536.
        fusion_layers: transformer blocks in each of the two fusions.
        fusion_heads: attention heads of each.
        resampler_dim: width of the resampler.
        resampler_layers: layers of the resampler.
        resampler_heads: attention heads of each.
        num_tokens: tokens of a character.
        token_dim: width of a token.
        attention_dim: width of the FLUX transformer.
        attention_heads: attention heads of the FLUX transformer.
        num_attention_blocks: FLUX's double-stream and single-stream blocks, 19 + 38.

    Raises:
        ValueError: a size below one, or far beyond that of any FLUX, or a width that is no multiple of its heads.
    """

    feature_dim: int = 2688
    fusion_layers: int = 4
    fusion_heads: int = 42
    resampler_dim: int = 1280
    resampler_layers: int = 4
    resampler_heads: int = 20
    num_tokens: int = 1024
    token_dim: int = 4096
    attention_dim: int = 3072
    attention_heads: int = 24
    num_attention_blocks: int = 57

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            most = MOST_LAYERS if name in LAYERS else WIDEST
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} is {quoted(size)}; expected a whole number from 1 to {most}")
        for width, heads in (
            ("feature_dim", "fusion_heads"),
            ("resampler_dim", "resampler_heads"),
            ("attention_dim", "attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")


RELEASED = AdapterConfig()
