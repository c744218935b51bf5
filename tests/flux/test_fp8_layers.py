"""Linear layers in 8 bits, one at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.fp8 import needs_fp8_arithmetic
from support.recorded import error
from torch import Tensor, nn

from instantcharacter.flux.fp8_layers import FP8, LARGEST_FP8, Fp8Linear, StoredLinear, quantize_rows

E4M3_ERROR = 1 / 16
"""The most that rounding to 4 significant bits moves a number, relative to it."""
LAYER_ERROR = 0.04
"""The most that a layer whose weights and inputs are rounded is off: two roundings of 2.6 % each, root mean square."""
BF16_ERROR = 0.004
"""The most that a product is off which is exact but for its rounding to bfloat16, twice where it is scaled later."""

both_kernels = pytest.mark.parametrize("by_rows", [True, False])


def layer(inputs: int = 128, outputs: int = 64, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias).to(dtype)


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.view(torch.uint8).clone() for key, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    now = bits(module)
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


# Rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_rounded_relative_to_their_largest_number(dtype):
    x = rows(5, 64, dtype=dtype) * torch.tensor([[1.0], [1e-4], [1e3], [3.0], [0.02]]).to(dtype)
    quantized, scale = quantize_rows(x)
    assert (quantized.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (5, 1))
    assert quantized.float().abs().amax(dim=1).tolist() == [LARGEST_FP8] * 5
    numbers, exact = quantized.float() * scale, x.float()
    ordinary = exact.abs() > exact.abs().amax(dim=1, keepdim=True) / 2**14
    assert ((numbers - exact).abs() <= E4M3_ERROR * exact.abs() * 1.001)[ordinary].all()


def test_scales_are_numbers_of_bfloat16():
    _, scale = quantize_rows(rows(50, 64))
    assert torch.equal(scale.bfloat16().float(), scale)


def test_a_row_of_zeros_stays_zero():
    quantized, scale = quantize_rows(torch.zeros(2, 16))
    assert not quantized.float().any()
    assert scale.isfinite().all()


def test_a_transposed_input_becomes_rows_in_memory():
    x = rows(64, 32).t()
    quantized, _ = quantize_rows(x)
    assert quantized.is_contiguous()
    assert torch.equal(quantized.float(), quantize_rows(x.contiguous())[0].float())


def test_torchs_compiler_can_call_the_kernel_without_looking_into_it(monkeypatch):
    """Its operation describes what it returns, and changes none of its inputs; here around torch's own rounding."""
    monkeypatch.setattr("instantcharacter.flux.fp8_layers._kernel", lambda rows, largest, smallest: quantize_rows(rows))
    operation = torch.ops.instantcharacter.quantize_rows.default
    for x in (rows(5, 64, dtype=torch.bfloat16), rows(64, 5).t(), rows(1, 8192)):
        torch.library.opcheck(operation, (x,), test_utils=("test_schema", "test_faketensor"))
        for ours, expected in zip(operation(x), quantize_rows(x), strict=True):
            assert torch.equal(ours.float(), expected.float())


# The layer that multiplies in 8 bits


@needs_fp8_arithmetic
@both_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [128, 1288])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_close_to_float32(by_rows, dtype, inputs, bias):
    linear, x = layer(inputs, dtype=dtype, bias=bias), rows(2, 7, inputs, dtype=dtype)
    out = Fp8Linear(linear, dtype, by_rows)(x)
    assert (out.dtype, out.shape) == (dtype, (2, 7, 64))
    exact = F.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    assert BF16_ERROR < error(out, exact.detach()) < LAYER_ERROR


@needs_fp8_arithmetic
@both_kernels
def test_the_product_is_that_of_the_rounded_numbers(by_rows):
    fast, x = Fp8Linear(layer(), torch.float32, by_rows), rows(9, 128)
    quantized, scale = quantize_rows(x)
    exact = F.linear(quantized.double() * scale, fast.weight.double() * fast.weight_scale, fast.bias.double())
    assert error(fast(x), exact) < BF16_ERROR


@needs_fp8_arithmetic
@both_kernels
def test_no_row_is_off_because_of_another_ones_size(by_rows):
    linear, x = layer(bias=False), rows(3, 128) * torch.tensor([[1e-3], [1.0], [1e4]])
    out = Fp8Linear(linear, torch.float32, by_rows)(x)
    for ours, exact in zip(out, linear(x).detach(), strict=True):
        assert error(ours, exact) < 2 * LAYER_ERROR  # of 64 numbers


@needs_fp8_arithmetic
@both_kernels
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 1, 128), (2, 3, 4, 128)])
def test_inputs_may_have_any_batch_dimensions(by_rows, shape):
    fast = Fp8Linear(layer(), torch.float32, by_rows)
    x = rows(*shape)
    assert torch.equal(fast(x).reshape(-1, 64), fast(x.reshape(-1, 128)))


@both_kernels
def test_it_has_the_sizes_of_the_layer_it_replaces(by_rows):
    fast = Fp8Linear(layer(1288), torch.float32, by_rows)
    assert (fast.in_features, fast.out_features, fast.by_rows) == (1288, 64, by_rows)
    assert (fast.weight.dtype, fast.weight.shape) == (FP8, (64, 1296))
    assert not fast.weight[:, 1288:].float().any()
    assert fast.weight_scale.shape == ((64, 1) if by_rows else (1, 1))
    assert not any(parameter.requires_grad for parameter in fast.parameters())


@both_kernels
def test_weights_in_8_bits_are_not_rounded_again(by_rows):
    linear = layer().to(FP8)
    fast = Fp8Linear(linear, torch.bfloat16, by_rows)
    assert torch.equal(fast.weight.float() * fast.weight_scale, linear.weight.float())


@pytest.mark.parametrize("kind", [StoredLinear, lambda *args: Fp8Linear(*args, by_rows=True)])
def test_a_change_of_dtype_leaves_8_bits_alone(kind):
    small = nn.Sequential(kind(layer(), torch.float32))
    before = bits(small)
    for change in ("half", "float", "bfloat16", "double"):
        assert unchanged(getattr(small, change)(), before)
    assert unchanged(small.to("cpu", torch.float16), before)
    assert {tensor.device.type for tensor in small.to("meta").state_dict().values()} == {"meta"}


@needs_fp8_arithmetic
@both_kernels
def test_the_state_of_one_layer_fits_another(by_rows):
    one, other = (Fp8Linear(layer(outputs=64), torch.float32, by_rows) for _ in range(2))
    other.weight.data = torch.zeros_like(other.weight.view(torch.uint8)).view(FP8)
    other.weight_scale.zero_()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(other(rows(2, 128)), one(rows(2, 128)))


# The layer that is stored in 8 bits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_layer_computes_with_its_rounded_weights(dtype, bias):
    linear, x = layer(dtype=dtype, bias=bias), rows(2, 7, 128, dtype=dtype)
    rounded = copy.deepcopy(linear).to(FP8).to(dtype)
    stored = StoredLinear(linear, dtype)
    assert {tensor.dtype for tensor in stored.state_dict().values()} == {FP8}
    assert torch.equal(stored(x), rounded(x))
