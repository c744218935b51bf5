"""The Sweep in a real ComfyUI."""

from __future__ import annotations

import comfy.model_management as management
import folder_paths
import pytest
import torch
from support import recorded
from support.comfyui_sampling import conditioning

from instantcharacter import InstantCharacterPipeline
from instantcharacter.comfyui.hosting import HostedCharacter
from instantcharacter.comfyui.init_image import Prompt
from instantcharacter.comfyui.nodes.sweep import Sweep
from instantcharacter.comfyui.sampler import HostedPipeline, StyledPipeline
from instantcharacter.flux.sweep import cross, labelled_page

SIZE = (96, 64)
AXES = {"scale": (0.4, 0.9), "guidance": (3.5,), "seed": (7, 2**64 - 1)}
TEXTS = {name: ", ".join(map(str, values)) for name, values in AXES.items()}


@pytest.fixture
def pipe(tmp_path, monkeypatch) -> StyledPipeline:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return StyledPipeline(HostedPipeline(InstantCharacterPipeline(**recorded.components()), "auto"))


def sweep(pipe: StyledPipeline, **settings):
    inputs = {"prompt": "", "width": SIZE[0], "height": SIZE[1], "steps": 2, "positive": conditioning()}
    return Sweep.run(pipe, **{**inputs, **TEXTS, **settings})


def test_its_pictures_are_the_samplers_bit_for_bit_in_their_places(pipe, adapter, character):
    who = HostedCharacter(character, adapter)
    sheet, images = sweep(pipe, character=who).result
    page, corners = labelled_page(AXES, SIZE)
    assert sheet.shape == (1, page.height, page.width, 3)
    assert len(images) == len(corners) == 4
    for settings, (x, y), image in zip(cross(AXES), corners, images):
        single = pipe.generate(
            who,
            Prompt(conditioning()),
            SIZE,
            2,
            settings["seed"],
            guidance_scale=settings["guidance"],
            subject_scale=settings["scale"],
        ).image[0]
        assert torch.equal(image, single)
        assert torch.equal(sheet[0, y : y + SIZE[1], x : x + SIZE[0]], single)
    assert len({image.numpy().tobytes() for image in images}) == 4


def test_the_sheet_is_shown_on_the_node(pipe):
    assert len(sweep(pipe, scale="0.9", seed="7").ui.as_dict()["images"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"scale": ""}, "scale is ''; expected numbers"), ({"seed": "1.5"}, "seed is '1.5'; expected whole numbers")],
)
def test_texts_that_are_no_values_are_refused_before_anything_is_generated(settings, message):
    with pytest.raises(ValueError, match=message):
        sweep(None, **settings)


def test_a_cancel_ends_it(pipe):
    management.interrupt_current_processing()
    try:
        with pytest.raises(management.InterruptProcessingException):
            sweep(pipe)
    finally:
        management.interrupt_current_processing(False)
