from __future__ import annotations

import pytest
import torch

from instantcharacter.training.objective import add_noise, sample_sigmas, velocity_losses


@pytest.mark.parametrize(("tokens", "shift"), [(256, 0.5), (4096, 1.15)])
def test_noise_levels_are_logit_normal_with_the_shift_of_flux(tokens, shift):
    sigmas = sample_sigmas(100_000, tokens, torch.Generator().manual_seed(0))
    logits = torch.logit(sigmas.double())
    assert logits.mean().item() == pytest.approx(shift, abs=0.02)
    assert logits.std().item() == pytest.approx(1, abs=0.02)


def test_velocity_leads_from_noise_to_the_latents():
    latents, noise = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(latents, noise, sigmas)
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2])
    velocity = noise - latents
    torch.testing.assert_close(noisy - sigmas[:, None, None] * velocity, latents)
    assert velocity_losses(velocity, latents, noise).tolist() == [0, 0, 0]
    assert velocity_losses(velocity + 2, latents, noise).tolist() == pytest.approx([4, 4, 4])
