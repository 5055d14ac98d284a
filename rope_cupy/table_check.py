"""What the values of a table are, and which constructor is for them: `RotaryTable.check`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

OF_AXES = {"p": "position", "bs": "token", "bsh": "token and head"}
CLOSE = 2.0**-7  # of sums of squares: what rounding to bfloat16 leaves of 1
IN_HALVES = "every angle twice, in halves"
IN_TURN = "every angle twice, each beside its copy"
SWAPPED = "sines before cosines"


def verdict(form: str, arrays: Sequence[NDArray[Any]], axes: str) -> str:
    """Return what the arrays of a table, as its constructor was given them, are.

    `form` is the name of one of `rope_cupy.table_forms.FORMS`.
    """
    if form == "frequencies":
        return "frequencies, of which the angles of every position are computed"
    if not all(np.isfinite(array).all() for array in arrays):
        return "not a rotation: not every value is finite"
    if form == "matrices":
        said = _of_matrices(arrays[0].astype(np.float64))
    elif form in ("full_width", "elementwise"):
        said = _of_full_width(form, *(array.astype(np.float64) for array in arrays))
    else:
        said = _of_pairs(*_cos_and_sin(form, arrays))
    return said if ":" in said else f"{said}, of every {OF_AXES[axes]}"


def _cos_and_sin(form: str, arrays: Sequence[NDArray[Any]]) -> tuple[Values, Values]:
    first, last = arrays[0], arrays[-1]
    if form == "complex_numbers":
        return first.real.astype(np.float64), first.imag.astype(np.float64)
    if form == "cos_sin_cache":
        half = first.shape[-1] // 2
        first, last = first[..., :half], first[..., half:]
    return first.astype(np.float64), last.astype(np.float64)


def _of_pairs(cos: Values, sin: Values) -> str:
    in_halves, in_turn = _repeat_in_halves(cos, sin), _repeat_in_turn(cos, sin)
    if _is_swapped(cos, sin):
        return f"{SWAPPED}: use RotaryTable(cos, sin)"
    if in_halves != in_turn:
        where, more = (IN_HALVES, "") if in_halves else (IN_TURN, " with interleaved=True")
        return f"{where}: use RotaryTable.from_full_width{more}"
    return _rotation(cos, sin)


def _of_full_width(form: str, cos: Values, sin: Values) -> str:
    by_element = form == "elementwise"
    in_halves, in_turn = _repeat_in_halves(cos, sin), _repeat_in_turn(cos, sin)
    if _is_swapped(cos, sin):
        return f"{SWAPPED}: give the cosines first"
    if not (in_halves or in_turn):
        if by_element:
            return _rotation(cos, sin).replace("one angle a pair", "two angles a pair")
        return (
            "two angles a pair: use RotaryTable(cos, sin) where there is a column for each pair, "
            "else RotaryTable.from_elementwise"
        )
    rotation = _rotation(cos, sin)
    if ":" in rotation:
        return rotation
    if in_halves and in_turn:
        return "one angle for all pairs"
    where, pairing, other = (
        (IN_HALVES, "False", "True") if in_halves else (IN_TURN, "True", "False")
    )
    if by_element:
        return (
            f"{where}: two angles a pair with interleaved={other}; with interleaved={pairing} one, "
            "and RotaryTable.from_full_width reads half as much"
        )
    said = f"{where}: right with interleaved={pairing}; "
    if in_halves:
        return (
            f"{said}where the model pairs neighbours, use RotaryTable(cos[..., :n], sin[..., :n]) "
            "of n = rotary_dim / 2 columns if both have one angle (GLM), else "
            "RotaryTable.from_elementwise (V-JEPA 2)"
        )
    return f"{said}where the model pairs halves, use RotaryTable.from_elementwise (ERNIE-Image)"


def _of_matrices(matrices: Values) -> str:
    (m00, m01), (m10, m11) = np.moveaxis(matrices, (-2, -1), (0, 1))
    if np.array_equal(m00, m11) and np.array_equal(m01, -m10):
        return _rotation(m00, m10)
    if np.array_equal(m00, m11) and np.array_equal(m01, m10):
        return "not a rotation: the two sines of a matrix have one sign"
    return "a matrix a pair that is no rotation"


def _rotation(cos: Values, sin: Values) -> str:
    """Return what cosines and sines of one shape are."""
    squares = cos * cos + sin * sin
    least, most = squares.min(initial=np.inf), squares.max(initial=0.0)
    if not squares.size or (abs(most - 1) <= CLOSE and abs(least - 1) <= CLOSE):
        return "one angle a pair"
    if least > 0 and most / least <= 1 + 4 * CLOSE:
        return f"one angle a pair, times {np.sqrt(most):.4g}"
    return f"not a rotation: cos * cos + sin * sin is from {least:.3g} to {most:.3g}"


def _is_swapped(cos: Values, sin: Values) -> bool:
    """Return whether the first position, where no pair is rotated, has cosines of 0."""
    return bool(len(cos)) and not cos[0].any() and bool((sin[0] == 1).all())


def _repeat_in_halves(*parts: Values) -> bool:
    half, odd = divmod(parts[0].shape[-1], 2)
    return not odd and all(np.array_equal(x[..., :half], x[..., half:]) for x in parts)


def _repeat_in_turn(*parts: Values) -> bool:
    odd = parts[0].shape[-1] % 2
    return not odd and all(np.array_equal(x[..., ::2], x[..., 1::2]) for x in parts)
