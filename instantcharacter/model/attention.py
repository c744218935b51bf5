"""Character attention in one FLUX block: its image tokens attend to the character, beside FLUX's own attention.

Two modules compute it. :class:`CharacterAttention` has the checkpoint's weights and is trained;
:class:`FoldedCharacterAttention` has them multiplied out for inference, see :mod:`.folding`, and takes other tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
"""Epsilon of the per-head RMS norm. The reference divides by ``rms + eps``, ``F.rms_norm`` by ``sqrt(ms + eps)``; we
pass ``eps**2``, which is at most 1e-6 relative away at an RMS of 1, and a single GPU kernel."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of [B, S, H, D] queries to [B, N, H, D] keys and values → [B, S, H, D]."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, as an :data:`Attend`."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class CharacterAttention(nn.Module):
    """A block's attention to the character, before its output projection: scale · softmax(q' k'ᵀ / √d) v'.

    ``q'`` and ``k'`` are RMS-normalised per head, each with a learned scale. FLUX's query comes normalised, with FLUX's
    scale w on it: ``q' = query / w · norm_ip_q``. As q' and k' meet in a product, :meth:`key_scale` puts all three
    scales on the keys, of which there are few, and the query is used as it comes.

    Args:
        dim: width of the FLUX transformer, 3072 in FLUX.1.
        heads: its attention heads, 24.
        token_dim: width of the character tokens, 4096.
    """

    def __init__(self, dim: int, heads: int, token_dim: int) -> None:
        super().__init__()
        self.norm_ip_q = QKNormScale(dim // heads)
        self.to_k_ip = nn.Linear(token_dim, dim)
        self.norm_ip_k = QKNormScale(dim // heads)
        self.to_v_ip = nn.Linear(token_dim, dim)

    def key_scale(self, query_scale: Tensor) -> Tensor:
        """The scale of the normalised keys, ``norm_ip_q · norm_ip_k / query_scale``, [dim/heads] in float32.

        Args:
            query_scale: [dim/heads], the learned scale of FLUX's query norm in this block; see
                :func:`check_query_scale`.
        """
        return self.norm_ip_k(self.norm_ip_q(query_scale.float().reciprocal()))

    def forward(self, query: Tensor, tokens: Tensor, key_scale: Tensor, scale: Tensor, attend: Attend = sdpa) -> Tensor:
        """Attend from the image tokens to the character.

        Args:
            query: [B, S, heads, dim/heads], FLUX's image query after its norm and before RoPE.
            tokens: [B, N, token_dim], or [1, N, token_dim] for one character in the whole batch: keys and values
                are then computed once.
            key_scale: [dim/heads], from :meth:`key_scale`; converted to the tokens' dtype and device.
            scale: strength of the character, a tensor of one number in host memory; see :class:`~.Subject`.
            attend: the attention kernel.

        Returns:
            [B, S, heads, dim/heads], with the layout that the kernel gives it.
        """
        key, value = self.to_k_ip(tokens), self.to_v_ip(tokens)
        return _attend_to_character(query, key, value, key_scale.to(tokens), scale, attend)


class FoldedCharacterAttention(CharacterAttention):
    """:class:`CharacterAttention` with the resampler's output projection merged into its keys and values.

    For inference only. :func:`~.fold` computes the weights. Its tokens are folded: ``token_dim`` is resampler_dim + 8.
    """


class QKNormScale(nn.Module):
    """The learned scale of a per-head RMS norm, [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., head_dim], scaled."""
        return x * self.scale


def check_query_scale(query_scale: Tensor) -> None:
    """Raise ``ValueError`` for a scale of 0, by which :meth:`CharacterAttention.key_scale` would divide."""
    if not query_scale.all():
        raise ValueError("FLUX's query norm has a scale of 0 in a channel, which character attention cannot undo")


def _attend_to_character(
    query: Tensor, key: Tensor, value: Tensor, key_scale: Tensor, scale: Tensor, attend: Attend
) -> Tensor:
    """[B, S, H, D] queries to [B or 1, N, H·D] keys and values → [B, S, H, D].

    The scales act on keys and values, which are fewer than the queries and the output.
    """
    batch, _, heads, head_dim = query.shape
    key, value = (rows.unflatten(-1, (heads, head_dim)) for rows in (key, value))
    key = F.rms_norm(key, (head_dim,), key_scale, eps=EPS**2)
    key, value = (rows.expand(batch, -1, -1, -1) for rows in (key, value))
    return attend(query, key, value * scale)
