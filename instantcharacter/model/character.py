"""A character: what a reference picture becomes, kept apart from the encoders that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..files.reading import atomic_write, check_replaceable, read_safetensors
from ..offload.streaming import on_device

if TYPE_CHECKING:
    from .projector import CharacterProjector

EXPECTED = "a character file: what Character.save or `python -m instantcharacter encode` wrote"
FORMAT = "instantcharacter.character"
RESAMPLED_AT_ONCE = 7
"""Timesteps in one pass: a GPU is busy then, and needs 0.3 GB for it at the released sizes."""


class Character:
    """One character, ready to be drawn by the adapter that made it.

    Keeps the tokens of the schedule it was last drawn with, so that drawing it again costs no projector.

    Attributes:
        fused: [1, M, feature_dim], the fused features, about 8 MB in bfloat16; M is 1458 for each picture of it.
        fingerprint: names the projector that made it, see :meth:`CharacterAdapter.fingerprint`.
        thumbnail: a small picture of it, if it has one.
    """

    def __init__(self, fused: Tensor, fingerprint: str, thumbnail: Image.Image | None = None) -> None:
        self.fused = fused
        self.fingerprint = fingerprint
        self.thumbnail = thumbnail
        self._tokens: WeakKeyDictionary[CharacterProjector, dict[tuple, Tensor]] = WeakKeyDictionary()

    @torch.no_grad()
    def tokens(
        self, projector: CharacterProjector, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """What folded character attention attends to at each timestep in [0, 1000], see :mod:`.folding`.

        Computed only where the last schedule has none; those of other timesteps are dropped, so that one schedule
        is kept: 74 MB for 28 steps at the released sizes.

        Returns:
            [1, num_tokens, resampler_dim + 8] for each timestep.
        """
        kept = self._tokens.get(projector, {})
        if missing := self.missing(projector, timesteps, device, dtype):
            resampled = self.resample(projector, missing, device, dtype)
            drawn_out = zip(missing, resampled, strict=True)  # to its end: only so does it let the resampler go
            kept.update(((timestep, device, dtype), tokens) for timestep, tokens in drawn_out)
            self._tokens[projector] = {key: kept[key] for key in ((t, device, dtype) for t in timesteps)}
        return [kept[timestep, device, dtype] for timestep in timesteps]

    def missing(
        self, projector: CharacterProjector, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[float]:
        """The timesteps for which :meth:`tokens` would need the resampler."""
        kept = self._tokens.get(projector, {})
        return [timestep for timestep in timesteps if (timestep, device, dtype) not in kept]

    @torch.no_grad()
    def resample(
        self, projector: CharacterProjector, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """As :meth:`tokens`, computed anew and not kept; the resampler is on the device only meanwhile."""
        with on_device(projector.resampler, device) as resampler:
            fused = self.fused.to(resampler.proj_in.weight)
            for i in range(0, len(timesteps), RESAMPLED_AT_ONCE):
                at = torch.tensor(timesteps[i : i + RESAMPLED_AT_ONCE], device=device)
                together = projector.resample(fused, at, folded=True).to(dtype)
                yield from (tokens.clone() for tokens in together.split(1))

    def check_made_by(self, fingerprint: str | None) -> None:
        """Raise ``ValueError`` unless the adapter of this fingerprint made the character."""
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"this character was made by adapter {self.fingerprint}, the one to draw it is {fingerprint}. "
                "Make it again from its picture, or use the adapter that made it."
            )

    def is_same(self, other: Character) -> bool:
        """Whether two characters draw the same."""
        return self.fingerprint == other.fingerprint and torch.equal(self.fused.cpu(), other.fused.cpu())

    def save(self, path: str | Path) -> None:
        """Write the character to a ``.safetensors`` file, whole or not at all; it replaces nothing but a character.

        Raises:
            FileExistsError: another kind of file has that name.
            OSError: the disk is full or cannot be written.
        """
        check_replaceable(path, "a character", is_character)
        with atomic_write(path) as partial:
            save_file(self._tensors(), partial, {"format": FORMAT, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> Character:
        """Read a character that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is empty, cut off, or holds something else.
        """
        tensors, metadata = read_safetensors(path, EXPECTED)
        if metadata.get("format") != FORMAT or "fused" not in tensors or "fingerprint" not in metadata:
            raise ValueError(f"{path} is not a character ({sorted(tensors)[:3]} in it). Expected {EXPECTED}.")
        thumbnail = Image.fromarray(tensors["thumbnail"].numpy()) if "thumbnail" in tensors else None
        return cls(tensors["fused"], metadata["fingerprint"], thumbnail)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"fused": self.fused.cpu().contiguous()}
        if self.thumbnail is not None:
            tensors["thumbnail"] = torch.from_numpy(np.asarray(self.thumbnail).copy())
        return tensors


def is_character(path: str | Path) -> bool:
    """Whether a file's header says that it is a character."""
    try:
        _, metadata = read_safetensors(path, EXPECTED)
    except ValueError:
        return False
    return metadata.get("format") == FORMAT
