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

Key = tuple[float, torch.device, torch.dtype]


class TokenCache:
    """Folded tokens of characters, see :mod:`~instantcharacter.model.folding`.

    Of each character it keeps the tokens of the last schedule: 74 MB for 28 steps at the released sizes. It holds
    characters weakly: a character's tokens go with the character.

    Args:
        projector: of the adapter that made the characters. After a change of its weights, make a new cache.
    """

    def __init__(self, projector: CharacterProjector) -> None:
        self._projector = projector
        self._cached: WeakKeyDictionary[Character, dict[Key, Tensor]] = WeakKeyDictionary()

    def tokens(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """A character's tokens at each timestep; only those that are not cached are computed.

        If any is computed, cached tokens of other timesteps, devices and dtypes are dropped.

        Args:
            character: of this projector.
            timesteps: in [0, 1000].
            device: of the tokens; the resampler is moved there while it computes.
            dtype: of the tokens.

        Returns:
            [1, num_tokens, resampler_dim + 8] for each timestep.
        """
        cached = self._cached.get(character, {})
        if missing := self.missing(character, timesteps, device, dtype):
            computed = dict(zip(missing, self.resample(character, missing, device, dtype), strict=True))
            cached |= {(timestep, device, dtype): tokens for timestep, tokens in computed.items()}
            self._cached[character] = {key: cached[key] for key in ((t, device, dtype) for t in timesteps)}
        return [cached[timestep, device, dtype] for timestep in timesteps]

    def missing(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[float]:
        """The timesteps for which :meth:`tokens` would run the resampler, each once."""
        cached = self._cached.get(character, {})
        return [timestep for timestep in dict.fromkeys(timesteps) if (timestep, device, dtype) not in cached]

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
