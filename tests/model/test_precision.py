"""bfloat16 stays within 2e-2 of float32 on the same inputs."""

from __future__ import annotations

import copy

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from reference.reference_fill import inputs
from support import recorded
from support.recorded import error

from instantcharacter import Character, InstantCharacterPipeline
from instantcharacter.model.attention import CharacterAttention

TOLERANCE = 2e-2
BF16 = torch.bfloat16


def rounded(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """One module with weights that bfloat16 can hold, computing in bfloat16 and in float32."""
    low = copy.deepcopy(module).to(BF16)
    return low, copy.deepcopy(low).float()


def test_features_agree(encoder):
    low, high = rounded(encoder)
    for ours, theirs in zip(low(recorded.PICTURE), high(recorded.PICTURE)):
        assert ours.dtype == BF16
        assert error(ours, theirs) < TOLERANCE


def test_fused_features_and_tokens_agree(adapter):
    low, high = rounded(adapter.projector)
    features = [tensor.to(BF16) for tensor in recorded.features()]
    fused = low.fuse(*features)
    assert fused.dtype == BF16
    assert error(fused, high.fuse(*(tensor.float() for tensor in features))) < TOLERANCE
    timestep = torch.tensor([700.0])
    for folded in (False, True):
        tokens = low.resample(fused, timestep, folded)
        assert tokens.dtype == BF16
        assert error(tokens, high.resample(fused.float(), timestep, folded)) < TOLERANCE


def test_attention_agrees():
    low, high = rounded(CharacterAttention(dim=256, heads=2, token_dim=64))
    query, tokens = inputs("query", (2, 24, 2, 128)).to(BF16), inputs("tokens", (1, 16, 64)).to(BF16)
    scale = torch.linspace(0.5, 2, 128).to(BF16)
    strength = torch.tensor(1.0)
    seen = low(query, tokens, low.key_scale(scale), strength)
    assert seen.dtype == BF16
    assert error(seen, high(query.float(), tokens.float(), high.key_scale(scale.float()), strength)) < TOLERANCE


def test_pipelines_agree(fused):
    """At timesteps and a guidance that bfloat16 can hold: FLUX multiplies both by 1000 and takes their sine."""

    def draw(dtype: torch.dtype, **subject) -> torch.Tensor:
        parts = recorded.components()
        for part in ("transformer", "vae"):
            parts[part] = parts[part].to(BF16).to(dtype)
        pipeline = InstantCharacterPipeline(**parts)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.set_character_adapter(recorded.adapter().to(BF16).to(dtype))
        settings = recorded.run_settings() | {"guidance_scale": 4.0, "sigmas": [1.0, 0.5, 0.25, 0.125]}
        settings |= {key: value.to(BF16).to(dtype) for key, value in settings.items() if torch.is_tensor(value)}
        return pipeline(**settings, **subject)[0]

    character = Character(fused.to(BF16), recorded.adapter().fingerprint())
    low, high = (draw(dtype, subject_image=character) for dtype in (BF16, torch.float32))
    assert low.dtype == BF16
    assert error(low, high) < TOLERANCE
    assert error(high, draw(torch.float32)) > 5 * TOLERANCE  # the character is there to be compared
