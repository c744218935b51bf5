"""Progress, cancelling and previews, in a real ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import pytest
import torch
from support.comfyui_sampling import to_tokens
from support.pretended_cuda import CPU

from instantcharacter.comfyui.progress import StepCallback, progress


@pytest.fixture
def reported(monkeypatch) -> list[tuple]:
    """What the progress bar gets: value, total, preview."""
    calls: list[tuple] = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, *values: calls.append(values))
    return calls


@pytest.fixture
def interrupted():
    management.interrupt_current_processing()
    yield
    management.interrupt_current_processing(False)


def test_progress_is_reported(reported):
    progress()(3, 7)
    assert reported == [(3, 7)]


def test_progress_raises_after_a_cancel(reported, interrupted):
    with pytest.raises(management.InterruptProcessingException):
        progress()(1, 2)
    assert reported == []


def test_a_step_raises_after_a_cancel(interrupted):
    callback = StepCallback(96, 64, 2, comfy.latent_formats.Flux(), CPU)
    with pytest.raises(management.InterruptProcessingException):
        callback(None, 0, None, {"latents": torch.zeros(1, 24, 64)})


def test_preview_is_the_denoised_estimate(reported, monkeypatch):
    """With a constant velocity the estimate is the clean picture at every step."""
    decoded = []
    previewer = SimpleNamespace(decode_latent_to_preview_image=lambda kind, latents: decoded.append(latents))
    monkeypatch.setattr("latent_preview.get_previewer", lambda *_: previewer)
    callback = StepCallback(96, 64, 3, comfy.latent_formats.Flux(), CPU)
    clean, noise = torch.randn(1, 16, 8, 12), torch.randn(1, 16, 8, 12)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.0])
    scheduler = SimpleNamespace(sigmas=sigmas, step_index=0)
    pipeline = SimpleNamespace(scheduler=scheduler, num_timesteps=3)
    for step in range(3):
        scheduler.step_index = step + 1
        latents = to_tokens(clean + sigmas[step + 1] * (noise - clean))
        assert callback(pipeline, step, None, {"latents": latents}) == {}
    assert [call[:2] for call in reported] == [(1, 3), (2, 3), (3, 3)]
    assert len(decoded) == 2
    for latents in decoded:
        assert torch.allclose(latents, clean, atol=1e-4)
    assert torch.allclose(callback.samples, comfy.latent_formats.Flux().process_out(clean), atol=1e-4)
