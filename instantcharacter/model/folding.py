"""The resampler's output projection, folded into every block's keys and values.

A character token is ``norm_out(proj_out(latent))``: linear in the latent but for one number, the norm's 1/σ. Keys and
values are linear in the token, and so in ``[latent / σ, 1 / σ]``; the linear maps between multiply out ahead of time:

    W (γ · C (P x + p) / σ + β) + b  =  (W γ C P) (x / σ)  +  (W γ C p) (1 / σ)  +  (W β + b)

with P, p the weight and bias of ``proj_out``, γ, β those of ``norm_out``, and C the centring of a layer norm. Keys and
values then come from 1288 channels in place of 4096, which takes a third of the weights on the GPU (0.9 GB in place of
2.9), of the arithmetic in a step, and of the memory of a schedule's tokens. Exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.reading import check_finite
from .adapter import CharacterAdapter
from .attention import FoldedCharacterAttention
from .resampler import FOLDED_CHANNELS, Resampler


@torch.no_grad()
def fold(
    adapter: CharacterAdapter,
    device: torch.device,
    dtype: torch.dtype,
    compute_on: torch.device | None = None,
) -> Iterator[FoldedCharacterAttention]:
    """The adapter's attention modules, folded, one block at a time; the adapter is not changed.

    The products are computed in float32 and rounded once, to ``dtype``. A folded adapter's modules need no product.
    Weights that need neither a product nor a conversion are the adapter's own.

    Args:
        adapter: to fold.
        device: of the folded weights.
        dtype: of the folded weights.
        compute_on: device of the products, ``device`` if None: a second on a GPU, a minute on a CPU.

    Raises:
        ValueError: weights that are not finite.
    """
    config = adapter.config
    token_dim = config.resampler_dim + FOLDED_CHANNELS
    projection = None if adapter.folded else _output_projection(adapter.projector.resampler, compute_on or device)
    for attention in adapter.attention:
        state = attention.state_dict()
        if projection:
            for layer in ("to_k_ip", "to_v_ip"):
                weight, bias = f"{layer}.weight", f"{layer}.bias"
                state[weight], state[bias] = _fold_linear(state[weight], state[bias], *projection)
        with torch.device("meta"):
            folded = FoldedCharacterAttention(config.attention_dim, config.attention_heads, token_dim)
        state = {key: tensor.to(dtype).to(device) for key, tensor in state.items()}  # converted before leaving the GPU
        for key, tensor in state.items():
            check_finite(tensor, f"the adapter has weights ({key})", "its file is damaged: fetch it again")
        folded.load_state_dict(state, assign=True)
        yield folded.requires_grad_(False)


def fold_adapter(
    adapter: CharacterAdapter, dtype: torch.dtype, compute_on: torch.device | None = None
) -> CharacterAdapter:
    """A folded adapter on the CPU, for inference: the resampler, and the attention folded to ``dtype``.

    It generates what the whole adapter does, of the characters that the whole adapter makes: bit for bit where FLUX
    computes in ``dtype``. Where it computes in another, the weights have the rounding of this one too: of bfloat16 in
    float32 and float16, 1.7e-3 of the attention's output; computing in bfloat16 costs 2.4e-3.

    Args:
        adapter: whole.
        dtype: of its weights; the attention's norms keep theirs.
        compute_on: see :func:`fold`.

    Raises:
        ValueError: the adapter is folded already.
    """
    adapter.check_whole("be folded again")
    cpu = torch.device("cpu")
    with torch.device("meta"):
        folded = CharacterAdapter(adapter.config, folded=True)
    resampler = {key: tensor.to(cpu, dtype) for key, tensor in adapter.projector.resampler.state_dict().items()}
    folded.projector.resampler.load_state_dict(resampler, assign=True)
    folded.attention = nn.ModuleList(fold(adapter, cpu, dtype, compute_on=compute_on))  # type: ignore[assignment]
    for block, attention in zip(folded.attention, adapter.attention):
        for norm in ("norm_ip_q", "norm_ip_k"):  # key scales are of these, whatever the dtype of the keys
            getattr(block, norm).load_state_dict(attention.get_submodule(norm).state_dict(), assign=True)
    folded.keep_fingerprint(adapter.fingerprint())
    return folded.eval().requires_grad_(False)


def _output_projection(resampler: Resampler, device: torch.device) -> tuple[Tensor, Tensor]:
    """The resampler's output projection and norm as γ C [P p], [token_dim, resampler_dim + 1], and β, in float32."""
    project, norm = resampler.proj_out, resampler.norm_out
    weight, bias, gain, shift = (
        _in_float32(tensor, device) for tensor in (project.weight, project.bias, norm.weight, norm.bias)
    )
    columns = torch.cat([weight, bias[:, None]], dim=1)
    return gain[:, None] * (columns - columns.mean(dim=0)), shift


def _fold_linear(weight: Tensor, bias: Tensor, columns: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of keys or values of folded tokens, in float32 on the device of ``columns``.

    Args:
        weight: [dim, token_dim], of keys or values of whole tokens.
        bias: [dim].
        columns: see :func:`_output_projection`.
        shift: see :func:`_output_projection`.
    """
    weight, bias = _in_float32(weight, columns.device), _in_float32(bias, columns.device)
    with _without_tf32():
        return F.pad(weight @ columns, (0, FOLDED_CHANNELS - 1)), bias + weight @ shift


def _in_float32(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in float32 on a device. It is converted there: in one call, torch would convert it on the CPU."""
    return tensor.to(device).float()


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Context manager in which GPUs multiply float32 matrices exactly, though the user may allow TF32."""
    matmul = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    allowed = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, allowed)
