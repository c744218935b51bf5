"""Character attention inside diffusers' FLUX transformer, through its own extension point, the attention processor.

Nothing of FLUX is copied: the processor that is there goes on doing FLUX's attention, and is watched at two places,
where it normalises its query and where it projects its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from ..model.adapter import CharacterAdapter
from ..model.attention import Attend, BlockAttention, CharacterAttention, Subject, add_subjects
from ..model.folding import FoldedAttention, fold


class CharacterAttnProcessor(nn.Module):
    """An attention processor that adds characters to what another one computes.

    ``subjects`` and ``image_tokens`` come through ``joint_attention_kwargs``; without them it is the other one.
    It is a module, so that its weights move, stream and are cast with the FLUX block it sits in.

    Args:
        inner: the processor that was there.
        attention: this block's character attention, called with the query, the tokens, and the attention to use.
        fingerprint: names the adapter that the attention is of.
    """

    def __init__(self, inner: Any, attention: BlockAttention, fingerprint: str) -> None:
        super().__init__()
        self.inner = inner
        self.attention = attention
        self.fingerprint = fingerprint

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        subjects: list[Subject] | None = None,
        image_tokens: int = 0,
    ) -> Any:
        inputs = (hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if not subjects:
            return self.inner(attn, *inputs)
        watched = _WatchedAttention(attn, partial(self._add, subjects, image_tokens))
        out = self.inner(watched, *inputs)
        return watched.add(out) if encoder_hidden_states is None else out

    def _add(self, subjects: list[Subject], image_tokens: int, hidden_states: Tensor, query: Tensor) -> Tensor:
        """Add what the last ``image_tokens`` rows of ``query`` see of the subjects to those of ``hidden_states``."""
        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        if torch.is_grad_enabled():  # autograd still needs the attention's own output
            hidden_states = hidden_states.clone()
        add_subjects(hidden_states[:, -image_tokens:], query[:, -image_tokens:], subjects, self.attention, attend)
        return hidden_states

    @property
    def _attention_backend(self) -> Any:
        """Read and set by diffusers' ``set_attention_backend``."""
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend


class _WatchedAttention:
    """FLUX's attention module as a processor sees it, with its query remembered and its output added to.

    A double-stream block projects its output through ``to_out``; a single-stream block returns it.
    """

    def __init__(self, attn: Any, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._attn = attn
        self._add = add
        self._query: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def norm_q(self, query: Tensor) -> Tensor:
        self._query = self._attn.norm_q(query)
        return self._query

    @property
    def to_out(self) -> list[Any]:
        project, dropout = self._attn.to_out
        return [lambda hidden_states: project(self.add(hidden_states)), dropout]

    def add(self, hidden_states: Tensor) -> Tensor:
        if self._query is None:
            raise RuntimeError(
                "FLUX's attention processor does not normalise its query by attn.norm_q: use diffusers' own"
            )
        return self._add(hidden_states, self._query)


class DrawingAttention(nn.Module):
    """Folded attention, with the scale that its keys have in the block it sits in."""

    key_scale: Tensor

    def __init__(self, attention: FoldedAttention, key_scale: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("key_scale", key_scale)

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        return self.attention(query, tokens, self.key_scale, attend)


class LearningAttention(nn.Module):
    """The adapter's own attention, still to be learned, with FLUX's query scale in the block it sits in."""

    query_scale: Tensor

    def __init__(self, attention: CharacterAttention, query_scale: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("query_scale", query_scale, persistent=False)

    def forward(self, query: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        return self.attention(query, tokens, self.query_scale, attend)


def attach(
    transformer: FluxTransformer2DModel,
    adapter: CharacterAdapter,
    folded: bool = True,
    compute_on: torch.device | None = None,
) -> None:
    """Put the adapter's attention into every block of a FLUX transformer, in place of one there before.

    The one before stays if this one is refused.

    Args:
        transformer: FLUX; its device is taken, and the dtype that it computes in.
        adapter: whose attention.
        folded: for drawing: a folded copy, for folded tokens; it does not follow what happens to the adapter.
            Otherwise, for training, the adapter's own modules, for unfolded tokens.
        compute_on: where it is folded, see :func:`~instantcharacter.model.folding.fold`.

    Raises:
        ValueError: a transformer of another width, with other heads, or with another number of blocks; one whose
            weights are offloaded already; or one with an IP-Adapter.
    """
    check_fits(transformer, adapter)
    processors = _own_processors(transformer)
    scales = [_query_scale(transformer.get_submodule(name.removesuffix(".processor"))) for name in processors]
    attentions = (
        _folded(adapter, scales, compute_dtype(transformer), compute_on)
        if folded
        else map(LearningAttention, adapter.attention, scales)
    )
    fingerprint = adapter.fingerprint()
    transformer.set_attn_processor(
        {
            name: CharacterAttnProcessor(inner, attention, fingerprint)
            for (name, inner), attention in zip(processors.items(), attentions, strict=True)
        }
    )


def _folded(
    adapter: CharacterAdapter, query_scales: list[Tensor], dtype: torch.dtype, compute_on: torch.device | None
) -> Iterator[DrawingAttention]:
    device = query_scales[0].device
    blocks = zip(fold(adapter, device, dtype, compute_on=compute_on), adapter.attention, query_scales, strict=True)
    for folded, attention, query_scale in blocks:
        key_scale = attention.key_scale(query_scale.to(attention.norm_ip_q.scale.device))
        yield DrawingAttention(folded, key_scale.to(device, dtype)).requires_grad_(False)


def detach(transformer: FluxTransformer2DModel) -> None:
    """Give a transformer back the attention processors it had before :func:`attach`."""
    transformer.set_attn_processor(_own_processors(transformer))


def _own_processors(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """The processors without an adapter's of ours around them."""
    processors = transformer.attn_processors
    return {name: p.inner if isinstance(p, CharacterAttnProcessor) else p for name, p in processors.items()}


def attached(transformer: FluxTransformer2DModel) -> str | None:
    """The fingerprint of the adapter that a transformer carries, if it carries one."""
    first = next(iter(transformer.attn_processors.values()))
    return first.fingerprint if isinstance(first, CharacterAttnProcessor) else None


def check_fits(transformer: FluxTransformer2DModel, adapter: CharacterAdapter) -> None:
    """Raise ``ValueError`` unless an adapter can be attached to a transformer."""
    if any(isinstance(processor, nn.Module) for processor in _own_processors(transformer).values()):
        raise ValueError("the transformer carries another adapter in its attention (an IP-Adapter?): unload it first")
    config, heads = adapter.config, transformer.config.num_attention_heads
    for what, found, expected in (
        ("width", heads * transformer.config.attention_head_dim, config.attention_dim),
        ("number of attention heads", heads, config.attention_heads),
        ("number of blocks", len(transformer.attn_processors), config.num_attention_blocks),
    ):
        if found != expected:
            raise ValueError(
                f"the transformer's {what} is {found}, the adapter is made for {expected}. "
                "InstantCharacter's is for FLUX.1-dev and models of its shape."
            )


def compute_dtype(transformer: FluxTransformer2DModel) -> torch.dtype:
    """What a transformer computes in, however its weights are stored: GGUF knows, and so does layerwise casting."""
    quantizer = getattr(transformer, "hf_quantizer", None)
    return getattr(quantizer, "compute_dtype", None) or transformer.dtype


def _query_scale(attn: Any) -> Tensor:
    """A copy of the weight of FLUX's query norm: under offload the original is not always there."""
    weight = attn.norm_q.weight
    if weight.is_meta:
        raise ValueError("the transformer's weights are offloaded: set the character adapter before enabling offload")
    if not weight.all():
        raise ValueError("FLUX's query norm has a scale of 0 in a channel, which character attention cannot undo")
    return weight.detach().clone()
