from __future__ import annotations

import pytest
import torch
from support import recorded

NAN, INF = float("nan"), float("inf")


def generate(pipeline, character) -> torch.Tensor:
    return pipeline(**recorded.run_settings(), subject_image=character)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"vram_gb": value}, "vram_gb is .*; expected a finite number") for value in (NAN, INF, -1, 0, "8", 1e300)],
        *[({"strategy": value}, "offload strategy is .*; expected one of auto, none") for value in ("fast", None, [])],
        *[({"device": value}, "device is .*; expected one of torch's") for value in ("tpu", "", 1.5, [])],
    ],
)
def test_offloading_that_is_refused_leaves_the_one_before(pipeline, character, arguments, message):
    expected = generate(pipeline, character)
    pipeline.enable_character_offload("stream", device="cpu")
    offloader = pipeline.offloader
    with pytest.raises(ValueError, match=message):
        pipeline.enable_character_offload(**{"strategy": "none", "device": "cpu", **arguments})
    assert pipeline.offloader is offloader
    assert torch.equal(generate(pipeline, character), expected)


def test_more_memory_than_there_is_is_all_of_it(pipeline, character):
    expected = generate(pipeline, character)
    assert pipeline.enable_character_offload(vram_gb=100_000, device="cpu").strategy == "none"
    assert torch.equal(generate(pipeline, character), expected)


def test_an_unknown_device_is_refused_for_adapters_and_8_bits(pipeline, adapter):
    for call in (pipeline.enable_character_fp8, lambda device: pipeline.set_character_adapter(adapter, device)):
        with pytest.raises(ValueError, match="device is 'tpu'; expected one of torch's"):
            call("tpu")
