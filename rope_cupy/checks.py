"""Checks of single arguments that several modules share."""

from __future__ import annotations

import operator


def index(name: str, value: object) -> int:
    """Return `value` as an int, or refuse it by name. Booleans are no ints here."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(value)
