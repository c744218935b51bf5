"""The cache of the last loaded model, in a real ComfyUI."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from support import recorded
from support.comfyui_sampling import conditioning

from instantcharacter import InstantCharacterPipeline
from instantcharacter.comfyui.init_image import Prompt
from instantcharacter.comfyui.model_cache import shared_cache
from instantcharacter.comfyui.sampler import HostedPipeline


def load() -> HostedPipeline:
    return HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto")


@pytest.fixture
def cache():
    return shared_cache("pipeline")


def test_all_nodes_share_one_cache(cache):
    assert shared_cache("pipeline") is cache


def test_the_same_key_loads_nothing(cache):
    pipeline = cache.get("one", load)
    assert cache.get("one", lambda: pytest.fail("loaded again")) is pipeline


def test_a_pipeline_that_has_run_is_freed_before_another_is_loaded(cache):
    pipeline = cache.get("one", load)
    pipeline.generate(None, Prompt(conditioning()), (96, 64), 1, 7)
    first = weakref.ref(pipeline.pipeline.transformer)
    del pipeline

    def load_after_first() -> HostedPipeline:
        assert first() is None
        return load()

    cache.get("another", load_after_first)


def test_a_failed_load_leaves_no_pipeline(cache):
    first = weakref.ref(cache.get("one", load))
    with pytest.raises(FileNotFoundError):
        cache.get("missing", lambda: Path("missing").stat())
    assert first() is None
    assert cache.model is None


def test_the_pipeline_is_freed_with_the_last_node():
    cache = shared_cache("pipeline")
    pipeline = weakref.ref(cache.get("one", load))
    del cache
    assert pipeline() is None
    assert shared_cache("pipeline").model is None
