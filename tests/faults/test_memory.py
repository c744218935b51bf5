"""The GPU has no memory at the Nth allocation of a picture: an error, or the picture; the next one is right."""

from __future__ import annotations

import pytest
import torch
from support.pipelines import complete_pipeline, generate
from support.pretended_cuda import CPU, CUDA, PretendedCuda


@pytest.fixture(scope="module")
def undisturbed() -> torch.Tensor:
    return generate(complete_pipeline())


@pytest.mark.parametrize("strategy", ["none", "stream"])
@pytest.mark.parametrize("number", [0, 50, 900])
def test_picture(undisturbed, strategy, number):
    with PretendedCuda() as card:
        pipeline = complete_pipeline()
        pipeline.enable_character_offload(strategy, device=CUDA)
        (gpu,), calls = card.gpus, []
        allocate = gpu.allocate

        def allocate_but_one(size: int) -> None:
            calls.append(size)
            if len(calls) == number + 1:
                gpu.allocated += size  # as the card's own does
                raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
            allocate(size)

        gpu.allocate = allocate_but_one
        try:
            generate(pipeline)
        except torch.OutOfMemoryError as error:
            assert "out of memory" in str(error)
        gpu.allocate = allocate
        assert torch.equal(generate(pipeline).to(CPU), undisturbed)
    assert not card.races
