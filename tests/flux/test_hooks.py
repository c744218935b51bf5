"""Where diffusers and accelerate keep their hooks, which neither says publicly."""

from __future__ import annotations

import gc
import weakref

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import FluxPipeline
from diffusers.hooks import apply_layerwise_casting
from support import recorded
from torch import nn

from instantcharacter.flux.hooks import drop_empty_registry, has_accelerate_hook, has_diffusers_hooks


def test_layerwise_casting_is_seen_on_the_layers_that_it_casts():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert not any(map(has_diffusers_hooks, model.modules()))
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    assert has_diffusers_hooks(model[0])
    assert not has_diffusers_hooks(model[1])


def test_sequential_offloading_is_seen_on_the_layers_that_it_offloads():
    model = nn.Sequential(nn.Linear(4, 4))
    assert not any(map(has_accelerate_hook, model.modules()))
    cpu_offload(model, torch.device("cpu"))
    assert has_accelerate_hook(model[0])
    remove_hook_from_module(model, recurse=True)
    assert not any(map(has_accelerate_hook, model.modules()))


def test_a_transformer_that_diffusers_ran_is_freed_without_a_garbage_collection():
    pipeline = FluxPipeline(**recorded.components())
    pipeline.set_progress_bar_config(disable=True)
    gc.disable()
    try:
        pipeline(**{**recorded.run_settings(), "num_inference_steps": 1})
        assert has_diffusers_hooks(pipeline.transformer), "diffusers leaves no registry: drop_empty_registry can go"
        drop_empty_registry(pipeline.transformer)
        gone = weakref.ref(pipeline.transformer)
        del pipeline
        assert gone() is None
    finally:
        gc.enable()


def test_a_registry_with_hooks_stays():
    model = nn.Sequential(nn.Linear(4, 4))
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    drop_empty_registry(model[0])
    assert has_diffusers_hooks(model[0])
