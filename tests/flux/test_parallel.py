from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support import context_parallel as cp
from support import recorded
from support.recorded import error

from benchmarks.scaling_model import BF16, exchanged_bytes
from instantcharacter.flux.parallel import enable_context_parallel, own_part


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """The pictures of one process."""
    made = cp.pipeline()
    return {name: cp.generate(made, **changes) for name, changes in cp.settings().items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, Any]]:
    """What two processes come to together."""
    return cp.together(2, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("order", ["adapter first", "parallel first"])
def test_processes_generate_the_picture_of_one(outcomes, alone, order):
    for pictures in outcomes:
        for name, picture in pictures[order].items():
            assert error(picture, alone[name]) < 1e-5, name
    for name in alone.keys() - {"plain"}:
        assert error(alone["plain"], alone[name]) > 1e-2, name


@pytest.mark.parametrize("way", ["none", "stream", "sequential", "compiled"])
def test_weights_may_be_offloaded_and_blocks_compiled(outcomes, alone, way):
    for pictures in outcomes:
        assert error(pictures[way], alone["character"]) < 1e-5


@pytest.mark.parametrize(
    "scenario, message",
    [
        ("9 image tokens", "2 processes cannot share 9 image tokens: change the size"),
        ("9 text tokens", "2 processes cannot share 9 text tokens: change the size, or start fewer"),
        ("noise", "give each a generator with the same seed"),
        ("cache", "decide in each process by itself"),
    ],
)
def test_what_would_be_no_picture_is_refused(outcomes, scenario, message):
    for refusals in outcomes:
        assert isinstance(refusals[scenario], ValueError)
        assert re.search(message, str(refusals[scenario]))


def test_no_step_is_run_again_in_one_of_several_processes(outcomes):
    """It would exchange tensors with the steps that the other goes on with."""
    short, other = (outcome["memory"] for outcome in outcomes)
    assert isinstance(short, torch.OutOfMemoryError)
    assert isinstance(other, Exception), "it went on with tensors of nobody"


def test_processes_exchange_what_flux_itself_does(outcomes):
    """Of the character, nothing: benchmarks.scaling_model counts on it."""
    flux = recorded.transformer()
    blocks, width = len(flux.attn_processors), flux.config.num_attention_heads * flux.config.attention_head_dim
    expected = exchanged_bytes(2, tokens=24 + 10, width=width, blocks=blocks) / BF16
    assert [outcome["traffic"] for outcome in outcomes] == [expected, expected]


def test_heads_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"3 processes cannot share FLUX's 2 attention heads; expected \[2\]"):
        enable_context_parallel(recorded.transformer())


def test_processes_without_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="needs a GPU for each process, and this machine has none"):
        enable_context_parallel(recorded.transformer())


def test_one_process_computes_all_tokens():
    tokens = torch.zeros(1, 8, 1)
    assert own_part(tokens, recorded.transformer()) is tokens
