"""The encoders' features of a picture, which the projector reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CharacterFeatures:
    """Features of SigLIP and DINOv2, concatenated along channels.

    N is the number of tokens of one 384-pixel crop (729), F the width of both encoders together (2688).

    Attributes:
        low_res_shallow: [B, 3·N, F], three early layers of the whole picture.
        low_res_deep: [B, N, F], the last layer of the whole picture.
        high_res_deep: [B, 4·N, F], the last layer of its four tiles.
    """

    low_res_shallow: Tensor
    low_res_deep: Tensor
    high_res_deep: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.low_res_shallow, self.low_res_deep, self.high_res_deep))
