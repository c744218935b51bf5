from __future__ import annotations

import numpy as np
import pytest
import torch

from instantcharacter.model.tensors import check_range, check_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_the_shape_pass(dtype):
    check_tensor("latents", torch.ones(2, 3, 4, dtype=dtype), (2, None, 4))


@pytest.mark.parametrize(
    "value",
    [
        *[None, "latents", 1.0, np.ones((2, 3, 4)), torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(2, 0, 4)],
        *[torch.ones(2, 3, 4, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64)],
        *[
            torch.ones(2, 3, 4).to_sparse(),
            torch.ones(2, 3, 4, device="meta"),
            torch.ones(2, 3, 4).to(torch.float8_e5m2),
        ],
        torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(3, 4)], layout=torch.jagged),
    ],
)
def test_other_shapes_and_kinds_are_refused(value):
    with pytest.raises(ValueError, match=r"^latents is .*; expected a tensor \[2, any, 4\] in float$"):
        check_tensor("latents", value, (2, None, 4))


def test_one_dtype_may_be_expected():
    with pytest.raises(ValueError, match=r"in torch.float32; expected a tensor \[1\] in torch.bfloat16"):
        check_tensor("latents", torch.ones(1), (1,), torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_that_are_not_finite_or_huge_are_refused(value):
    with pytest.raises(ValueError, match="^latents has values from .*; expected finite ones, -10000 to 10000$"):
        check_tensor("latents", torch.tensor([0.0, value]), (2,))
    with pytest.raises(ValueError, match="^image has values from .* 0 to 1$"):
        check_range("image", np.array([0.5, value]), 0, 1)
