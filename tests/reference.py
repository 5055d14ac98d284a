"""Rotary position embedding by its definition, in float64, and what "right" means for a result.

`rotate` rotates each pair of a head by the angle of its token's position: the vector (a, b) becomes
(a cos - b sin, b cos + a sin). `encode` rounds float64 numbers once, to nearest even, to the bits
of a narrower format, by integer arithmetic alone; `to_float64` brings any library's array back
exactly; `check` holds a result against the exact one. Nothing here knows the library under test.

Arrays are (batch, tokens, heads, head_dim); `canonical` and `arranged` lead there and back.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np


class Format(NamedTuple):
    """An IEEE 754 binary format: the widths of its two fields and the relative error allowed."""

    exponent_bits: int
    mantissa_bits: int
    bits: type[np.unsignedinteger]
    tolerance: float | None  # None: held element by element against the exact result rounded once


FORMATS = {
    "float16": Format(5, 10, np.uint16, None),
    "bfloat16": Format(8, 7, np.uint16, None),
    "float32": Format(8, 23, np.uint32, 2e-7),
    "float64": Format(11, 52, np.uint64, 1e-15),
}

# A result of a 16-bit format may differ from the exact one, rounded once, in one element of a
# thousand (by one unit in the last place); in a small array in three, for chance is coarse there.
UNEQUAL_SHARE, UNEQUAL_FEW = 1e-3, 3


class Error(NamedTuple):
    """How far a result is from the exact one."""

    relative: float  # norm of the difference over norm of the exact result
    unequal: int  # elements that are not the exact result rounded once
    worst_ulp: int  # units in the last place of the worst element
    size: int


def rotate(
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    second: tuple[np.ndarray, np.ndarray] | None = None,
    interleaved: bool = False,
    positions: int | np.ndarray | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out_of_range: str = "nan",
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
) -> np.ndarray:
    """Rotate x (batch, tokens, heads, head_dim) by half-width tables of cosines and sines.

    cos, sin: (positions, pairs), looked up by `positions`: None counts the tokens from 0, an int
    from there, an array (tokens,) or (batch, tokens) names each token's row; with mrope_section one
    for each of three axes, (3, tokens) or (3, batch, tokens). Or a row for each token: (batch,
    tokens, pairs) or (batch, tokens, heads, pairs), where batch and tokens may be 1, and each head
    may stand for several neighbouring ones.

    second: the cosines and sines of the second elements, where they have angles of their own. The
    conjugate is the transpose then.
    """
    tables = (cos, sin, *(second or (cos, sin)))
    batch, tokens, heads, _ = x.shape
    pairs = cos.shape[-1]
    if mrope_section is not None:
        axes = np.broadcast_to(
            positions if positions.ndim == 3 else positions[:, None], (3, batch, tokens)
        )
        inside = ((axes >= 0) & (axes < len(cos))).all(0)
        rows = np.where(inside, axes, 0)[axes_of_pairs(mrope_section, mrope_interleaved)]
        tables = [
            np.stack([table[row, pair] for pair, row in enumerate(rows)], -1) for table in tables
        ]
    elif cos.ndim == 2:
        if positions is None or isinstance(positions, int):
            positions = np.arange(tokens) + (positions or 0)
        row = np.broadcast_to(positions, (batch, tokens))
        inside = (row >= 0) & (row < len(cos))
        tables = [table[np.where(inside, row, 0)] for table in tables]
    else:
        inside = np.ones((batch, tokens), bool)
    tables = [table[:, :, None] if table.ndim == 3 else table for table in tables]
    tables = [table.repeat(heads // table.shape[2], axis=2) for table in tables]
    shape = batch, tokens, heads, pairs
    cos_a, sin_a, cos_b, sin_b = (np.broadcast_to(table, shape) for table in tables)
    if conjugate:
        sin_a, sin_b = -sin_b, -sin_a

    if interleaved:
        first, step = rotary_offset + 2 * np.arange(pairs), 1
    else:
        first, step = rotary_offset + np.arange(pairs), pairs
    a, b = x[..., first], x[..., first + step]
    inside = inside[:, :, None, None]
    lost = {"nan": (np.nan, np.nan), "keep": (a, b)}[out_of_range]
    y = x.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        y[..., first] = np.where(inside, a * cos_a - b * sin_a, lost[0])
        y[..., first + step] = np.where(inside, b * cos_b + a * sin_b, lost[1])
    return y


def normalised(
    x: np.ndarray, weight: np.ndarray | None, eps: float, offset: float, *, of_token: bool
) -> np.ndarray:
    """RMSNorm of every head of x (batch, tokens, heads, head_dim), or of all heads of a token."""
    with np.errstate(all="ignore"):
        mean = np.mean(x * x, axis=(2, 3) if of_token else 3, keepdims=True)
        y = x / np.sqrt(mean + eps)
        return y if weight is None else y * (weight.reshape(-1, x.shape[3]) + offset)


def layer_normalised(x: np.ndarray, eps: float) -> np.ndarray:
    """LayerNorm of every head of x (batch, tokens, heads, head_dim), without weights and biases."""
    with np.errstate(all="ignore"):
        rest = x - np.mean(x, axis=3, keepdims=True)
        return rest / np.sqrt(np.mean(rest * rest, axis=3, keepdims=True) + eps)


def rotate_eagerly(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, dtypes: tuple[str, str], **options: Any
) -> np.ndarray:
    """Rotate as `rotate`, but round each product and each sum as PyTorch's operations do.

    They are rounded to the dtype of x and of the table, if those are one, else to float32, or to
    float64 where one of them is that.
    """
    dtype, table_dtype = dtypes
    wide = "float64" if "float64" in dtypes else "float32"
    product = dtype if dtype == table_dtype else wide

    def each(values: np.ndarray) -> np.ndarray:
        return rounded(rounded(values, wide), product)  # products of 16 bits are exact in float32

    second_cos, second_sin = options.pop("second", None) or (cos, sin)
    by_cos = each(rotate(x, cos, 0 * sin, second=(second_cos, 0 * sin), **options))
    by_sin = each(rotate(x, 0 * cos, sin, second=(0 * cos, second_sin), **options))
    with np.errstate(over="ignore", invalid="ignore"):  # of what is not rotated
        y = each(by_cos + by_sin)
    return rounded(y, "float32") if FORMATS[dtype].mantissa_bits < 23 else y


def axes_of_pairs(section: tuple[int, int, int], interleaved: bool) -> list[int]:
    """The axis whose position rotates each pair: in sections, or every third pair of an axis."""
    if not interleaved:
        return [axis for axis, size in enumerate(section) for _ in range(size)]
    axes = [0] * sum(section)
    for axis in (1, 2):
        for step in range(section[axis]):
            if 3 * step + axis < len(axes):
                axes[3 * step + axis] = axis
    return axes


def sequence_places(cu_seqlens: list[int], offsets: list[int], tokens: int) -> np.ndarray:
    """The place of each token in the sequence that holds it, plus its offset; -1 in none."""
    places = np.full(tokens, -1, np.int64)
    for begin, end, offset in zip(cu_seqlens[:-1], cu_seqlens[1:], offsets, strict=True):
        for token in range(max(begin, 0), min(end, tokens)):
            places[token] = row_number(token - begin + offset)
    return places


def row_number(position: int) -> int:
    """A position as a row, -1 where 64 bits do not hold it: it is of no table then."""
    return position if 0 <= position < 2**63 else -1


def pair_norms(x: np.ndarray, interleaved: bool) -> np.ndarray:
    """The norm of the pair that each element of (..., rotary_dim) belongs to."""
    num_pairs = x.shape[-1] // 2
    pairs = (num_pairs, 2) if interleaved else (2, num_pairs)
    norms = np.linalg.norm(x.reshape(*x.shape[:-1], *pairs), axis=-1 if interleaved else -2)
    return np.repeat(norms, 2, -1) if interleaved else np.tile(norms, 2)


PI = 0x3243F6A8885A308D313198A2E03707344A4093822299F31D0082EFA98EC4E6C89  # units of 2^-256


def cos_sin_at(positions: np.ndarray, inv_freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of positions times inv_freq (float64), reduced to a turn by integers."""
    ratios = [frequency.as_integer_ratio() for frequency in inv_freq.tolist()]
    angles = [
        [(position * over << 256) // under % (2 * PI) / 2**256 for over, under in ratios]
        for position in positions.tolist()
    ]
    reduced = np.array(angles, np.float64).reshape(len(positions), len(ratios))
    return np.cos(reduced), np.sin(reduced)


def canonical(x: np.ndarray, layout: str, head_dim: int | None = None) -> np.ndarray:
    """An array of any layout as (batch, tokens, heads, head_dim); head_dim splits its last axis."""
    if head_dim is not None:
        x = x.reshape(*x.shape[:-1], -1, head_dim)
    layout = layout.replace("t", "s")
    if "b" not in layout:
        layout, x = "b" + layout, x[None]
    return x.transpose([layout.index(axis) for axis in "bshd"])


def arranged(x: np.ndarray, layout: str, *, flat: bool = False) -> np.ndarray:
    """The inverse of `canonical`; flat joins the last two axes."""
    layout = layout.replace("t", "s")
    x = x.transpose(["bshd".index(axis) for axis in ("" if "b" in layout else "b") + layout])
    x = x if "b" in layout else x[0]
    return x.reshape(*x.shape[:-2], -1) if flat else x


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 values once, to nearest even, and return the format's bits."""
    exponent_bits, mantissa_bits, bits_type, _ = FORMATS[dtype]
    bits = np.ascontiguousarray(values, np.float64).view(np.int64)
    if dtype == "float64":
        return bits.view(np.uint64)
    magnitude = bits & 0x7FFF_FFFF_FFFF_FFFF
    exponent, fraction = magnitude >> 52, magnitude & (1 << 52) - 1
    infinity = ((1 << exponent_bits) - 1) << mantissa_bits

    # Normal: exponent and fraction are one integer, where a carry runs from one into the other.
    # Subnormal: the significand with its leading one loses a bit more for each power of two below.
    shifted = exponent - 1023 + (1 << exponent_bits - 1) - 1
    normal = shifted >= 1
    significand = np.where(normal, shifted << 52, 1 << 52) | fraction
    drop = np.minimum(52 - mantissa_bits + np.where(normal, 0, 1 - shifted), 62)
    code = significand >> drop
    rest = significand - (code << drop)
    half = np.int64(1) << drop - 1
    code += (rest > half) | ((rest == half) & (code & 1 == 1))
    code = np.minimum(code, infinity)
    code = np.where(np.isnan(values), infinity | 1 << mantissa_bits - 1, code).astype(np.uint64)
    sign = (bits < 0).astype(np.uint64) << np.uint64(exponent_bits + mantissa_bits)
    return (code | sign).astype(bits_type)


def decode(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The exact float64 values of a format's bits."""
    exponent_bits, mantissa_bits, bits_type, _ = FORMATS[dtype]
    if dtype == "float64":
        return np.ascontiguousarray(bits, np.uint64).view(np.float64)
    code = np.asarray(bits, bits_type).astype(np.int64)
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    significand = np.where(exponent > 0, 1 << mantissa_bits, 0) | fraction
    value = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    special = np.where(fraction == 0, np.inf, np.nan)
    value = np.where(exponent == (1 << exponent_bits) - 1, special, value)
    return np.where(code >> exponent_bits + mantissa_bits == 1, -value, value)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of float64 values in a narrower format."""
    return decode(encode(values, dtype), dtype)


def dtype_name(array: Any) -> str:
    """The name of an array's dtype, whoever's it is."""
    return str(getattr(array, "array", array).dtype).removeprefix("torch.")


def to_bits(array: Any) -> np.ndarray:
    """What any library's array holds, bit by bit, as NumPy's unsigned integers."""
    array = getattr(array, "array", array)
    bits = np.dtype(f"u{array.dtype.itemsize}")
    if hasattr(array, "cpu"):  # torch, where few operations know unsigned integers
        signed = np.dtype(f"i{bits.itemsize}")
        array = array.detach().view(getattr(importlib.import_module("torch"), signed.name))
        return array.cpu().contiguous().numpy().view(bits)
    if hasattr(array, "get"):  # CuPy
        return array.view(bits).get()
    return np.array(array).view(bits)


def to_float64(array: Any) -> np.ndarray:
    """The exact values of any library's array of numbers."""
    return decode(to_bits(array), dtype_name(array))


def ulp_distance(actual: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """How many steps of the format lie between two float64 arrays, each rounded to it first.

    Two zeros and two NaNs are 0 apart, a NaN and a number as far as can be.
    """
    ranks = []
    for values in (actual, exact):
        code = encode(values, dtype).astype(np.int64)
        sign = np.int64(-1) << FORMATS[dtype].exponent_bits + FORMATS[dtype].mantissa_bits
        ranks.append(np.where(code & sign, -(code & ~sign), code))
    a, b = ranks
    farthest = np.iinfo(np.int64).max
    distance = np.where(a > b, a - b, b - a).view(np.uint64)  # int64 may wrap around, rightly
    distance = np.minimum(distance, np.uint64(farthest)).astype(np.int64)
    nan_a, nan_b = np.isnan(actual), np.isnan(exact)
    return np.where(nan_a | nan_b, np.where(nan_a & nan_b, 0, farthest), distance)


def check(actual: np.ndarray, exact: np.ndarray, dtype: str, repeated: bool = False) -> Error:
    """Assert that `actual` is as near to `exact` (float64 both) as the contract of the format asks.

    `actual` holds a result's values, each a number of the format; where they repeat each other, a
    single one of them says nothing of how many are unequal. Returns how far it is.
    """
    assert actual.shape == exact.shape, f"shape {actual.shape}, expected {exact.shape}"
    if not actual.size:
        return Error(0.0, 0, 0, 0)
    distance = ulp_distance(actual, exact, dtype)
    finite = np.isfinite(actual) & np.isfinite(rounded(exact, dtype))
    scale = np.abs(exact[finite]).max(initial=0) or 1.0
    off = np.linalg.norm((actual[finite] - exact[finite]) / scale)
    norm = np.linalg.norm(exact[finite] / scale)
    relative = off / norm if norm else off
    unequal = int(np.count_nonzero(distance))
    error = Error(float(relative), unequal, int(distance.max()), actual.size)

    worst = np.unravel_index(int(distance.argmax()), actual.shape)
    place = tuple(map(int, worst))
    told = f"{dtype} at {place}: {actual[worst]!r}, expected {exact[worst]!r}; in all {error}"
    tolerance = FORMATS[dtype].tolerance
    if tolerance is None:
        assert error.worst_ulp <= 1, told
        assert repeated or error.unequal <= max(UNEQUAL_FEW, UNEQUAL_SHARE * error.size), told
    else:
        # What is not finite has no relative error: it must be the same, or one rounding away.
        assert distance[~finite].max(initial=0) <= 1, told
        assert error.relative <= tolerance, told
    return error
