"""Each use of ComfyUI's internals, alone: a failure here means that ComfyUI has changed."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.bg_removal_model
import comfy.model_management as management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from safetensors.torch import save_file
from support import background_removal
from support.comfyui_sampling import SIGMAS, sample

from instantcharacter.comfyui import internals
from instantcharacter.comfyui.hosting import load, to_patcher


def test_loaded_models_have_their_patcher():
    patcher = to_patcher(torch.nn.Linear(1, 1))
    load(patcher)
    assert patcher in [loaded.model for loaded in internals.loaded_models()]
    assert internals.loaded_models() is management.current_loaded_models


def test_unload_moves_one_model_alone():
    one, other = to_patcher(torch.nn.Linear(2, 2)), to_patcher(torch.nn.Linear(3, 3))
    load(one)
    load(other)
    internals.unload(one)
    loaded = [loaded.model for loaded in internals.loaded_models()]
    assert one not in loaded
    assert other in loaded


def test_free_memory_for_models_leaves_what_comfyui_reserves():
    device = management.get_torch_device()
    free = internals.free_memory_for_models(device)
    assert 0 < free < management.get_total_memory(device)


def test_memory_beside_a_model_counts_what_is_absent_of_it_and_its_activations(model):
    shape = [1, 16, 8, 12]
    management.load_models_gpu([model])
    loaded = internals.free_memory_beside(model, shape)
    expected = internals.free_memory_for_models(model.load_device) - 1.5 * model.memory_required(shape)
    assert loaded == pytest.approx(expected, rel=0.05)
    absent, loaded_size = model.model_size(), model.loaded_size
    model.loaded_size = lambda: loaded_size() - absent
    assert internals.free_memory_beside(model, shape) == pytest.approx(loaded - absent, rel=0.05)


@pytest.mark.parametrize(("most", "pins"), [(10**9, True), (-1, False)])
def test_memory_is_pinned_unless_comfyui_may_pin_none(most, pins, monkeypatch):
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", most)
    assert internals.pins_memory() is pins


def test_a_compiled_model_is_known_by_its_options_in_each_call(model):
    seen = []

    def record(executor, *args, **kwargs):
        seen.append(internals.is_compiled(internals.apply_model_options(executor, args, kwargs)))
        return executor(*args, **kwargs)

    for compiled in (False, True):
        on = model.clone()
        on.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "record", record)
        if compiled:
            set_torch_compile_wrapper(on, "eager")
            assert COMPILE_KEY in on.wrappers[WrappersMP.APPLY_MODEL]
        sample(on, sigmas=SIGMAS[-2:])
    assert seen == [False, True]


def test_background_removal_is_comfyuis_own(tmp_path, monkeypatch):
    """Its file by BiRefNet's key; its masks in the size of the picture; its weights by ComfyUI's memory management."""
    monkeypatch.setitem(comfy.bg_removal_model.BG_REMOVAL_MODELS, "birefnet", background_removal.RedForeground)
    background_removal.save(tmp_path / "birefnet.safetensors")
    find_foreground = internals.load_background_removal(tmp_path / "birefnet.safetensors")
    picture = torch.zeros(1, 20, 30, 3)
    picture[:, 5:15, 10:20, 0] = 1
    mask = find_foreground(picture)
    assert mask.reshape(mask.shape[0], *mask.shape[-2:]).shape == (1, 20, 30)
    assert (mask.reshape(20, 30) > 0.5).nonzero().tolist() == [[y, x] for y in range(5, 15) for x in range(10, 20)]
    models = [loaded.model.model for loaded in internals.loaded_models()]
    assert any(isinstance(model, background_removal.RedForeground) for model in models)


def test_a_file_that_removes_no_background_is_none(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert internals.load_background_removal(tmp_path / "other.safetensors") is None


def test_query_norms_are_those_of_every_block(model):
    flux = model.model.diffusion_model
    norms = list(internals.query_norms(flux))
    assert len(norms) == len(flux.double_blocks) + len(flux.single_blocks)
    called = []
    hooks = [norm.register_forward_hook(lambda *_, i=i: called.append(i)) for i, norm in enumerate(norms)]
    sample(model, sigmas=SIGMAS[-2:])
    for hook in hooks:
        hook.remove()
    assert called == list(range(len(norms)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype_is_that_of_the_node(model, dtype):
    changed = model.clone()
    changed.set_model_compute_dtype(dtype)
    assert internals.compute_dtype(changed) == dtype
    assert internals.compute_dtype(model) == torch.float32


def test_patches_know_their_block_and_the_first_image_token(model):
    flux = model.model.diffusion_model
    patched, seen = model.clone(), []

    def patch(attn, extra_options):
        seen.append((*internals.block_and_image_start(extra_options, len(flux.double_blocks)), attn.shape[1]))
        return attn

    patched.set_model_attn1_output_patch(patch)
    sample(patched, sigmas=SIGMAS[-2:])
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    assert [block for block, _, _ in seen] == list(range(blocks))
    assert all(tokens - start == 24 for _, start, tokens in seen)


def test_transformer_options_are_read_and_replaced(model):
    patched, seen = model.clone(), []

    def wrapper(executor, latents, timestep, *args, **kwargs):
        options = internals.transformer_options(executor, args, kwargs)
        assert "sample_sigmas" in options
        args, kwargs = internals.with_transformer_options(executor, args, kwargs, {**options, "ours": 1})
        return executor(latents, timestep, *args, **kwargs)

    def patch(attn, extra_options):
        seen.append(extra_options["ours"])
        return attn

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "ours", wrapper)
    patched.set_model_attn1_output_patch(patch)
    sample(patched, sigmas=SIGMAS[-2:])
    assert set(seen) == {1}


def test_transformer_options_may_come_by_name():
    executor = SimpleNamespace(original=lambda x, timestep, context, transformer_options: None)
    args, kwargs = ("context",), {"transformer_options": {"a": 1}}
    assert internals.transformer_options(executor, args, kwargs) == {"a": 1}
    assert internals.with_transformer_options(executor, args, kwargs, {"b": 2}) == (
        args,
        {"transformer_options": {"b": 2}},
    )
    assert kwargs == {"transformer_options": {"a": 1}}


def test_outer_wrappers_know_of_inner_ones(model):
    patched, inner = model.clone(), []

    def wrapper(executor, *args, **kwargs):
        inner.append(internals.has_inner_wrappers(executor))
        return executor(*args, **kwargs)

    for key in ("first", "second"):
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    sample(patched, sigmas=SIGMAS[-2:])
    assert inner == [True, False]
