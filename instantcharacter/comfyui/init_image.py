"""The Sampler's inputs as plain data: a prompt, and a picture or latent to start from."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Conditioning: TypeAlias = list[Any]
"""ComfyUI's CONDITIONING: ``[[embeddings, {"pooled_output": …}], …]``."""
VAE_SCALE = 8
"""Pixels along the side of a latent."""
TOKEN_SIZE = 16
"""Pixels along the side of an image token. Width and height of a picture are multiples of it."""


class Prompt(NamedTuple):
    """Positive and negative prompt, each as text or as CONDITIONING.

    The negative prompt has an effect if ``true_cfg``, the scale of classifier-free guidance, is above 1.
    """

    positive: str | Conditioning
    negative: str | Conditioning = ""
    true_cfg: float = 1.0


class InitImage(NamedTuple):
    """The picture that image-to-image starts from: ``image`` or ``samples``.

    Attributes:
        denoise: how much of the picture changes, above 0 to 1.
        image: IMAGE, [B, H, W, C] in [0, 1].
        samples: of a LATENT, [B, channels, h, w].
    """

    denoise: float
    image: Tensor | None = None
    samples: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the result in pixels: those of the picture, rounded down to multiples of 16."""
        if self.samples is not None:
            height, width = (VAE_SCALE * side for side in self.samples.shape[-2:])
        else:
            assert self.image is not None
            _, height, width, _ = self.image.shape
        return max(width // TOKEN_SIZE, 1) * TOKEN_SIZE, max(height // TOKEN_SIZE, 1) * TOKEN_SIZE

    @property
    def batch_size(self) -> int:
        """The number of pictures in the batch."""
        return len(self.image if self.samples is None else self.samples)  # type: ignore[arg-type]


def init_from_inputs(image: Tensor | None, latent: dict | None, denoise: float) -> InitImage | None:
    """The init image of a Sampler node's inputs; None if neither is connected.

    Raises:
        ValueError: both are connected, the LATENT has a mask (inpainting), or ``denoise`` is
            not above 0 and at most 1.
    """
    if image is None and latent is None:
        return None
    if image is not None and latent is not None:
        raise ValueError("image and latent are both connected: disconnect one")
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise is {denoise}; expected above 0 to 1")
    if image is not None:
        return InitImage(denoise, image=image)
    assert latent is not None
    if "noise_mask" in latent:
        raise ValueError(
            "the latent has a mask, and the Sampler does not inpaint: use InstantCharacter Apply and KSampler"
        )
    return InitImage(denoise, samples=latent["samples"])
