"""A character: the fused features of its reference pictures, independent of the encoders and the adapter."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files.atomic import check_replaceable
from ..files.errors import quoted
from ..files.reading import LARGEST_WEIGHT, read_header, read_whole, unexpected
from ..files.writing import write_safetensors
from ..values import check_number, shown
from .tensors import check_tensor

EXPECTED = "a character file, from Character.save or `python -m instantcharacter encode`"
FORMAT = "instantcharacter.character"
LARGEST_FILE = 256 << 20
"""Bytes of a character's file at most: of 20 reference pictures, in float32."""
LARGEST_THUMBNAIL = 4096
"""Pixels of a side."""
COVER = "ssmd_cover_images"
"""The metadata that ComfyUI's model library shows a picture from: a JSON list of files in base64."""


class Character:
    """One character, for the adapter that made it.

    Attributes:
        fused: [1, M, feature_dim], the fused features, about 8 MB in bfloat16; M is 1458 for each reference picture.
        fingerprint: identifies the projector that made it, see :meth:`CharacterAdapter.fingerprint`.
        thumbnail: a small picture, or None.

    Raises:
        ValueError: features of another shape, or that are not finite or above :data:`LARGEST_WEIGHT`.
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
        write_safetensors(path, self._tensors(), self._metadata())

    @classmethod
    def load(cls, path: str | Path) -> Character:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is empty, cut off, or of another kind; or its features are not finite.
        """
        names, metadata = read_header(path, EXPECTED)
        if not _is_character(metadata) or "fused" not in names:
            raise unexpected(path, f"is not a character ({quoted(sorted(names)[:3])} in it)", EXPECTED)
        if (length := Path(path).stat().st_size) > LARGEST_FILE:
            raise unexpected(path, f"has {length} bytes, more than {LARGEST_FILE}", EXPECTED)
        tensors = read_whole(path, EXPECTED)
        try:
            return cls(tensors["fused"], metadata["fingerprint"], _picture(tensors.get("thumbnail")))
        except ValueError as error:
            raise unexpected(path, f"is damaged: {error}", EXPECTED) from error

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


def _picture(tensor: Tensor | None) -> Image.Image | None:
    """A thumbnail from its tensor, [H, W] or [H, W, 2 to 4] in uint8; None for what is no picture, or a huge one."""
    if tensor is None or tensor.dtype != torch.uint8 or tensor.ndim not in (2, 3) or not tensor.numel():
        return None
    if max(tensor.shape[:2]) > LARGEST_THUMBNAIL or (tensor.ndim == 3 and tensor.shape[2] not in (2, 3, 4)):
        return None
    return Image.fromarray(tensor.numpy())


def _is_character(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata is a character's."""
    return metadata.get("format") == FORMAT and is_fingerprint(metadata.get("fingerprint"))


def is_fingerprint(text: str | None) -> bool:
    """Whether a text from a file may be a fingerprint; other texts would end up in messages."""
    return text is not None and len(text) <= 64 and text.isprintable()


def _check_features(fused: Tensor) -> None:
    if isinstance(fused, Tensor) and fused.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        fused = fused.float()  # torch compares none in 8 bits
    check_tensor("a character's features", fused, (1, None, None), largest=LARGEST_WEIGHT)


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
    if not _is_character(metadata):
        return None
    return Summary(metadata["fingerprint"], "thumbnail" in names)


def is_character(path: str | Path) -> bool:
    """Whether a file is a character, by its header."""
    return summary(path) is not None
