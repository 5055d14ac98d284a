"""Checks of single arguments that several modules share."""

from __future__ import annotations

import operator

import numpy as np


def index(name: str, value: object, wanted: str = "an int") -> int:
    """Return `value` as an int, or refuse it by name. Booleans are no ints here."""
    is_array = hasattr(value, "ndim") and not isinstance(value, np.generic)
    if isinstance(value, bool) or is_array or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    return operator.index(value)


def described(value: object) -> str:
    """Return what a message calls a value: a number or a string itself, anything else its type."""
    if isinstance(value, str | bool | int | float | complex):
        return repr(value)
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
