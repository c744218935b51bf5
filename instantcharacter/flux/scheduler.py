"""FLUX.1's scheduler."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler


def flux_scheduler(guided: bool = True) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with the settings that FLUX.1 was released with.

    Args:
        guided: for FLUX.1-dev, and models with a guidance embedding: timesteps are shifted by the picture's size.
            FLUX.1-schnell's are not shifted.
    """
    return FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided)
