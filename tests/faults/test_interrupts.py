"""Ctrl-C at the Nth call of what a picture or a training needs: nothing is lost, and the next run is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support import tiny

PIPELINE = tiny.tiny_pipeline()
PIPELINE.set_progress_bar_config(disable=True)
FOX = PIPELINE.character_adapter.create_character(PIPELINE.character_encoder(Image.new("RGB", (64, 64), "red")))
CALLS = {
    **dict.fromkeys(("transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"), 3),
    **dict.fromkeys(("transformer.proj_out", "transformer.time_text_embed", "transformer.x_embedder"), 3),
    **dict.fromkeys(("transformer.norm_out", "transformer.transformer_blocks.0.attn.to_q"), 3),
    **dict.fromkeys(("vae.decoder", "vae.decoder.up_blocks.2"), 1),
}
"""Modules of the pipeline, and how often a picture of three steps calls each."""
FAULTS = [KeyboardInterrupt, torch.OutOfMemoryError]


def picture() -> Any:
    return PIPELINE(
        "a fox", subject_image=FOX, height=32, width=32, num_inference_steps=3,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed() -> Any:
    return picture()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "number"), [(name, n) for name, calls in CALLS.items() for n in range(calls)])
def test_picture(undisturbed, monkeypatch, name, number, fault):
    """The next picture is the same, bit for bit, and no hook is left."""
    module, calls = PIPELINE, []
    for part in name.split("."):
        module = module[int(part)] if part.isdecimal() else getattr(module, part)
    hooks = {id(m): len(m._forward_pre_hooks) + len(m._forward_hooks) for m in PIPELINE.transformer.modules()}

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) > number:
            raise fault("out of memory" if fault is torch.OutOfMemoryError else "")

    handle = module.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(fault):
            picture()
    finally:
        handle.remove()
    assert (picture() == undisturbed).all()
    assert hooks == {id(m): len(m._forward_pre_hooks) + len(m._forward_hooks) for m in PIPELINE.transformer.modules()}
