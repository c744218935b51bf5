"""FLUX compiled with the character in it. The graphs are torch's own, run without a C++ compiler or a GPU."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from support import recorded
from support.recorded import error
from torch._dynamo.utils import counters

from instantcharacter import Character, Strength
from instantcharacter.flux.compile import CompiledForward

can_trace = pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6 cannot trace FLUX of diffusers 0.35, and a warning says so"
)


@pytest.fixture(autouse=True)
def no_code_generated(monkeypatch):
    """Traces and guards as always, and then runs the graph without generating code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), **changes})[0]


@can_trace
def test_compiled_blocks_generate_the_same_picture(pipeline, character):
    expected = generate(pipeline, subject_image=character)
    assert pipeline.enable_character_compile()
    assert error(generate(pipeline, subject_image=character), expected) < 1e-6
    assert counters["stats"]["unique_graphs"] > 0


def test_nothing_is_compiled_for_another_prompt_scale_character_or_seed(pipeline, adapter, character):
    pipeline.enable_character_compile()
    generate(pipeline, subject_image=character)
    graphs = counters["stats"]["unique_graphs"]
    # one for each kind of block; and FLUX hands its first single block a tensor of another layout than the others
    assert graphs <= 3
    other = Character(adapter.projector.fuse(*recorded.features(seed=99)), adapter.fingerprint())
    settings = recorded.run_settings()
    generate(pipeline, subject_image=other, subject_scale=0.4)
    generate(pipeline, subject_image=character, subject_scale=1.3, prompt_embeds=settings["prompt_embeds"] + 1)
    generate(pipeline, subject_image=other, latents=settings["latents"].flip(0) * 0.9)
    generate(pipeline, subject_image=character, subject_scale=Strength(1.2, 0.9, 0.6, 0.8, 1.1))
    assert counters["stats"]["unique_graphs"] == graphs


@can_trace
def test_many_sizes_of_picture_are_compiled_with_and_without_a_character(pipeline, character, caplog):
    pipeline.enable_character_compile()
    for count in (1, 2, 3):
        for width in (64, 96, 128, 160):
            size = {"latents": None, "num_inference_steps": 1, "width": width, "num_images_per_prompt": count}
            for subject in (None, character):
                generate(pipeline, subject_image=subject, **size)
    assert "without being compiled" not in caplog.text


@can_trace
def test_streamed_blocks_are_compiled_too(pipeline, character):
    expected = generate(pipeline, subject_image=character)
    pipeline.enable_character_offload("stream")
    pipeline.enable_character_compile()
    assert error(generate(pipeline, subject_image=character), expected) < 1e-6
    assert 0 < counters["stats"]["unique_graphs"] <= 3


def test_flux_runs_eagerly_where_the_compiler_fails(pipeline, character, monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    expected = generate(pipeline, subject_image=character)
    monkeypatch.setattr(torch, "compile", lambda forward, **_: torch._dynamo.optimize(broken)(forward))
    pipeline.enable_character_compile()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(pipeline, subject_image=character), expected)
    assert caplog.text.count("FLUX runs without being compiled") == 1
    assert "no C++ compiler here" in caplog.text


def test_fp8_storage_is_not_compiled_and_says_so(pipeline, caplog):
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        assert not pipeline.enable_character_compile()
    assert "stored in fp8" in caplog.text


def test_errors_of_flux_itself_are_raised(pipeline, character):
    pipeline.enable_character_compile()
    block = pipeline.transformer.transformer_blocks[0]
    narrower = block.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": torch.randn(1, 10, 63)}), with_kwargs=True
    )
    with narrower, pytest.raises(RuntimeError):
        generate(pipeline, subject_image=character)


# One block alone


def compiled(monkeypatch, error: Exception, forward, failures: list[str]) -> CompiledForward:
    """A block whose compiled code raises an error."""

    def fail(*_):
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    return CompiledForward(forward, failures)


def test_a_block_that_cannot_be_compiled_runs_eagerly_and_so_do_the_others(monkeypatch, caplog):
    failures: list[str] = []
    first, second = (compiled(monkeypatch, ValueError("no\n\ncompiler"), lambda x: x + 1, failures) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        assert [first(1), first(2), second(3)] == [2, 3, 4]
    assert failures == ["no compiler"]
    assert caplog.text.count("FLUX runs without being compiled: no compiler") == 1


def test_an_error_of_the_block_itself_does_not_end_compiling(monkeypatch, caplog):
    failures: list[str] = []
    block = compiled(monkeypatch, RuntimeError("from the graph"), lambda x: 1 / x, failures)
    with pytest.raises(ZeroDivisionError):
        block(0)
    assert failures == []
    assert "without being compiled" not in caplog.text


def test_out_of_memory_is_left_to_the_offloader(monkeypatch):
    failures: list[str] = []
    block = compiled(monkeypatch, torch.OutOfMemoryError("full"), lambda x: pytest.fail("it ran again"), failures)
    with pytest.raises(torch.OutOfMemoryError):
        block(0)
    assert failures == []
