"""Checks of single arguments that several modules share."""

from __future__ import annotations

import operator

import numpy as np


def index(name: str, value: object) -> int:
    """Return `value` as an int, or refuse it by name. Booleans are no ints here."""
    is_array = hasattr(value, "ndim") and not isinstance(value, np.generic)
    if isinstance(value, bool) or is_array or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(value)


def described(value: object) -> str:
    """Return what a message calls a value that is no array: its type, and a tuple's length."""
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
