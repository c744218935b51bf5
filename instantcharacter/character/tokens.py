"""A character's tokens at the timesteps of a schedule, cached between runs."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..model.character import Character
from ..model.projector import CharacterProjector
from ..offload.streaming import on_device

BATCH = 7
"""Timesteps in one call of the resampler: enough to fill a GPU, in 0.3 GB of activations at the released sizes."""

Schedule = tuple[tuple[float, ...], torch.device, torch.dtype]


class TokenCache:
    """Folded tokens of characters, see :mod:`~instantcharacter.model.folding`.

    Of each character it keeps the tokens of the last schedule: 74 MB for 28 steps at the released sizes. It holds
    characters weakly: a character's tokens go with the character. Tokens of another schedule are not used again for the
    timesteps that both have: their last bits depend on the timesteps beside them, and a picture would depend on the
    ones before it.

    Args:
        projector: of the adapter that made the characters. After a change of its weights, make a new cache.
    """

    def __init__(self, projector: CharacterProjector) -> None:
        self._projector = projector
        self._cached: WeakKeyDictionary[Character, tuple[Schedule, dict[float, Tensor]]] = WeakKeyDictionary()

    def tokens(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """A character's tokens at each timestep, computed unless its last schedule was the same.

        Args:
            character: of this projector.
            timesteps: in [0, 1000].
            device: of the tokens; the resampler is moved there while it computes.
            dtype: of the tokens.

        Returns:
            [1, num_tokens, resampler_dim + 8] for each timestep.
        """
        if not self.has(character, timesteps, device, dtype):
            each = list(dict.fromkeys(timesteps))
            tokens = dict(zip(each, self.resample(character, each, device, dtype), strict=True))
            self._cached[character] = (tuple(timesteps), device, dtype), tokens
        _, cached = self._cached[character]
        return [cached[timestep] for timestep in timesteps]

    def has(self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether :meth:`tokens` would not run the resampler."""
        schedule, _ = self._cached.get(character, (None, None))
        return schedule == (tuple(timesteps), device, dtype)

    @torch.no_grad()
    def resample(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """Tokens as :meth:`tokens` returns them, computed and not cached."""
        tokens: list[Tensor] = []
        with on_device(self._projector.resampler, device) as resampler:
            fused = character.fused.to(resampler.proj_in.weight)
            for i in range(0, len(timesteps), BATCH):
                batch = torch.tensor(timesteps[i : i + BATCH], device=device)
                resampled = self._projector.resample(fused, batch, folded=True).to(dtype)
                tokens += [each.clone() for each in resampled.split(1)]  # a view would keep the whole batch alive
        return tokens
