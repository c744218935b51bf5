"""A kernel that scales and rounds the rows of a matrix to 8 bits in one pass. It needs Triton, which not all have."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch import Tensor

FP8 = torch.float8_e4m3fn
ELEMENTS_A_WARP = 512


@triton.jit
def quantize_row(  # type: ignore[no-untyped-def]
    rows, quantized, scales, width, stride, largest_number, smallest_scale, BLOCK: tl.constexpr
):
    """One program for each row; ``rows`` [M, width] lie ``stride`` apart, ``BLOCK`` is a power of two above width."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(rows + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), largest_number), smallest_scale)
    scale = scale.to(tl.bfloat16).to(tl.float32)
    tl.store(scales + row, scale)
    tl.store(quantized + row * width + columns, tl.div_rn(values, scale).to(tl.float8e4nv), mask=inside)


def quantize_rows(rows: Tensor, largest_number: float, smallest_scale: float) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, and the scale of each; see :func:`~.fp8_layers.quantize_rows`.

    Args:
        rows: [M, K] on an NVIDIA GPU of compute capability 8.9 or later.
        largest_number: of e4m3.
        smallest_scale: of a row of zeros.
    """
    rows = rows.contiguous()
    count, width = rows.shape
    quantized = torch.empty(count, width, dtype=FP8, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // ELEMENTS_A_WARP))
    with torch.cuda.device_of(rows):
        quantize_row[(count,)](
            rows,
            quantized,
            scales,
            width,
            rows.stride(0),
            largest_number,
            smallest_scale,
            BLOCK=block,
            num_warps=warps,
        )
    return quantized, scales
