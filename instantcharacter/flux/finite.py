"""Numbers that are not finite: a damaged file of FLUX makes them, and they end in a black picture without an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..files.reading import check_finite

DAMAGED = "a file of FLUX, T5, CLIP or a LoRA is damaged, or needs a wider dtype than float16: fetch it again"


@contextmanager
def finite_predictions(transformer: nn.Module) -> Iterator[None]:
    """Context manager that raises at its end if FLUX, or what it is conditioned on, made NaN or infinities.

    Files of 34 GB are too long to read through when they are loaded. The GPU is asked once, at the end.

    Raises:
        ValueError: a prediction is not finite.
    """
    finite: list[Tensor] = []

    def check(_: nn.Module, __: tuple, output: Any) -> None:
        finite.append(output[0].isfinite().all())

    handle = transformer.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()
    if finite and not torch.stack(finite).all():
        raise ValueError(f"FLUX predicts NaN or infinities, which would be a black picture: {DAMAGED}")


def check_loaded(transformer: nn.Module, vae: nn.Module, flux_file: str, vae_file: str) -> None:
    """Raise ``ValueError`` if FLUX or its VAE lacks a weight, or a weight of the VAE, which is small, is not finite.

    diffusers leaves weights that a file lacks without memory, and says nothing.

    Args:
        transformer: FLUX, on the CPU.
        vae: on the CPU.
        flux_file: file or folder of FLUX, for the error.
        vae_file: file or folder of the VAE.
    """
    for name, part, model in ((flux_file, "FLUX", transformer), (vae_file, "VAE", vae)):
        if missing := [key for key, weight in model.named_parameters() if weight.is_meta]:
            raise ValueError(f"{name} lacks {len(missing)} weights of its {part}, {missing[0]} first: fetch it again")
    for weight in vae.parameters():
        check_finite(weight.detach(), f"{vae_file} has a VAE with weights", "fetch it again")
