"""A character: the fused features of its reference pictures, independent of the encoders and the adapter."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import atomic_write, check_replaceable
from ..files.reading import read_header, read_safetensors
from ..values import check_number, shown
from .tensors import check_tensor

EXPECTED = "a character file, from Character.save or `python -m instantcharacter encode`"
FORMAT = "instantcharacter.character"
LARGEST_FEATURE = 1e9
"""Greatest magnitude of fused features; the squares of much larger ones are infinite in float32."""
COVER = "ssmd_cover_images"
"""The metadata that ComfyUI's model library shows a picture from: a JSON list of files in base64."""


class Character:
    """One character, for the adapter that made it.

    Attributes:
        fused: [1, M, feature_dim], the fused features, about 8 MB in bfloat16; M is 1458 for each reference picture.
        fingerprint: identifies the projector that made it, see :meth:`CharacterAdapter.fingerprint`.
        thumbnail: a small picture, or None.

    Raises:
        ValueError: features of another shape, or that are not finite or above :data:`LARGEST_FEATURE`.
    """

    def __init__(self, fused: Tensor, fingerprint: str, thumbnail: Image.Image | None = None) -> None:
        _check_features(fused)
        self.fused = fused
        self.fingerprint = fingerprint
        self.thumbnail = thumbnail

    def check_made_by(self, fingerprint: str | None) -> None:
        """Raise ``ValueError`` unless the adapter of this fingerprint made the character, and its features are whole.

        Fingerprints cover projectors: adapters that differ in their attention alone may share characters.
        """
        if self.fingerprint != fingerprint:
            raise ValueError(
                f"this character was made by adapter {self.fingerprint}, the one to draw it is {fingerprint}. "
                "Make it again from its picture, or use the adapter that made it."
            )
        _check_features(self.fused)

    def is_same(self, other: Character) -> bool:
        """Whether two characters generate the same pictures."""
        return self.fingerprint == other.fingerprint and torch.equal(self.fused.cpu(), other.fused.cpu())

    def mix(self, other: Character, weight: float) -> Character:
        """A character between two: the weighted mean of their features, and of their thumbnails.

        On the toy the change is steepest around 0.5, see ``benchmarks/RESULTS.md``.

        Args:
            other: of the same adapter, and of as many reference pictures.
            weight: of ``other``, from 0, this character, to 1.

        Raises:
            ValueError: the characters are of different adapters or numbers of pictures, or the weight is out of range.
        """
        if not isinstance(other, Character):
            raise ValueError(f"a character is mixed with {shown(other)}; expected another character")
        check_number("the weight of the second character", weight, 0, 1)
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                f"the characters were made by different adapters, {self.fingerprint} and {other.fingerprint}, and "
                "cannot be mixed: make one of them again with the other's adapter"
            )
        if self.fused.shape != other.fused.shape:
            raise ValueError(
                f"the characters have {self.fused.shape[1]} and {other.fused.shape[1]} feature tokens, and cannot be "
                "mixed: make both of as many reference pictures"
            )
        fused = torch.lerp(self.fused, other.fused.to(self.fused), weight)
        return Character(fused, self.fingerprint, _mixed_thumbnail(self.thumbnail, other.thumbnail, weight))

    def save(self, path: str | Path) -> None:
        """Write the character to a ``.safetensors`` file, whole or not at all. Only a character file is replaced.

        Raises:
            FileExistsError: the file exists and is of another kind.
            OSError: the disk is full or read-only.
        """
        check_replaceable(path, "a character", is_character)
        with atomic_write(path) as partial:
            save_file(self._tensors(), partial, self._metadata())

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

    def _metadata(self) -> dict[str, str]:
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint}
        if self.thumbnail is not None:
            self.thumbnail.convert("RGB").save(cover := BytesIO(), "JPEG", quality=90)
            metadata[COVER] = json.dumps([base64.b64encode(cover.getvalue()).decode()])
        return metadata

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"fused": self.fused.cpu().contiguous()}
        if self.thumbnail is not None:
            tensors["thumbnail"] = torch.from_numpy(np.asarray(self.thumbnail).copy())
        return tensors


def _check_features(fused: Tensor) -> None:
    check_tensor("a character's features", fused, (1, None, None), largest=LARGEST_FEATURE)


def _mixed_thumbnail(one: Image.Image | None, other: Image.Image | None, weight: float) -> Image.Image | None:
    """Two thumbnails, blended in the first one's size; the one there is, if there is one."""
    if one is None or other is None or not all((*one.size, *other.size)):
        return one or other
    one, other = one.convert("RGB"), other.convert("RGB")
    return Image.blend(one, other if other.size == one.size else other.resize(one.size), weight)


class Summary(NamedTuple):
    """What the header of a character's file says: the adapter that made it, and whether it has a thumbnail."""

    fingerprint: str
    has_thumbnail: bool


def summary(path: str | Path) -> Summary | None:
    """The summary of a character's file, read without its tensors; None if it is another file.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    try:
        names, metadata = read_header(path, EXPECTED)
    except ValueError:
        return None
    if metadata.get("format") != FORMAT or "fingerprint" not in metadata:
        return None
    return Summary(metadata["fingerprint"], "thumbnail" in names)


def is_character(path: str | Path) -> bool:
    """Whether a file is a character, by its header."""
    return summary(path) is not None
