"""A character on a MODEL: how strongly, when and where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..model.character import Character
from ..model.conditioning import mask_to_tokens
from ..model.strength import Scale, has_effect
from .hosting import HostedAdapter


@dataclass(frozen=True, eq=False)
class CharacterConditioning:
    """One character's conditioning of a sampling.

    Attributes:
        adapter: the adapter that made the character.
        character: the character.
        scale: strength; 0 leaves the MODEL as it is, 1 is the strength of the adapter's training. One that changes does
            so over the denoising, whatever start and end are.
        start: fraction of the denoising, as ComfyUI's samplers count it, at which the character begins to act, 0 to 1.
        end: fraction at which it ceases to act, 0 to 1.
        mask: [H, W] or [B, H, W], 1 where in the picture the character may be; None for everywhere.

    Raises:
        ValueError: a character of another adapter, a start after the end, or an empty mask.
    """

    adapter: HostedAdapter
    character: Character
    scale: Scale
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        self.character.check_made_by(self.adapter.fingerprint)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start {self.start} and end {self.end}; expected 0 ≤ start ≤ end ≤ 1")
        if self.mask is not None:
            mask_to_tokens(self.mask, 1, 1)

    @property
    def has_effect(self) -> bool:
        """Whether the character changes any step."""
        return has_effect(self.scale) and self.start < self.end
