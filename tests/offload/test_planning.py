"""Memory plans, as arithmetic on sizes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from instantcharacter.offload import GIB, RELEASED, MemoryPlan, ModuleSize, plan
from instantcharacter.offload.planning import spread

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("gib", "strategy", "streamed"),
    [(4, "stream", 56), (6, "stream", 53), (8, "stream", 50), (10, "stream", 47), (12, "stream", 42),
     (16, "stream", 30), (24, "stream", 8), (32, "stream", 0), (48, "none", 0), (80, "none", 0)],
)  # fmt: skip
def test_plan_for_a_card(gib, strategy, streamed):
    found = plan(vram_bytes=gib * GIB)
    assert (found.strategy, found.streamed_blocks, found.resident_blocks) == (strategy, streamed, 57 - streamed)
    assert found.predicted_peak < gib * GIB
    assert not found.tiled
    assert not found.fp8


def test_a_larger_card_never_holds_less():
    plans = [plan(vram_bytes=gib * GIB // 2) for gib in range(8, 120)]
    for smaller, larger in itertools.pairwise(plans):
        assert smaller.resident <= larger.resident
        assert smaller.host_bytes >= larger.host_bytes


def test_what_stays_and_what_comes_is_all_of_it():
    weights = sum(component.size for component in RELEASED.values())
    for gib in (4, 12, 24, 32, 80):
        found = plan(vram_bytes=gib * GIB)
        assert found.resident + found.host_bytes == weights


def test_fp8_needs_half_the_link():
    transformer = RELEASED["transformer"]
    half = ModuleSize(transformer.modules[0].rest // 2, tuple(size // 2 for size in transformer.modules[0].blocks))
    fp8 = dataclasses.replace(transformer, modules=(half,), dtype="float8_e4m3fn")
    found = plan({**RELEASED, "transformer": fp8}, 12 * GIB)
    assert found.fp8
    assert found.streamed_blocks < plan(vram_bytes=12 * GIB).streamed_blocks
    assert "FLUX in float8_e4m3fn" in str(found)


def test_larger_pictures_leave_less_room_for_blocks():
    small, large = (plan(vram_bytes=16 * GIB, resolution=(side, side)) for side in (768, 1536))
    assert small.resident_blocks > large.resident_blocks
    assert plan(vram_bytes=16 * GIB, resolution=1536) == large
    assert plan(vram_bytes=16 * GIB, batch=4).resident_blocks < plan(vram_bytes=16 * GIB).resident_blocks


def test_vae_is_tiled_only_where_there_is_no_other_way():
    assert not plan(vram_bytes=4 * GIB).tiled
    large = plan(vram_bytes=4 * GIB, resolution=(1536, 1536))
    assert large.tiled
    assert large.predicted_peak < 4 * GIB


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"1\.00 GiB of GPU memory are too little: 1024×1024, 1 at once, takes 2\.\d"):
        plan(vram_bytes=GIB)


def test_too_little_host_memory_is_not_pinned():
    assert plan(vram_bytes=8 * GIB, ram_bytes=64 * GIB).pinned
    tight = plan(vram_bytes=8 * GIB, ram_bytes=24 * GIB)
    assert not tight.pinned
    assert "not pinned" in str(tight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fast"}, "expected one of auto, none"),
        ({"strategy": None}, "expected one of auto, none"),
        *[({"vram_bytes": value}, "vram_bytes is .*; expected a finite number from 1") for value in (0, NAN, "24")],
        *[({"ram_bytes": value}, "ram_bytes is .*; expected a finite number from 1") for value in (-1, INF, None)],
        *[({"batch": value}, "batch is .*; expected a whole number from 1") for value in (0, 1.5, 10**400)],
        *[({"resolution": (value, 1024)}, "width is .*; expected a whole number") for value in (0, NAN, "1024")],
        *[({"resolution": value}, "resolution is .*; expected width and height") for value in ((1024,), "1024", None)],
        *[({"components": value}, "expected the sizes of models") for value in ({}, None, [])],
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(**settings)


def test_each_smaller_plan_is_smaller_and_the_last_is_sequential():
    found: MemoryPlan | None = plan(strategy="none")
    steps = []
    while found:
        steps.append(found)
        found = found.smaller()
    peaks = [step.predicted_peak for step in steps]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert (steps[0].strategy, steps[-1].strategy) == ("none", "sequential")
    assert len(steps) > 5


def test_strategies_are_in_the_order_of_their_memory():
    peaks = [plan(strategy=strategy).predicted_peak for strategy in ("none", "model", "stream", "sequential")]
    assert peaks == sorted(peaks, reverse=True)


def test_streamed_blocks_are_spread_evenly():
    blocks = plan().blocks
    for rate in (50 << 20, 150 << 20, 250 << 20):
        streamed = spread(blocks, rate)
        doubles, singles = (sum(blocks[i] for i in streamed if (i < 19) == double) for double in (True, False))
        assert doubles / 19 == pytest.approx(rate, rel=0.35)
        assert singles / 38 == pytest.approx(rate, rel=0.35)
    assert spread(blocks, max(blocks)) == tuple(range(57))


def test_a_plan_can_be_read():
    text = str(plan(vram_bytes=12 * GIB))
    assert "stream: 12.00 GiB of GPU memory, 64.00 GiB of host memory, 1024×1024, 1 at once" in text
    assert "15 of 57 blocks stay on the GPU, 42 stream" in text
    assert "text_encoder_2" in text
    assert "predicted peak 11.21 GiB" in text
