"""Checks of single arguments that several modules share."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

MOST_FLOAT32 = float(np.finfo(np.float32).max)  # the largest number


def is_array(value: object) -> bool:
    """Return whether `value` has axes, and is none of NumPy's numbers."""
    # A number that torch.compile takes for a variable cannot be asked for an attribute.
    return not isinstance(value, int | float | np.generic) and hasattr(value, "ndim")


def index(name: str, value: object, wanted: str = "an int") -> int:
    """Return `value` as an int, or refuse it by name. Booleans are no ints here."""
    if type(value) is int:  # also a number that torch.compile takes for a variable
        return value
    if isinstance(value, bool) or is_array(value) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    return operator.index(value)


def count(name: str, value: object, at_least: int = 0) -> int:
    """Return `value` as an int of `at_least` or more, or refuse it by name."""
    number = index(name, value)
    if number < at_least:
        raise ValueError(f"{name} must be {at_least} or more, got {number}")
    return number


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return the choice that a value is equal to, which may be of an enumeration of strings."""
    wanted = " or ".join(map(repr, choices))
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {wanted}, got {described(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return choices[choices.index(value)]


def check_number(name: str, value: object) -> None:
    """Refuse what is no int or float, of Python or NumPy. Booleans are no numbers here."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {described(value)}")


def positive(name: str, value: Any, above: int = 0) -> float:
    """Return `value` as a finite float that is more than `above`, or refuse it by name."""
    check_number(name, value)
    number = as_float(value)
    if not (number > above and math.isfinite(number)):
        wanted = f"more than {above}" if above else "positive"
        raise ValueError(f"{name} must be {wanted} and finite, got {value}")
    return number


def as_float(value: Any) -> float:
    """Return a real number as a float, infinity where it is too great to be one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def described(value: object) -> str:
    """Return what a message calls a value: a number or a string itself, anything else its type."""
    if isinstance(value, str | bool | int | float | complex):
        return repr(value)
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
