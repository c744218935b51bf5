"""A character's tokens at the timesteps of a schedule, cached between runs."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..files.reading import check_finite
from ..model.character import Character
from ..model.projector import CharacterProjector
from ..offload.streaming import on_device

BATCH = 7
"""Timesteps in one call of the resampler: enough to fill a GPU, in 0.3 GB of activations at the released sizes."""

Schedule = tuple[tuple[float, ...], torch.device, torch.dtype]
"""Timesteps, each once, and the device and the dtype of the tokens."""


class TokenCache:
    """Folded tokens of characters, see :mod:`~instantcharacter.model.folding`.

    Of each character it keeps the tokens of the last schedule: 74 MB for 28 steps at the released sizes. A schedule is
    resampled as a whole: rounding differs with the batch, so that tokens taken over from another schedule would let a
    picture depend on the one before. It holds characters weakly: a character's tokens go with the character.

    Args:
        projector: of the adapter that made the characters. After a change of its weights, make a new cache.
    """

    def __init__(self, projector: CharacterProjector) -> None:
        self._projector = projector
        self._cached: WeakKeyDictionary[Character, tuple[Schedule, dict[float, Tensor]]] = WeakKeyDictionary()

    def tokens(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """A character's tokens at each timestep; they are computed unless those of this schedule are cached.

        Args:
            character: of this projector.
            timesteps: in [0, 1000].
            device: of the tokens; the resampler is moved there while it computes.
            dtype: of the tokens.

        Returns:
            [1, num_tokens, resampler_dim + 8] for each timestep.
        """
        if not self.has(character, timesteps, device, dtype):
            schedule = _schedule(timesteps, device, dtype)
            tokens = self.resample(character, *schedule)
            self._cached[character] = schedule, dict(zip(schedule[0], tokens, strict=True))
        by_timestep = self._cached[character][1] if timesteps else {}
        return [by_timestep[timestep] for timestep in timesteps]

    def has(self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether :meth:`tokens` would not run the resampler."""
        schedule, _ = self._cached.get(character, (None, {}))
        return not timesteps or schedule == _schedule(timesteps, device, dtype)

    @torch.no_grad()
    def resample(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """Tokens as :meth:`tokens` returns them, computed and not cached.

        Raises:
            ValueError: weights that make no finite tokens.
        """
        tokens: list[Tensor] = []
        with on_device(self._projector.resampler, device) as resampler:
            fused = character.fused.to(resampler.proj_in.weight)
            for i in range(0, len(timesteps), BATCH):
                batch = torch.tensor(timesteps[i : i + BATCH], device=device)
                resampled = self._projector.resample(fused, batch, folded=True).to(dtype)
                check_finite(
                    resampled, "the character has tokens", "a file of weights is damaged: fetch the adapter again"
                )
                tokens += [each.clone() for each in resampled.split(1)]  # a view would keep the whole batch alive
        return tokens


def _schedule(timesteps: Sequence[float], device: torch.device, dtype: torch.dtype) -> Schedule:
    return tuple(dict.fromkeys(timesteps)), device, dtype
