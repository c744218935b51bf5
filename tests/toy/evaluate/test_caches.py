"""The table of caches, of few pictures in few steps."""

from __future__ import annotations

import pytest

from instantcharacter.files import catalog
from toy.evaluate import caches

NAMES = ["none", "cache_threshold 0.12", "FirstBlockCache 0.2"]


@pytest.mark.slow
def test_rows_have_what_is_computed_and_what_is_right():
    rows = dict(caches.evaluate(catalog.TOY_FOLDER, NAMES, count=2, steps=14))
    assert list(rows) == NAMES
    plain, ours, theirs = (rows[name] for name in NAMES)
    assert plain["computed"] == 1
    assert plain["pixels off"] == plain["± identity"] == 0
    for row in (ours, theirs):
        assert 0.3 < row["computed"] < 1
        assert 0 < row["pixels off"] < 0.1
        assert {"identity", "action", "scene", "style"} < set(row)


def test_every_cache_of_diffusers_can_be_enabled_twice():
    """The transformer is the same for all rows, and each is taken away again."""
    toy = caches.Toy.load(catalog.TOY_FOLDER)
    configs = [cache for cache in caches.CACHES.values() if not isinstance(cache, float)]
    for config in [*configs, *configs]:
        toy.pipeline.transformer.enable_cache(config)
        toy.pipeline.transformer.disable_cache()
    assert len({type(config) for config in configs}) == 2
