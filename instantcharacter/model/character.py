"""A character: the fused features of its reference pictures, independent of the encoders and the adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import atomic_write, check_replaceable
from ..files.reading import read_safetensors

EXPECTED = "a character file, from Character.save or `python -m instantcharacter encode`"
FORMAT = "instantcharacter.character"


class Character:
    """One character, for the adapter that made it.

    Attributes:
        fused: [1, M, feature_dim], the fused features, about 8 MB in bfloat16; M is 1458 for each reference picture.
        fingerprint: identifies the projector that made it, see :meth:`CharacterAdapter.fingerprint`.
        thumbnail: a small picture, or None.
    """

    def __init__(self, fused: Tensor, fingerprint: str, thumbnail: Image.Image | None = None) -> None:
        self.fused = fused
        self.fingerprint = fingerprint
        self.thumbnail = thumbnail

    def check_made_by(self, fingerprint: str | None) -> None:
        """Raise ``ValueError`` unless the adapter of this fingerprint made the character.

        Fingerprints cover projectors: adapters that differ in their attention alone may share characters.
        """
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"this character was made by adapter {self.fingerprint}, the one to draw it is {fingerprint}. "
                "Make it again from its picture, or use the adapter that made it."
            )

    def is_same(self, other: Character) -> bool:
        """Whether two characters generate the same pictures."""
        return self.fingerprint == other.fingerprint and torch.equal(self.fused.cpu(), other.fused.cpu())

    def save(self, path: str | Path) -> None:
        """Write the character to a ``.safetensors`` file, whole or not at all. Only a character file is replaced.

        Raises:
            FileExistsError: the file exists and is of another kind.
            OSError: the disk is full or read-only.
        """
        check_replaceable(path, "a character", is_character)
        with atomic_write(path) as partial:
            save_file(self._tensors(), partial, {"format": FORMAT, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> Character:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is empty, cut off, or of another kind.
        """
        tensors, metadata = read_safetensors(path, EXPECTED)
        if metadata.get("format") != FORMAT or "fused" not in tensors or "fingerprint" not in metadata:
            raise ValueError(f"{path} is not a character ({sorted(tensors)[:3]} in it). Expected {EXPECTED}.")
        fused = tensors["fused"]
        if fused.ndim != 3 or len(fused) != 1 or not fused.is_floating_point():
            raise ValueError(
                f"{path} has fused features {list(fused.shape)} in {fused.dtype}; expected [1, tokens, width] in float"
            )
        thumbnail = Image.fromarray(tensors["thumbnail"].numpy()) if "thumbnail" in tensors else None
        return cls(fused, metadata["fingerprint"], thumbnail)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"fused": self.fused.cpu().contiguous()}
        if self.thumbnail is not None:
            tensors["thumbnail"] = torch.from_numpy(np.asarray(self.thumbnail).copy())
        return tensors


def is_character(path: str | Path) -> bool:
    """Whether a file is a character, by its metadata."""
    try:
        _, metadata = read_safetensors(path, EXPECTED)
    except ValueError:
        return False
    return metadata.get("format") == FORMAT
