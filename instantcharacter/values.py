"""Values from users: numbers and choices, checked, and any value in a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LONGEST = 60
"""Most letters of a value in a message."""


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python's or numpy's, and no truth value; it may be NaN."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ``ValueError`` unless a value is a number of these bounds; NaN, texts and truth values are none."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; expected a finite number from {low:.12g} to {high:.12g}")


def check_count(name: str, value: Any, low: int, high: int) -> None:
    """Raise ``ValueError`` unless a value is a whole number from ``low`` to ``high``."""
    if not is_number(value) or isinstance(value, (float, np.floating)) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number from {low} to {high}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless a value is one of some texts."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")


def shown(value: Any) -> str:
    """A value in a message: short, and in letters that can be printed; of tensors, lists and other objects the type."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, bytes, int, float)):
        text = ascii(value)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a {type(value).__name__} {[*value.shape]} in {value.dtype}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else "")
