from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from support import tiny
from support.pipelines import complete_pipeline, components

from instantcharacter.flux.components import VAE_TILE, DiffusersControls, PiecewiseDecoding, components_of
from instantcharacter.flux.scheduler import flux_scheduler
from instantcharacter.offload import MemoryPlan, measure, plan
from instantcharacter.offload.sizes import PHASE

CPU = torch.device("cpu")


@pytest.fixture
def whole():
    return complete_pipeline()


def test_components_are_in_the_order_of_plans(whole):
    assert list(components(whole)) == list(PHASE)


def test_every_weight_is_in_one_component(whole):
    modules = [module for found in components(whole).values() for module in found]
    ids = [id(parameter) for module in modules for parameter in module.parameters()]
    projector = whole.character_adapter.projector
    models = (whole.text_encoder, whole.text_encoder_2, whole.vae, whole.transformer, whole.character_encoder)
    assert set(ids) == {id(parameter) for model in (*models, projector) for parameter in model.parameters()}
    assert len(ids) == len(set(ids))


def test_models_that_are_not_loaded_are_no_components(whole):
    whole.text_encoder = whole.text_encoder_2 = None
    assert list(components_of(whole)) == ["transformer", "vae"]
    assert list(components_of(whole, adapter=tiny.tiny_adapter())) == ["resampler", "transformer", "vae"]


def memory_plan(pipeline, strategy, **changes) -> MemoryPlan:
    return dataclasses.replace(plan(measure(components(pipeline)), strategy=strategy), **changes)


@pytest.mark.parametrize(
    ("strategy", "tiled", "expected"), [("none", False, (0, 0)), ("stream", False, (1, 0)), ("stream", True, (1, 1))]
)
def test_the_vae_decodes_as_the_plan_has_it_and_then_as_before(whole, strategy, tiled, expected):
    before, controls = dict(vars(whole.vae)), DiffusersControls(whole)
    controls.apply(memory_plan(whole, strategy, tiled=tiled), CPU)
    assert (whole.vae.use_slicing, whole.vae.use_tiling) == expected
    if tiled:
        assert (whole.vae.tile_sample_min_size, whole.vae.tile_latent_min_size) == (VAE_TILE, VAE_TILE // 8)
    controls.undo()
    assert vars(whole.vae) == before


class OtherVae(AutoencoderMixin):
    """A VAE without the tile sizes of AutoencoderKL."""

    use_slicing = use_tiling = False


def test_a_vae_without_tile_sizes_decodes_in_slices_and_tiles_too():
    """They were set by the names of AutoencoderKL's attributes, which failed for other VAEs."""
    vae = OtherVae()
    decoding = PiecewiseDecoding(vae, 8)
    decoding.apply(sliced=True, tiled=True)
    assert (vae.use_slicing, vae.use_tiling) == (True, True)
    decoding.undo()
    assert (vae.use_slicing, vae.use_tiling) == (False, False)


@pytest.mark.parametrize(("guided", "shift"), [(True, 3.0), (False, 1.0)])
def test_the_scheduler_has_the_released_settings(guided, shift):
    scheduler = flux_scheduler(guided)
    assert (scheduler.config.shift, scheduler.config.use_dynamic_shifting) == (shift, guided)
