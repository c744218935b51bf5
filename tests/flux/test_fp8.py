"""FLUX in 8 bits: with a character, LoRAs, memory plans and torch.compile."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import recorded, tiny, tiny_models
from support.fp8 import needs_fp8_arithmetic
from support.pipelines import complete_pipeline, components
from support.pipelines import generate as generate_from_prompt
from support.pretended_cuda import CUDA, PretendedCuda
from support.recorded import error
from torch._dynamo.utils import counters

from instantcharacter import InstantCharacterPipeline
from instantcharacter.flux.fp8 import (
    check_fp8_arithmetic,
    compute_in_fp8,
    first_fp8_layer,
    set_weight_dtype,
    store_in_fp8,
)
from instantcharacter.flux.fp8_layers import FP8, Fp8Linear, StoredLinear
from instantcharacter.flux.load import FluxFiles, load_flux
from instantcharacter.flux.lora import load_lora
from instantcharacter.offload.planning import STRATEGIES
from instantcharacter.offload.sizes import measure

CPU = torch.device("cpu")
FLUX_ERROR = 0.04
"""The most that FLUX in 8 bits is off, latents after 4 steps; a character changes them by 0.25."""

both_kernels = pytest.mark.parametrize("by_rows", [True, False])


@pytest.fixture
def card() -> Iterator[PretendedCuda]:
    with PretendedCuda() as card:
        yield card
    assert not card.races, card.races[:5]


def pipeline_of(adapter=None) -> InstantCharacterPipeline:
    pipeline = InstantCharacterPipeline(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    if adapter:
        pipeline.set_character_adapter(adapter)
    return pipeline


def fast(pipeline: InstantCharacterPipeline, by_rows: bool = True) -> InstantCharacterPipeline:
    """Computing in 8 bits on the CPU, where users may not."""
    compute_in_fp8(pipeline.transformer, torch.float32, by_rows)
    return pipeline


def generate(pipeline, **changes) -> torch.Tensor:
    return pipeline(**{**recorded.run_settings(), **changes})[0]


def large_layers(pipeline: InstantCharacterPipeline, kind: type) -> set[str]:
    """The names of the layers of a class, without the numbers of their blocks."""
    names = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, kind)]
    assert all("blocks." in name for name in names)
    return {name.split(".", 2)[2] for name in names}


LARGE = {
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "proj_mlp", "proj_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}
OF_THE_CHARACTER = {"attn.processor.attention.to_k_ip", "attn.processor.attention.to_v_ip"}

# Devices


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_that_is_no_nvidia_gpu_is_refused(device):
    with pytest.raises(ValueError, match=rf"8\.9 or later .*; this device is {device}\. Choose fp8_e4m3fn"):
        check_fp8_arithmetic(torch.device(device))


def test_an_older_gpu_is_refused_by_its_name(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    with pytest.raises(ValueError, match=r"8\.9 or later .*; pretended has 8\.6\. Choose fp8_e4m3fn"):
        check_fp8_arithmetic(CUDA)


@needs_fp8_arithmetic
def test_a_kernel_with_a_scale_for_each_row_is_found_by_trying(card, monkeypatch):
    assert check_fp8_arithmetic(CUDA)
    product = torch._scaled_mm

    def whole_matrices_alone(*args, **kwargs):
        if args[3].numel() > 1:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", whole_matrices_alone)
    assert not check_fp8_arithmetic(CUDA)


def test_a_torch_without_the_product_is_refused_with_its_reason(card, monkeypatch):
    def no_product(*args, **kwargs):
        raise RuntimeError("not built for this GPU\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", no_product)
    with pytest.raises(ValueError, match=r"no 8-bit arithmetic for pretended \(not built for this GPU\)\. Choose"):
        check_fp8_arithmetic(CUDA)


def test_running_out_of_memory_is_no_missing_kernel(card):
    card.capacity = 1000
    with pytest.raises(torch.OutOfMemoryError):
        check_fp8_arithmetic(CUDA)


# Pictures


@needs_fp8_arithmetic
@both_kernels
def test_flux_in_8_bits_generates_nearly_the_same_picture(adapter, character, by_rows):
    expected = pipeline_of(adapter)
    pipeline = fast(pipeline_of(adapter), by_rows)
    for subject in (None, character):
        ours, theirs = (generate(one, subject_image=subject) for one in (pipeline, expected))
        assert ours.dtype == torch.float32
        assert 1e-3 < error(ours, theirs) < FLUX_ERROR


@needs_fp8_arithmetic
@both_kernels
def test_the_large_layers_compute_in_8_bits_and_no_others(adapter, by_rows):
    pipeline = fast(pipeline_of(adapter), by_rows)
    assert large_layers(pipeline, Fp8Linear) == LARGE | OF_THE_CHARACTER
    assert first_fp8_layer(pipeline.transformer).by_rows == by_rows
    assert pipeline.transformer.dtype == torch.float32


@needs_fp8_arithmetic
@both_kernels
def test_an_adapter_may_come_before_or_after(adapter, character, by_rows):
    before, after = fast(pipeline_of(adapter), by_rows), fast(pipeline_of(), by_rows)
    after.set_character_adapter(adapter)
    assert large_layers(after, Fp8Linear) == LARGE | OF_THE_CHARACTER
    assert torch.equal(generate(after, subject_image=character), generate(before, subject_image=character))
    after.remove_character_adapter()
    assert torch.equal(generate(after), generate(before))
    assert large_layers(after, Fp8Linear) == LARGE


@needs_fp8_arithmetic
def test_8_bits_twice_are_8_bits_once(adapter, character):
    pipeline = fast(pipeline_of(adapter))
    expected = generate(pipeline, subject_image=character)
    assert torch.equal(generate(fast(pipeline), subject_image=character), expected)


@needs_fp8_arithmetic
def test_weights_that_were_stored_in_8_bits_are_not_rounded_again(character, adapter):
    pipeline, expected = pipeline_of(adapter), pipeline_of(adapter)
    store_in_fp8(pipeline.transformer, torch.float32)
    stored = pipeline.transformer.transformer_blocks[0].ff.net[2].weight.float()
    fast(pipeline)
    assert torch.equal(pipeline.transformer.transformer_blocks[0].ff.net[2].weight.float(), stored)
    assert error(generate(pipeline, subject_image=character), generate(expected, subject_image=character)) < 0.1


@needs_fp8_arithmetic
def test_a_pipeline_in_8_bits_may_be_converted(adapter, character):
    pipeline = fast(pipeline_of(adapter))
    expected = generate(pipeline, subject_image=character)
    pipeline.to(torch.bfloat16)
    assert pipeline.transformer.transformer_blocks[0].ff.net[2].weight.dtype == FP8
    pipeline.to(torch.float32)
    assert error(generate(pipeline, subject_image=character), expected) < 0.02  # norms and modulations in bfloat16


# Compiled


@pytest.fixture
def no_code_generated(monkeypatch):
    """Traces and guards as always, and then runs the graph without generating code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@needs_fp8_arithmetic
@both_kernels
@pytest.mark.parametrize("strategy", [None, "stream"])
def test_compiled_it_generates_the_same(adapter, character, no_code_generated, by_rows, strategy):
    pipeline = fast(pipeline_of(adapter), by_rows)
    expected = generate(pipeline, subject_image=character)
    if strategy:
        pipeline.enable_character_offload(strategy)
    assert pipeline.enable_character_compile()
    assert torch.equal(generate(pipeline, subject_image=character), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 3
    settings = recorded.run_settings()
    generate(pipeline, subject_image=character, subject_scale=0.4, prompt_embeds=settings["prompt_embeds"] + 1)
    assert counters["stats"]["unique_graphs"] == graphs


def test_compiled_flux_that_is_stored_in_8_bits_generates_the_same(adapter, character, no_code_generated, caplog):
    pipeline = pipeline_of(adapter)
    store_in_fp8(pipeline.transformer, torch.float32)
    expected = generate(pipeline, subject_image=character)
    assert pipeline.enable_character_compile()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(pipeline, subject_image=character), expected)
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    assert "without being compiled" not in caplog.text


# Memory plans


@pytest.fixture(scope="module")
def in_memory() -> torch.Tensor:
    """The picture of a pipeline in 8 bits without a plan."""
    return generate_from_prompt(fast(complete_pipeline()))


@needs_fp8_arithmetic
@pytest.mark.parametrize("first", ["8 bits", "plan"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_generates_the_same_picture(card, in_memory, strategy, first):
    pipeline = complete_pipeline()
    steps = [pipeline.enable_character_fp8, partial(pipeline.enable_character_offload, strategy)]
    for step in steps if first == "8 bits" else steps[::-1]:
        step(device="cuda")
    assert pipeline.offloader.plan.strategy == ("none" if strategy == "auto" else strategy)
    assert torch.equal(generate_from_prompt(pipeline).cpu(), in_memory)


@needs_fp8_arithmetic
def test_a_plan_counts_weights_in_8_bits(adapter):
    pipeline = pipeline_of(adapter)
    before = measure(components(pipeline))["transformer"]
    size = measure(components(fast(pipeline)))["transformer"]
    layer = pipeline.transformer.transformer_blocks[0].ff.net[2]
    assert layer.weight.nbytes == layer.in_features * layer.out_features
    assert sum(size.modules[0].blocks) < 0.6 * sum(before.modules[0].blocks)


# LoRAs


@pytest.fixture
def lora_file(tmp_path) -> Path:
    """A LoRA for layers in and around the blocks."""
    torch.manual_seed(0)
    layers = [
        *("x_embedder", "proj_out", "transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"),
        *("transformer_blocks.0.norm1.linear", "single_transformer_blocks.1.proj_out"),
    ]
    tensors, transformer = {}, recorded.transformer()
    for name in layers:
        layer = transformer.get_submodule(name)
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(4, layer.in_features) / 8
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, 4) / 8
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@needs_fp8_arithmetic
@pytest.mark.parametrize("by_diffusers", [False, True])
def test_a_lora_may_come_before_or_after_and_is_not_rounded(adapter, character, lora_file, by_diffusers):
    def style(pipeline) -> None:
        if by_diffusers:
            pipeline.load_lora_weights(str(lora_file), adapter_name="style")
        else:
            load_lora(pipeline, lora_file, "style")

    before, after, in_float = pipeline_of(adapter), fast(pipeline_of(adapter)), pipeline_of(adapter)
    for pipeline in (before, after, in_float):
        style(pipeline)
    fast(before)
    ours, same, exact = (generate(p, subject_image=character) for p in (before, after, in_float))
    assert torch.equal(ours, same)
    assert error(ours, exact) < FLUX_ERROR
    assert error(exact, generate(pipeline_of(adapter), subject_image=character)) > 3 * FLUX_ERROR
    matrices = [p for name, p in after.transformer.named_parameters() if "lora_" in name]
    assert {matrix.dtype for matrix in matrices} == {torch.float32}
    after.unload_lora_weights()
    assert torch.equal(
        generate(after, subject_image=character), generate(fast(pipeline_of(adapter)), subject_image=character)
    )


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e4m3fn_fast"])
def test_a_lora_cannot_be_fused_into_8_bits(card, lora_file, weight_dtype):
    pipeline = pipeline_of()
    set_weight_dtype(pipeline.transformer, torch.float32, weight_dtype, CUDA)
    load_lora(pipeline, lora_file, "style")
    with pytest.raises(ValueError, match="cannot be fused into weights in 8 bits"):
        pipeline.fuse_lora()


# Files


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, FluxFiles]:
    """FLUX in files of each kind."""
    folder = tmp_path_factory.mktemp("flux")
    parts = {**tiny.tiny_components(), "transformer": recorded.transformer()}
    InstantCharacterPipeline(**parts).save_pretrained(folder / "folder")
    vae = next((folder / "folder/vae").glob("*.safetensors"))
    state = recorded.transformer().state_dict()
    save_file(state, folder / "float.safetensors")
    save_file({key: weight.to(FP8) for key, weight in state.items()}, folder / "fp8.safetensors")
    (folder / "cut_off.gguf").touch()
    single = {name: FluxFiles(folder / name, vae=vae) for name in ("float.safetensors", "fp8.safetensors")}
    return {"folder": FluxFiles(folder / "folder"), "gguf": FluxFiles(folder / "cut_off.gguf", vae=vae), **single}


@needs_fp8_arithmetic
@pytest.mark.parametrize("kind", ["folder", "float.safetensors", "fp8.safetensors"])
def test_flux_is_loaded_for_8_bit_arithmetic(card, files, kind):
    loaded = load_flux(files[kind], torch.float32, "fp8_e4m3fn_fast", CUDA)
    assert large_layers(loaded, Fp8Linear) == LARGE
    assert {tensor.device for tensor in loaded.transformer.state_dict().values()} == {CPU}
    in_fp8 = {id(p) for m in loaded.transformer.modules() if isinstance(m, Fp8Linear) for p in m.parameters()}
    assert {p.dtype for p in loaded.transformer.parameters() if id(p) not in in_fp8} == {torch.float32}
    expected = pipeline_of()
    if kind == "fp8.safetensors":
        expected.transformer.to(FP8)
    state = fast(expected).transformer.state_dict()
    assert loaded.transformer.state_dict().keys() == state.keys()
    for key, tensor in loaded.transformer.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8)), key
    layer = loaded.transformer.single_transformer_blocks[0].proj_out
    assert (layer.weight_scale == 1).all() == (kind == "fp8.safetensors")


@pytest.mark.parametrize("device", [None, CPU])
def test_a_device_without_8_bit_arithmetic_is_refused_before_flux_is_read(files, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="8-bit arithmetic needs an NVIDIA GPU"):
        load_flux(FluxFiles(Path("gone.safetensors")), torch.float32, "fp8_e4m3fn_fast", device)


@needs_fp8_arithmetic
def test_gguf_is_refused_before_it_is_read(card, files):
    with pytest.raises(ValueError, match=r"cut_off\.gguf is quantised: 8-bit arithmetic needs FLUX\.1 in bf16"):
        load_flux(files["gguf"], torch.float32, "fp8_e4m3fn_fast", CUDA)


def test_quantised_flux_is_refused(tmp_path, files):
    pytest.importorskip("gguf")
    tiny_models.save_gguf(tmp_path / "flux.gguf")
    pipeline = load_flux(FluxFiles(tmp_path / "flux.gguf", vae=files["gguf"].vae), torch.float32)
    with pytest.raises(ValueError, match="FLUX is quantised"):
        fast(pipeline)


@needs_fp8_arithmetic
def test_flux_that_others_offload_is_refused(card):
    pipeline = pipeline_of()
    pipeline.enable_sequential_cpu_offload(device="cuda")
    with pytest.raises(ValueError, match="offloaded: enable 8-bit arithmetic before"):
        pipeline.enable_character_fp8()


@needs_fp8_arithmetic
def test_the_state_of_one_flux_in_8_bits_fits_another(adapter, character):
    pipeline, other = fast(pipeline_of(adapter)), pipeline_of(adapter)
    other.transformer.load_state_dict(recorded.transformer(seed=99).state_dict(), strict=False)
    fast(other).transformer.load_state_dict(pipeline.transformer.state_dict())
    assert torch.equal(generate(other, subject_image=character), generate(pipeline, subject_image=character))


@needs_fp8_arithmetic
def test_flux_in_8_bits_is_not_saved_in_a_form_that_diffusers_would_misread(tmp_path):
    with pytest.raises(ValueError, match="save the pipeline before"):
        fast(pipeline_of()).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


# Stored alone


def test_stored_in_8_bits_it_generates_what_diffusers_layerwise_casting_does(adapter, character):
    ours, theirs = pipeline_of(), pipeline_of()
    store_in_fp8(ours.transformer, torch.float32)
    assert large_layers(ours, StoredLinear) == LARGE
    theirs.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    assert ours.transformer.dtype == torch.float32
    assert {key: weight.dtype for key, weight in ours.transformer.state_dict().items()} == {
        key: weight.dtype for key, weight in theirs.transformer.state_dict().items()
    }
    for subject in (None, character):
        if subject:
            ours.set_character_adapter(adapter)
            theirs.set_character_adapter(adapter)
        assert torch.equal(generate(ours, subject_image=subject), generate(theirs, subject_image=subject))


@needs_fp8_arithmetic
@pytest.mark.parametrize("in_8_bits", [store_in_fp8, partial(compute_in_fp8, by_rows=False)])
def test_weights_in_8_bits_are_freed_without_garbage_collection(adapter, character, in_8_bits):
    pipeline = pipeline_of(adapter)
    in_8_bits(pipeline.transformer, torch.float32)
    generate(pipeline, subject_image=character)
    block = weakref.ref(pipeline.transformer.single_transformer_blocks[0])
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert block() is None
    finally:
        gc.enable()
