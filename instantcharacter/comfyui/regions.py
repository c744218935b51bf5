"""The masks of characters, at the resolution of FLUX's image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.conditioning import mask_to_tokens

Area: TypeAlias = Sequence[int]
"""A part of the picture that a prompt is for: height, width, top and left in latents."""


class Regions:
    """The masks of one sampling; each is resized once for each area and size.

    ComfyUI may sample several prompts in one batch, each for an area of the picture: FLUX then gets the latents of the
    area, and the mask is cropped to it.

    Args:
        masks: of each character, [H, W] or [B, H, W], of any size, stretched over the picture; None for everywhere.
        latent_size: height and width of the whole picture in latents.
        device: of the results.
        dtype: of the results.

    Attributes:
        areas: each prompt's area by the prompt's id; None for the whole picture.
    """

    def __init__(
        self,
        masks: Sequence[Tensor | None],
        latent_size: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.areas: dict[Any, Area | None] = {}
        self._masks = masks
        self._latent_size = tuple(latent_size)
        self._device = device
        self._dtype = dtype
        self._resized: dict[tuple, Tensor] = {}

    def token_mask(
        self, index: int, latent_shape: Sequence[int], grid: tuple[int, int], prompts: Sequence[Any]
    ) -> Tensor | None:
        """A character's mask for one call of FLUX.

        Args:
            index: of the character.
            latent_shape: [B, C, h, w] of the call's latents; B is prompts × pictures.
            grid: rows and columns of image tokens.
            prompts: the ids of the call's prompts; none for one prompt without an area.

        Returns:
            [B, rows · columns, 1]; None if the character has no mask.

        Raises:
            ValueError: latents of a part of the picture whose position is unknown, or more masks than pictures.
        """
        mask = self._masks[index]
        if mask is None:
            return None
        areas = [self.areas.get(prompt) for prompt in prompts] or [None]
        batch, _, *size = latent_shape
        if not any(areas) and tuple(size) != self._latent_size:
            raise ValueError(
                "InstantCharacter: a mask on Apply needs latents of the whole picture, and another node samples a part "
                "of it. Remove that node, or the mask."
            )
        masks, pictures = 1 if mask.ndim == 2 else len(mask), batch // len(areas)
        if pictures % masks:
            raise ValueError(f"InstantCharacter: {masks} masks on Apply for a batch of {pictures}; expected one mask")
        resized = [self._resize(index, mask, area, grid) for area in areas]
        return torch.cat([each.repeat(pictures // masks, 1, 1) for each in resized])

    def _resize(self, index: int, mask: Tensor, area: Area | None, grid: tuple[int, int]) -> Tensor:
        key = (index, grid, None if area is None else tuple(area))
        if key not in self._resized:
            cropped = mask if area is None else crop_to_area(mask, self._latent_size, area)
            tokens = mask_to_tokens(cropped, *grid, may_be_empty=area is not None)
            self._resized[key] = tokens.to(self._device, self._dtype)
        return self._resized[key]


def crop_to_area(mask: Tensor, latent_size: Sequence[int], area: Area) -> Tensor:
    """A mask [..., H, W], resized to the picture's latents and cropped to an area: [..., height, width]."""
    height, width, top, left = area
    masks = mask.float().reshape(-1, 1, *mask.shape[-2:])
    masks = F.interpolate(masks, tuple(latent_size), mode="area")[..., top : top + height, left : left + width]
    return masks.reshape(*mask.shape[:-2], *masks.shape[-2:])
