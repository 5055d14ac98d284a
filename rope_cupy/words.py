"""Words: numbers as they lie in memory, and how NumPy widens and rounds them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .problem import FREQUENCY

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Doubles = NDArray[np.float64]

STORAGE = {
    "float16": "f2",
    "bfloat16": "u2",
    "float32": "f4",
    "float64": "f8",
    "int32": "i4",
    "int64": "i8",
    FREQUENCY: "u8",
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
}


def widen(words: Array, dtype: str) -> Doubles:
    """Return storage words as float64, exactly."""
    if dtype == "bfloat16":
        words = (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float64)


def narrow(values: Doubles, dtype: str) -> Array:
    """Round float64 to storage words, once, to nearest even."""
    if dtype != "bfloat16":
        return values.astype(STORAGE[dtype])
    bits = _round_to_odd(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def narrow_to_8_bits(values: Doubles, dtype: str) -> Array:
    """Round float64 to the words of 8 bits, to nearest even, and to the largest what is larger."""
    numbers = _numbers_of_8_bits(dtype)
    magnitude = np.minimum(np.abs(values), numbers[-1])
    below = np.searchsorted(numbers, magnitude, side="right") - 1
    below = np.minimum(below, len(numbers) - 2)
    middle = (numbers[below] + numbers[below + 1]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (below % 2 == 1))
    words = np.where(np.isnan(values), 0x7F, (below + up) | np.where(np.signbit(values), 0x80, 0))
    return words.astype(np.uint8)


@cache
def _numbers_of_8_bits(dtype: str) -> Doubles:
    """Return the numbers of 8 bits that are not negative, each at the place that its word is."""
    mantissa_bits, bias, largest = {"float8_e4m3fn": (3, 7, 0x7E), "float8_e5m2": (2, 15, 0x7B)}[
        dtype
    ]
    exponent, fraction = np.divmod(np.arange(largest + 1), 1 << mantissa_bits)
    significand = (fraction + np.where(exponent, 1 << mantissa_bits, 0)).astype(np.float64)
    numbers: Doubles = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits)
    return numbers


def _round_to_odd(values: Doubles) -> NDArray[np.float32]:
    """Round to float32, to odd where inexact: rounding again to 16 bits is then as good as once."""
    nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    widened = nearest.astype(np.float64)
    away = np.abs(widened) > np.abs(values)
    odd = (bits - away.astype(np.uint32)) | np.uint32(1)
    return (
        np.where((widened == values) | np.isnan(values), bits, odd)
        .astype(np.uint32)
        .view(np.float32)
    )
