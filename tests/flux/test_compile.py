"""FLUX compiled with the character in it. The graphs are torch's own, run without a C++ compiler or a GPU."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from support import recorded
from support.recorded import error
from torch._dynamo.utils import counters

from instantcharacter import Character

can_trace = pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 cannot trace FLUX of diffusers 0.35, and a warning says so"
)


@pytest.fixture(autouse=True)
def no_code_generated(monkeypatch):
    """Traces and guards as always, and then runs the graph as it is."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def draw(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), **changes})[0]


@can_trace
def test_compiled_draws_the_same(pipeline, character):
    expected = draw(pipeline, subject_image=character)
    assert pipeline.enable_character_compile()
    assert error(draw(pipeline, subject_image=character), expected) < 1e-6
    assert counters["stats"]["unique_graphs"] > 0


def test_nothing_is_compiled_for_another_prompt_scale_character_or_seed(pipeline, adapter, character):
    pipeline.enable_character_compile()
    draw(pipeline, subject_image=character)
    graphs = counters["stats"]["unique_graphs"]
    # one for each kind of block; and FLUX hands its first single block a tensor of another layout than the others
    assert graphs <= 3
    other = Character(adapter.projector.fuse(*recorded.features(seed=99)), adapter.fingerprint())
    settings = recorded.run_settings()
    draw(pipeline, subject_image=other, subject_scale=0.4)
    draw(pipeline, subject_image=character, subject_scale=1.3, prompt_embeds=settings["prompt_embeds"] + 1)
    draw(pipeline, subject_image=other, latents=settings["latents"].flip(0) * 0.9)
    assert counters["stats"]["unique_graphs"] == graphs


@can_trace
def test_blocks_that_stream_are_compiled_too(pipeline, character):
    expected = draw(pipeline, subject_image=character)
    pipeline.enable_character_offload("stream")
    pipeline.enable_character_compile()
    assert error(draw(pipeline, subject_image=character), expected) < 1e-6
    assert 0 < counters["stats"]["unique_graphs"] <= 3


def test_a_compiler_that_fails_is_done_without(pipeline, character, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    expected = draw(pipeline, subject_image=character)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: torch._dynamo.optimize(broken)(forward))
    pipeline.enable_character_compile()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(draw(pipeline, subject_image=character), expected)
    assert caplog.text.count("FLUX runs without being compiled") == 1
    assert "no C++ compiler here" in caplog.text


def test_fp8_storage_is_not_compiled_and_says_so(pipeline, caplog):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert not pipeline.enable_character_compile()
    assert "stored in fp8" in caplog.text


def test_errors_of_flux_itself_are_not_swallowed(pipeline, character):
    pipeline.enable_character_compile()
    with pytest.raises(RuntimeError):
        draw(pipeline, subject_image=character, prompt_embeds=torch.randn(1, 10, 63))
