"""Character attention in one FLUX block: image tokens look at the character, beside FLUX's own attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Of the per-head norms. The checkpoint adds it to the root mean square; its square inside the root, which a single
GPU kernel does, is 1e-6 relative away at a root mean square of one."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of [B, S, H, D] queries to [B, N, H, D] keys and values."""


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own attention on [B, S, H, D] queries and [B, N, H, D] keys and values."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class CharacterAttention(nn.Module):
    """What one block adds to its image tokens, before its output projection: softmax(q' k'ᵀ / √d) v'.

    ``q'`` and ``k'`` are normalised per head, each with its own learned scale. A host has FLUX's query at hand only
    *after* FLUX normalised it and put its own scale on it. Since q' and k' meet in a product, both learned scales
    and the inverse of FLUX's can stand on the keys, of which there are few: the query is used as it comes.

    Args:
        dim: width of the FLUX transformer, 3072 in FLUX.1.
        heads: its attention heads, 24.
        token_dim: width of the character tokens, 4096.
    """

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.norm_ip_q = HeadScale(dim // heads)
        self.to_k_ip = nn.Linear(token_dim, dim)
        self.norm_ip_k = HeadScale(dim // heads)
        self.to_v_ip = nn.Linear(token_dim, dim)

    def forward(self, query: Tensor, tokens: Tensor, query_scale: Tensor, attend: Attend = attend) -> Tensor:
        """Attend from the picture to the character.

        Args:
            query: [B, S, heads, dim/heads], FLUX's image query after its norm and before RoPE.
            tokens: [B, N, token_dim], or [1, N, token_dim] for one character in the whole batch: keys and values
                are then computed once.
            query_scale: [dim/heads], the learned scale of FLUX's query norm in this block.
            attend: the attention to use, :func:`attend` if not given.

        Returns:
            [B, S, dim].
        """
        scale = self.key_scale(query_scale).to(tokens)
        return attend_to_character(query, self.to_k_ip(tokens), self.to_v_ip(tokens), scale, attend)

    def key_scale(self, query_scale: Tensor) -> Tensor:
        """Both learned scales over FLUX's own, [dim/heads] in float32."""
        return self.norm_ip_k(self.norm_ip_q(query_scale.float().reciprocal()))


class HeadScale(nn.Module):
    """The learned scale of a per-head norm, [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def attend_to_character(query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, attend: Attend) -> Tensor:
    """Normalise the keys and attend: [B, S, H, D] queries to [B or 1, N, H·D] keys and values → [B, S, H·D]."""
    batch, _, heads, head_dim = query.shape
    key, value = (rows.unflatten(-1, (heads, head_dim)) for rows in (key, value))
    key = F.rms_norm(key, (head_dim,), key_scale, eps=EPS**2)
    key, value = (rows.expand(batch, -1, -1, -1) for rows in (key, value))
    return attend(query, key, value).flatten(2)
