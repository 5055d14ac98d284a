"""Inverse frequencies: how far each pair turns from one position to the next. NumPy, float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import index


def inverse_frequencies(rotary_dim: int, base: float = 10000.0) -> NDArray[np.float64]:
    """Return base ** (-2 i / rotary_dim) of each pair i, in radians per position.

    The result is float64, of shape (rotary_dim / 2,).

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021),
    section 3.2.2.

    Raises TypeError or ValueError when `rotary_dim` is not a positive even int or `base` is not a
    positive number.

    >>> inverse_frequencies(4, base=100.0)
    array([1. , 0.1])
    """
    rotary_dim = index("rotary_dim", rotary_dim)
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be positive and even, got {rotary_dim}")
    if isinstance(base, bool) or not isinstance(base, int | float | np.integer | np.floating):
        raise TypeError(f"base must be a number, got {base!r}")
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"base must be positive and finite, got {base}")
    return np.power(float(base), -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def cos_sin(
    inv_freq: NDArray[Any], num_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return cos and sin of position * inv_freq, computed in float64, stored as float32.

    Both have the shape (num_positions, rotary_dim / 2).
    """
    angles = np.outer(np.arange(num_positions, dtype=np.float64), inv_freq)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
