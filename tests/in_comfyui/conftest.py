"""These tests run inside a real ComfyUI, in its Python, on its CPU device: see ``tests/test_comfyui.py``."""

from __future__ import annotations

import os
import sys

sys.argv = ["comfyui", "--cpu"]
sys.path.insert(0, os.environ["INSIDE_COMFYUI"])

import comfy.options

comfy.options.enable_args_parsing()

import comfy.sd
import pytest
import recorded

from instantcharacter import Character
from instantcharacter.comfy_host import HostedAdapter


@pytest.fixture
def model():
    """The recorded FLUX as a ComfyUI MODEL."""
    return comfy.sd.load_diffusion_model_state_dict(recorded.transformer().state_dict())


@pytest.fixture
def adapter() -> HostedAdapter:
    return HostedAdapter(recorded.adapter())


@pytest.fixture
def character(adapter) -> Character:
    return Character(adapter.projector.fuse(*recorded.features()).detach(), adapter.fingerprint)


@pytest.fixture
def other_character(adapter) -> Character:
    return Character(adapter.projector.fuse(*recorded.features(seed=99)).detach(), adapter.fingerprint)
