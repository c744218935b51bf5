"""These tests run inside a real ComfyUI, in its Python: see ``tests/comfyui/test_inside.py``.

``PRETENDED_CUDA`` says on what device: none, ComfyUI's CPU; ``static``, a pretended GPU; ``novram``, one on which FLUX
comes layer by layer; ``dynamic``, ComfyUI's dynamic VRAM on it; ``tight``, the same with pages for a third of FLUX;
``second``, the second of two, the first of which nothing touches; ``dynamic-second``, dynamic VRAM on that one;
``cpu``, ComfyUI's CPU beside a GPU that nothing touches.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

MODE = os.environ.get("PRETENDED_CUDA", "")
PAGES = {"tight": 900}

sys.argv = ["comfyui", "--use-pytorch-cross-attention"]  # attention as on NVIDIA
sys.argv += ["--cpu"] if MODE in ("", "cpu") else ["--fp32-unet"]
sys.argv += ["--novram"] if MODE == "novram" else []
sys.path.insert(0, os.environ["INSIDE_COMFYUI"])

import pytest
from support import pretended_aimdo
from support.pretended_cuda import PretendedCuda

SECOND = MODE.endswith("second")
TOUCHED = set() if MODE == "cpu" else {int(SECOND)}
CARD = PretendedCuda(devices=1 + SECOND) if MODE else None
if CARD:
    CARD.__enter__()
    CARD.index = int(SECOND)

import comfy.options

comfy.options.enable_args_parsing()

import comfy.model_management
import comfy.sd
import torch
from support import recorded

from instantcharacter import Character
from instantcharacter.comfyui.hosting import HostedAdapter

if TOUCHED and CARD:  # as FLUX is: ComfyUI would merge LoRAs in half precision
    device = comfy.model_management.get_torch_device()
    comfy.model_management.LORA_COMPUTE_DTYPES[device] = torch.float32
if MODE in ("dynamic", "tight", "dynamic-second"):
    pretended_aimdo.install()


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Nothing is read, written or freed while a copy of it may be under way, nor is on another GPU than ComfyUI's."""
    if CARD is None:
        yield
        return
    CARD.races.clear()
    CARD.contexts.clear()
    pretended_aimdo.Budget.pages = PAGES.get(MODE, 10**9)
    yield
    races = list(dict.fromkeys(CARD.races))
    assert not races, races[:8]
    assert CARD.contexts <= TOUCHED


@pytest.fixture
def model():
    """The recorded FLUX as a ComfyUI MODEL."""
    return comfy.sd.load_diffusion_model_state_dict(recorded.transformer().state_dict())


@pytest.fixture
def adapter() -> HostedAdapter:
    return HostedAdapter(recorded.adapter())


@pytest.fixture
def character(adapter) -> Character:
    return Character(adapter.adapter.projector.fuse(*recorded.features()).detach(), adapter.fingerprint)


@pytest.fixture
def other_character(adapter) -> Character:
    return Character(adapter.adapter.projector.fuse(*recorded.features(seed=99)).detach(), adapter.fingerprint)
