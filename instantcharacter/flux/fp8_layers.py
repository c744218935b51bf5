"""Linear layers in 8 bits (e4m3): one that stores its weight in them, and one that multiplies in them.

Both are ``nn.Linear`` with plain tensors: LoRAs wrap them, their weights stream as bytes, and torch compiles them.

A number of e4m3 has 4 significant bits: rounding moves it by 6 % at most. The output of :class:`Fp8Linear`, where both
weight and input are rounded, is 3.7 % off for normally distributed numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
"""The largest number of e4m3."""
SMALLEST_SCALE = 1e-12
"""The scale of a row of zeros."""
MULTIPLE = 16
"""What GPUs multiply in 8 bits has rows and columns in multiples of this number."""
WIDEST = 2**16
"""The widest row that the kernel takes, which has a row in registers at once."""
WIDE = 8192
"""Rows from this width on are rounded by the kernel in compiled code too: torch's compiler would compute what comes
before twice, for the largest number and for the rounding."""
_kernel: Callable[[Tensor, float, float], tuple[Tensor, Tensor]] | None = None
"""Rounds rows in one pass, once :func:`find_kernel` has found that it runs."""


class _Fp8Weights(nn.Linear):
    """A linear layer whose tensors are never converted, only moved: in another dtype its bits would be other numbers.

    Args:
        linear: in any floating dtype; the new layer has its sizes.
        compute_dtype: dtype of inputs and outputs. peft makes a LoRA's matrices in it.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What ``nn.Module.to`` calls: here with bytes, to which a floating dtype does not apply."""
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)


class StoredLinear(_Fp8Weights):
    """A linear layer that is stored in 8 bits, without a scale, and computes in the dtype of its input.

    Args:
        linear: see :class:`Fp8Linear`.
        compute_dtype: see :class:`Fp8Linear`.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(linear, compute_dtype)
        self.weight = _frozen(linear.weight.to(FP8))
        self.bias = None if linear.bias is None else _frozen(linear.bias.to(FP8))

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Fp8Linear(_Fp8Weights):
    """A linear layer that multiplies in 8 bits, for inference: there are no gradients.

    Each row of the input (a token) is scaled so that its largest number is the largest of e4m3, and rounded: one pass,
    which ``torch.compile`` fuses into the operations before it. The product is accumulated in float32 and rounded to
    bfloat16, whatever the dtype of input and output.

    Args:
        linear: with a multiple of 16 outputs. A weight in e4m3 stays as it is, with a scale of 1.
        compute_dtype: dtype of inputs and outputs.
        by_rows: whether the GPU's kernel takes a scale for each row of input and weight. Otherwise the weight has one
            scale, and the rows of the output are scaled afterwards.
        device: where the weight is rounded; the layer is then where ``linear`` was.

    Attributes:
        weight: [out, in] in e4m3; zeros fill ``in`` up to a multiple of 16.
        weight_scale: [out, 1] in float32, or [1, 1] without ``by_rows``: ``weight * weight_scale`` is the layer's.
        bias: [out] in bfloat16, or None.
    """

    weight_scale: Tensor

    def __init__(
        self, linear: nn.Linear, compute_dtype: torch.dtype, by_rows: bool, device: torch.device | None = None
    ) -> None:
        super().__init__(linear, compute_dtype)
        weight = linear.weight.detach()
        quantized, scale = _quantize_weight(weight.to(device or weight.device), by_rows)
        padded = F.pad(quantized.view(torch.uint8), (0, -self.in_features % MULTIPLE)).view(FP8)
        self.weight = _frozen(padded.to(weight.device))
        self.bias = None if linear.bias is None else _frozen(linear.bias.to(torch.bfloat16))
        self.register_buffer("weight_scale", scale.to(weight.device))

    @property
    def by_rows(self) -> bool:
        """Whether each row of the weight has a scale."""
        return self.weight_scale.numel() > 1

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        if padding := self.weight.shape[1] - self.in_features:
            rows = F.pad(rows, (0, padding))
        product = scaled_product(*quantize_rows(rows), self.weight, self.weight_scale, self.bias)
        return product.view(*input.shape[:-1], self.out_features).to(input.dtype)


def find_kernel(device: torch.device) -> None:
    """Have :func:`quantize_rows` run as one kernel on GPUs, if Triton is installed and compiles it; else as operations.

    Args:
        device: a GPU.
    """
    global _kernel
    try:
        from .fp8_kernel import quantize_rows as kernel

        kernel(torch.ones(1, MULTIPLE, dtype=torch.bfloat16, device=device), LARGEST_FP8, SMALLEST_SCALE)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's import, its compiler, or the C compiler that it calls
        logger.info("8-bit arithmetic rounds its inputs without Triton, which is slower: %s", error)
    else:
        _kernel = kernel


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, and the scale of each.

    The scales are numbers of bfloat16, so that a product in bfloat16 is scaled without an error of its own.

    Args:
        rows: [M, K], floating, without gradients.

    Returns:
        [M, K] in e4m3 and [M, 1] in float32; their product is about ``rows``.
    """
    if _kernel and rows.is_cuda and rows.shape[-1] <= WIDEST:
        if not torch.compiler.is_compiling():
            return _kernel(rows, LARGEST_FP8, SMALLEST_SCALE)
        if rows.shape[-1] >= WIDE:
            return _run_kernel(rows)
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scale = (largest / LARGEST_FP8).clamp(min=SMALLEST_SCALE).bfloat16().float()
    quantized = torch.empty_like(rows, dtype=FP8, memory_format=torch.contiguous_format)
    return torch.div(rows, scale, out=quantized), scale


@torch.library.custom_op("instantcharacter::quantize_rows", mutates_args=())
def _run_kernel(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel as an operation that torch's compiler calls, and does not look into."""
    if _kernel is None:
        raise RuntimeError("the kernel that rounds rows has not been found: call find_kernel first")
    return _kernel(rows, LARGEST_FP8, SMALLEST_SCALE)


@_run_kernel.register_fake
def _describe_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=FP8, memory_format=torch.contiguous_format), rows.new_empty(
        len(rows), 1, dtype=torch.float32
    )


def scaled_product(rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``(rows * scale) @ (weight * weight_scale).T + bias``, multiplied in 8 bits.

    Args:
        rows: [M, K] in e4m3.
        scale: [M, 1] in float32.
        weight: [N, K] in e4m3.
        weight_scale: [N, 1] or [1, 1] in float32.
        bias: [N] in bfloat16, or None.

    Returns:
        [M, N] in bfloat16.
    """
    if weight_scale.numel() > 1:
        return _multiply(rows, weight, scale, weight_scale.t(), bias)
    product, scale = _multiply(rows, weight, torch.ones_like(weight_scale), weight_scale, None), scale.bfloat16()
    return product * scale if bias is None else torch.addcmul(bias, product, scale)


def _multiply(rows: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """torch's product in 8 bits, which has no public name in all the versions that the pack runs with."""
    return torch._scaled_mm(
        rows, weight.t(), scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


@torch.no_grad()
def _quantize_weight(weight: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    """A weight [out, in] in e4m3, and its scale, [out, 1] or [1, 1]."""
    if weight.dtype == FP8:
        return weight, torch.ones(len(weight) if by_rows else 1, 1, device=weight.device)
    quantized, scale = quantize_rows(weight if by_rows else weight.reshape(1, -1))
    return quantized.view_as(weight), scale


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
