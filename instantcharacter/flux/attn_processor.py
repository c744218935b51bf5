"""Character attention inside diffusers' FLUX transformer, through diffusers' extension point, the attention processor.

No code of FLUX is copied. FLUX's own processor computes its attention on an attention module that is wrapped at two
places: where the query is normalised, and where the output is projected.
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
from ..model.attention import CharacterAttention, FoldedCharacterAttention, check_query_scale
from ..model.conditioning import Subject, add_subjects
from ..model.folding import fold
from .fp8 import first_fp8_layer, quantize_layers

Block = tuple[CharacterAttention, dict[str, Tensor]]
"""A block's attention, and the scale that its processor takes, by name."""


class CharacterAttnProcessor(nn.Module):
    """An attention processor that adds characters to the output of another one.

    ``subjects`` and ``image_tokens`` come through ``joint_attention_kwargs``; without subjects it is the other one. It
    is a module, so that its weights move, stream and are cast with the FLUX block that it is in.

    Args:
        inner: FLUX's own processor.
        attention: this block's character attention: folded for inference, the adapter's own for training.
        fingerprint: of the adapter.
        query_scale: [head_dim], for training: the scale of FLUX's query norm in this block. Each forward computes the
            scale of the keys from it, with gradients to the adapter's norms.
        key_scale: [head_dim], for folded attention: the scale of the keys, computed once.
    """

    query_scale: Tensor
    key_scale: Tensor

    def __init__(
        self,
        inner: Any,
        attention: CharacterAttention,
        fingerprint: str,
        *,
        query_scale: Tensor | None = None,
        key_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.attention = attention
        self.fingerprint = fingerprint
        for name, scale in (("query_scale", query_scale), ("key_scale", key_scale)):
            if scale is not None:  # accelerate's offload does not know buffers that are None
                self.register_buffer(name, scale, persistent=False)

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
        wrapped = _WrappedAttention(attn, partial(self._add, subjects, image_tokens, encoder_hidden_states is None))
        out = self.inner(wrapped, *inputs)
        return wrapped.add(out) if encoder_hidden_states is None else out

    def _add(
        self, subjects: list[Subject], image_tokens: int, single: bool, hidden_states: Tensor, query: Tensor
    ) -> Tensor:
        """Add the subjects to the last ``image_tokens`` rows of ``hidden_states`` [B, S, H·D]; query [B, S, H, D]."""
        attend = partial(dispatch_attention_fn, backend=self._attention_backend)
        if torch.is_grad_enabled():  # autograd still needs the attention's own output
            hidden_states = hidden_states.clone()
        image, image_query = hidden_states[:, -image_tokens:], query[:, -image_tokens:]
        add_subjects(image, image_query, subjects, self.attention, self._block_key_scale(), attend, single)
        return hidden_states

    def _block_key_scale(self) -> Tensor:
        if isinstance(self.attention, FoldedCharacterAttention):
            return self.key_scale
        return self.attention.key_scale(self.query_scale)

    @property
    def _attention_backend(self) -> Any:
        """Read and set by diffusers' ``set_attention_backend``."""
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """Read and set by diffusers' ``enable_parallelism``; for FLUX's own attention, see :mod:`.parallel`."""
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config


class _WrappedAttention:
    """FLUX's attention module for its own processor: keeps the query, and adds to the output.

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
        """``hidden_states`` [B, S, H·D] with the characters added."""
        if self._query is None:
            raise RuntimeError(
                "FLUX's attention processor does not normalise its query by attn.norm_q: use diffusers' own"
            )
        return self._add(hidden_states, self._query)


def attach(
    transformer: FluxTransformer2DModel,
    adapter: CharacterAdapter,
    folded: bool = True,
    compute_on: torch.device | None = None,
) -> None:
    """Add an adapter's attention to every block of a FLUX transformer; it replaces one that was attached before.

    If this adapter is refused, the one before stays attached.

    Args:
        transformer: FLUX; the attention takes its device, and the dtype that it computes in, 8 bits included.
        adapter: its attention modules.
        folded: for inference: a folded copy, for folded tokens, which does not follow changes of the adapter. False
            for training: the adapter's own modules, for unfolded tokens.
        compute_on: device of the folding, see :func:`~instantcharacter.model.folding.fold`.

    Raises:
        ValueError: a transformer of another width, number of heads or number of blocks; one whose weights are
            offloaded; one with an IP-Adapter; or a folded adapter for training.
    """
    check_fits(transformer, adapter)
    if not folded:
        adapter.check_whole("be trained")
    inner = _inner_processors(transformer)
    query_scales = [_query_scale(transformer.get_submodule(name.removesuffix(".processor"))) for name in inner]
    blocks: Iterator[Block] = (
        _for_inference(adapter, query_scales, transformer, compute_on)
        if folded
        else _for_training(adapter, query_scales)
    )
    fingerprint = adapter.fingerprint()
    transformer.set_attn_processor(
        {
            name: CharacterAttnProcessor(processor, attention, fingerprint, **scale)
            for (name, processor), (attention, scale) in zip(inner.items(), blocks, strict=True)
        }
    )


def _for_training(adapter: CharacterAdapter, query_scales: list[Tensor]) -> Iterator[Block]:
    """The adapter's own attention, with FLUX's query scales."""
    for attention, query_scale in zip(adapter.attention, query_scales, strict=True):
        yield attention, {"query_scale": query_scale}


def _for_inference(
    adapter: CharacterAdapter,
    query_scales: list[Tensor],
    transformer: FluxTransformer2DModel,
    compute_on: torch.device | None,
) -> Iterator[Block]:
    """Folded copies of the adapter's attention, with the scales of their keys."""
    device, dtype, in_fp8 = query_scales[0].device, compute_dtype(transformer), first_fp8_layer(transformer)
    blocks = zip(fold(adapter, device, dtype, compute_on=compute_on), adapter.attention, query_scales, strict=True)
    for folded, attention, query_scale in blocks:
        if in_fp8:
            quantize_layers(folded, dtype, in_fp8.by_rows, compute_on)
        key_scale = attention.key_scale(query_scale.to(attention.norm_ip_q.scale.device))
        yield folded, {"key_scale": key_scale.detach().to(device, dtype)}


def detach(transformer: FluxTransformer2DModel) -> None:
    """Restore the attention processors that a transformer had before :func:`attach`."""
    transformer.set_attn_processor(_inner_processors(transformer))


def attached(transformer: FluxTransformer2DModel) -> str | None:
    """The fingerprint of the adapter that is attached to a transformer, or None."""
    first = next(iter(transformer.attn_processors.values()), None)
    return first.fingerprint if isinstance(first, CharacterAttnProcessor) else None


def check_fits(transformer: FluxTransformer2DModel, adapter: CharacterAdapter) -> None:
    """Raise ``ValueError`` unless an adapter can be attached to a transformer."""
    if any(isinstance(processor, nn.Module) for processor in _inner_processors(transformer).values()):
        raise ValueError("the transformer carries another adapter in its attention (an IP-Adapter?): unload it first")
    heads = transformer.config.num_attention_heads
    adapter.check_fits(heads * transformer.config.attention_head_dim, heads, len(transformer.attn_processors))


def compute_dtype(transformer: FluxTransformer2DModel) -> torch.dtype:
    """The dtype that a transformer computes in.

    For GGUF it is the quantizer's ``compute_dtype``; otherwise ``transformer.dtype``, which accounts for layerwise
    casting.
    """
    quantizer = getattr(transformer, "hf_quantizer", None)
    return getattr(quantizer, "compute_dtype", None) or transformer.dtype


def _inner_processors(transformer: FluxTransformer2DModel) -> dict[str, Any]:
    """FLUX's own processor of each block, in the adapter's order."""
    processors = transformer.attn_processors
    return {name: p.inner if isinstance(p, CharacterAttnProcessor) else p for name, p in processors.items()}


def _query_scale(attn: Any) -> Tensor:
    """A copy of the scale of FLUX's query norm: offload may take the original away."""
    weight = attn.norm_q.weight
    if weight.is_meta:
        raise ValueError("the transformer's weights are offloaded: set the character adapter before enabling offload")
    check_query_scale(weight)
    return weight.detach().clone()
