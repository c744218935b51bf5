"""A character's strength that changes over a sampling, and that differs between FLUX's two kinds of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from ..values import check_number

STRONGEST = 10.0
"""Greatest strength, either way; far above it FLUX's sums overflow, and the picture is black."""


@dataclass(frozen=True)
class Strength:
    """A strength for each step and kind of block, in place of one number.

    Over the sampling it runs in straight lines from ``start`` through ``middle`` to ``end``; a step has the strength of
    its beginning, so that the last one of n steps is 1/n short of the end. Early steps decide on the layout, late ones
    on details.

    Attributes:
        start: strength at the beginning; 1 is the one that the adapter was trained with.
        middle: strength half-way.
        end: strength at the end.
        double_blocks: factor in FLUX's double blocks, 19 in FLUX.1, which come first.
        single_blocks: factor in its single blocks, 38.

    Raises:
        ValueError: a value that is not a number from 0 to :data:`STRONGEST`.
    """

    start: float
    middle: float
    end: float
    double_blocks: float = 1.0
    single_blocks: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"the strength's {field.name}", getattr(self, field.name), 0, STRONGEST)

    @property
    def is_constant(self) -> bool:
        """Whether it is the same at all steps."""
        return self.start == self.middle == self.end

    def at(self, progress: float) -> tuple[float, float]:
        """The strengths in double and in single blocks at a fraction of the sampling, 0 to 1."""
        before, after, half = (self.start, self.middle, 0) if progress < 0.5 else (self.middle, self.end, 1)
        now = before + (after - before) * (2 * progress - half)
        return now * self.double_blocks, now * self.single_blocks

    def __mul__(self, factor: float) -> Strength:
        """The strength, multiplied at all steps."""
        check_number("a strength's factor", factor, 0, STRONGEST)
        return replace(self, start=self.start * factor, middle=self.middle * factor, end=self.end * factor)


Scale: TypeAlias = "float | Strength"
"""A character's strength: one number, or one that changes."""


def check_scale(name: str, scale: Any) -> None:
    """Raise ``ValueError`` unless a value is a :class:`Strength`, or a number up to :data:`STRONGEST`, or minus it."""
    if not isinstance(scale, Strength):
        check_number(name, scale, -STRONGEST, STRONGEST)


def scales_at(scale: Scale, progress: float) -> tuple[float, float]:
    """A character's strengths in double and in single blocks at a fraction of the sampling, 0 to 1."""
    return scale.at(progress) if isinstance(scale, Strength) else (scale, scale)


def by_blocks(scale: Scale, double: float, single: float) -> Strength:
    """A character's strength with other factors in double and in single blocks."""
    strength = scale if isinstance(scale, Strength) else Strength(scale, scale, scale)
    return replace(strength, double_blocks=double, single_blocks=single)


def has_effect(scale: Scale) -> bool:
    """Whether a character of this strength changes anything."""
    return any(any(scales_at(scale, progress)) for progress in (0, 0.5, 1))


def scale_setting(scale: Scale) -> float | str:
    """A strength as ``--scale`` takes it."""
    return f"{scale.start:g}:{scale.middle:g}:{scale.end:g}" if isinstance(scale, Strength) else scale


def scales_of(
    characters: int, scale: Sequence[Scale], double_blocks: Sequence[float], single_blocks: Sequence[float]
) -> list[Scale]:
    """The strength of each character, with its factors in double and in single blocks.

    Raises:
        ValueError: not one for all or one each, or a negative one with factors for kinds of blocks.
    """
    values = {"scale": scale, "scale-double": double_blocks, "scale-single": single_blocks}
    for name, some in values.items():
        if len(some) not in (1, characters):
            raise ValueError(f"{len(some)} --{name} for {characters} characters: give one for all, or one each")
    each = zip(*([*some] * characters if len(some) == 1 else some for some in values.values()))
    return [one if double == single == 1 else by_blocks(one, double, single) for one, double, single in each]
