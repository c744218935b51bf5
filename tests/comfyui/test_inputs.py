"""The checks of a node's inputs; no ComfyUI is needed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from instantcharacter.comfyui.inputs import check_inputs, images, masks

NAN, INF = math.nan, math.inf
PROMPT = [[torch.rand(1, 5, 8), {"pooled_output": torch.rand(1, 4)}]]
GOOD = {
    "IMAGE": torch.rand(2, 4, 5, 3),
    "MASK": torch.rand(1, 4, 5),
    "LATENT": {"samples": torch.rand(1, 16, 2, 2)},
    "CONDITIONING": PROMPT,
    "STRING": "a fox \U0001f98a",
    "BOOLEAN": True,
    "COMBO": "fox",
    "INT": 272,
    "FLOAT": 256.5,
}
LITERALS = [{"/etc/passwd": 1}, ["/etc/passwd"], "/etc/passwd", 7, 1.5, None, {}, [], [[1, 2]], {"samples": "a.png"}]


def check(kind: str, value: Any, optional: bool = False) -> Any:
    """What a node gets as an input of this kind."""
    declared = SimpleNamespace(id="it", io_type=kind, optional=optional, min=256, max=4096, options=["fox", "owl"])
    return check_inputs([declared], {"it": value}).get("it", "left out")


@pytest.mark.parametrize("kind", GOOD)
def test_good_values_pass_as_they_are(kind):
    checked = check(kind, GOOD[kind])
    assert torch.equal(checked, GOOD[kind]) if isinstance(checked, torch.Tensor) else checked == GOOD[kind]


@pytest.mark.parametrize("literal", LITERALS, ids=str)
@pytest.mark.parametrize("kind", ["IMAGE", "MASK", "LATENT", "CONDITIONING", "CHARACTER_STRENGTH"])
def test_a_literal_in_place_of_a_link_is_refused_with_the_inputs_name_alone(kind, literal):
    with pytest.raises(ValueError, match="^it is a .*; expected an? [A-Z_]+.*: connect a node's output$") as refused:
        check(kind, literal)
    assert "passwd" not in str(refused.value)


@pytest.mark.parametrize("kind", GOOD)
def test_an_optional_input_of_null_is_not_connected(kind):
    assert check(kind, None, optional=True) == "left out"
    with pytest.raises(ValueError, match="^it is "):
        check(kind, None)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        *(("FLOAT", value, f"it is {value}; expected 256 to 4096") for value in (NAN, INF, -INF, 255.9, 4096.1)),
        *(("INT", value, f"it is {value}; expected 256 to 4096") for value in (0, -1, 2**64, True)),
        ("INT", 300.0, "it is a float; expected a whole number"),
        ("FLOAT", "300", "it is a str; expected a number"),
        ("FLOAT", torch.tensor(300.0), "it is a Tensor; expected a number"),
        ("STRING", "\ud800", "it has letters that are not UTF-8"),
        ("STRING", 7, "it is a int; expected a text"),
        ("BOOLEAN", "false", "it is a str; expected a BOOLEAN"),
        *(("COMBO", value, "it is not in its list") for value in ("../fox", "\ud800", 7, None, torch.ones(2), ["fox"])),
        ("LATENT", {"samples": torch.full((1, 16, 2, 2), NAN)}, "it contains NaN or infinity"),
        ("LATENT", {"samples": torch.zeros(0, 16, 2, 2)}, "it is empty"),
        ("CONDITIONING", [[torch.full((1, 5, 8), INF), {}]], "it contains NaN or infinity"),
        ("CONDITIONING", [[torch.rand(1, 5, 8), {"pooled_output": "x"}]], "it is a str; expected a CONDITIONING"),
        ("CONDITIONING", [[None, {}]], "it is a NoneType; expected a CONDITIONING"),
        ("CONDITIONING", [[torch.rand(1, 5, 8)]], "it is a list; expected a CONDITIONING"),
    ],
)
def test_wrong_values_are_refused_in_words_that_can_be_logged(kind, value, message):
    with pytest.raises(ValueError, match=message) as refused:
        check(kind, value)
    assert str(refused.value).encode()


def test_numbers_of_numpy_are_numbers():
    assert check("INT", np.int64(300)) == 300
    assert type(check("FLOAT", np.float32(300.5))) is float


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 3), (4, 4, 3), (4, 4), (1, 1, 4, 4, 3), (1, 4, 4, 2), (1, 4, 4, 5), (1, 0, 4, 3), ()]
)
def test_images_have_four_dimensions_and_colours(shape):
    with pytest.raises(ValueError, match=r"subject is .*\[.*expected an IMAGE"):
        images(torch.rand(shape), "subject")


@pytest.mark.parametrize("shape", [(0, 4, 4), (4,), (1, 2, 4, 4), (1, 4, 4, 1), (1, 1, 4, 4, 1), (1, 0, 4), ()])
def test_masks_have_two_or_three_dimensions(shape):
    with pytest.raises(ValueError, match=r"it is .*\[.*expected a MASK"):
        check("MASK", torch.rand(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64])
@pytest.mark.parametrize("kind", ["IMAGE", "MASK"])
def test_pictures_of_integers_are_refused(kind, dtype):
    with pytest.raises(ValueError, match="it is of torch..*of floats from 0 to 1"):
        check(kind, torch.ones(1, 4, 4, 3).to(dtype))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["IMAGE", "MASK"])
def test_pictures_that_are_not_finite_are_refused(kind, value):
    picture = GOOD[kind].clone()
    picture[0, 1, 2] = value
    with pytest.raises(ValueError, match="it contains NaN or infinity: the node before it failed"):
        check(kind, picture)


def test_pictures_are_clipped_and_converted():
    assert images(torch.tensor([-0.5, 0.25, 7.0]).reshape(1, 1, 1, 3)).flatten().tolist() == [0, 0.25, 1]
    assert images(torch.ones(1, 1, 1, 3, dtype=torch.float16)).dtype == torch.float32
    assert masks(torch.rand(4, 5)).shape == (1, 4, 5)
    assert masks(torch.rand(3, 1, 4, 5)).shape == (3, 4, 5)
    assert masks(torch.ones(4, 5, dtype=torch.bool)).dtype == torch.float32
