"""The kernel that rounds rows to 8 bits: compiled for GPUs that are not here, and interpreted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from instantcharacter.flux.fp8_layers import LARGEST_FP8, SMALLEST_SCALE, find_kernel, quantize_rows

PACK = Path(__file__).parents[2]
INTERPRETED = f"""
import torch, triton
from instantcharacter.flux.fp8_kernel import FP8, quantize_row
torch.manual_seed(0)
rows = torch.randn(5, 1296) * torch.tensor([[0.0], [1e-3], [1], [30], [1e4]])
quantized, scale = torch.full(rows.shape, 7.0).to(FP8), torch.zeros(5, 1)
grid = quantize_row[(5,)]
grid(rows, quantized, scale, 1296, 1296, {LARGEST_FP8}, {SMALLEST_SCALE}, BLOCK=2048)
assert torch.equal(quantized[0].float(), torch.zeros(1296)), "a row of zeros"
assert (scale[1:] / rows[1:].abs().amax(1, keepdim=True) * {LARGEST_FP8} - 1).abs().max() < 0.01, scale
off = (quantized.float() * scale - rows)[1:].norm(dim=1) / rows[1:].norm(dim=1)
assert off.max() < 0.1, off  # the interpreter rounds down; a GPU to the nearest, as tests of the operations have it
"""


def test_rows_are_scaled_and_rounded_each_by_itself():
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(PACK)}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("capability", [89, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_every_gpu_that_multiplies_in_8_bits(capability, dtype):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from instantcharacter.flux.fp8_kernel import quantize_row

    kinds = {"rows": f"*{dtype}", "quantized": "*fp8e4nv", "scales": "*fp32", "width": "i32", "stride": "i32"}
    kinds |= {"largest_number": "fp32", "smallest_scale": "fp32", "BLOCK": "constexpr"}
    source = ASTSource(fn=quantize_row, signature=kinds, constexprs={"BLOCK": 4096})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert "e4m3" in compiled.asm["ptx"]


def test_without_a_gpu_rows_are_rounded_by_torchs_operations(caplog):
    caplog.set_level("INFO")
    expected = quantize_rows(torch.ones(2, 16))
    find_kernel(torch.device("cpu"))
    assert "without Triton, which is slower" in caplog.text
    assert all(map(torch.equal, (x.float() for x in quantize_rows(torch.ones(2, 16))), (x.float() for x in expected)))
