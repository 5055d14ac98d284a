"""The CPU path: the same RotaryProblem solved by NumPy, in float64 with one rounding at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import ndarray_at
from .problem import RotaryProblem

BLOCK_ELEMENTS = 1 << 17  # of x at a time, so that the intermediate arrays stay in the cache

_STORAGE = {
    "float16": "f2",
    "bfloat16": "u2",
    "float32": "f4",
    "float64": "f8",
    "int32": "i4",
    "int64": "i8",
}

Array = NDArray[Any]
Doubles = NDArray[np.float64]


def rotate(
    problem: RotaryProblem,
    xs: Sequence[int],
    outs: Sequence[int],
    cos: int,
    sin: int,
    positions: int,
) -> None:
    """Solve the problem on arrays at these addresses, which the caller keeps alive."""
    batch, num_tokens = problem.batch, problem.num_tokens
    for tensor, x_pointer, out_pointer in zip(problem.tensors, xs, outs, strict=True):
        shape = (batch, num_tokens, tensor.num_heads, problem.head_dim)
        storage = _STORAGE[problem.dtype]
        x = ndarray_at(x_pointer, storage, shape, tensor.x.strides)
        out = ndarray_at(out_pointer, storage, shape, tensor.out.strides)
        block = max(1, BLOCK_ELEMENTS // max(1, tensor.num_heads * problem.head_dim))
        for b in range(batch):
            for start in range(0, num_tokens, block):
                tokens = slice(start, min(start + block, num_tokens))
                table_rows, in_range = _rows(problem, positions, b, tokens)
                angles = [
                    _angles(
                        problem, tensor.num_heads, pointer, view.strides, row, b, tokens, table_rows
                    )
                    for pointer, view, row in (
                        (cos, problem.cos, problem.cos_row),
                        (sin, problem.sin, problem.sin_row),
                    )
                ]
                _rotate_block(problem, x[b, tokens], out[b, tokens], angles[0], angles[1], in_range)


def _rows(
    problem: RotaryProblem, positions: int, b: int, tokens: slice
) -> tuple[Array | None, Array | None]:
    """Return each token's table row and whether it has one; two Nones with implicit positions."""
    if problem.position_dtype is None:
        return None, None
    shape = (problem.batch, problem.num_tokens)
    position = ndarray_at(
        positions, _STORAGE[problem.position_dtype], shape, problem.position_strides
    )[b, tokens]
    in_range = (position >= 0) & (position < problem.num_positions)
    return np.where(in_range, position, 0), in_range


def _angles(
    problem: RotaryProblem,
    num_heads: int,
    pointer: int,
    strides: tuple[int, int, int, int],
    row: int,
    b: int,
    tokens: slice,
    table_rows: Array | None,
) -> Doubles:
    """Return cosines or sines as (tokens, 1 or heads, pairs)."""
    storage = _STORAGE[problem.table_dtype]
    num_pairs = problem.rotary_dim // 2
    if table_rows is not None:
        table = ndarray_at(pointer, storage, (problem.num_positions, num_pairs), (row, strides[3]))
        if not len(table):
            table = np.zeros(
                (1, num_pairs), storage
            )  # no position is in range: none of this is used
        return _widen(table[table_rows], problem.table_dtype)[:, None]
    heads = num_heads if strides[2] else 1
    shape = (problem.batch, problem.num_tokens, heads, num_pairs)
    return _widen(ndarray_at(pointer, storage, shape, strides)[b, tokens], problem.table_dtype)


def _rotate_block(
    problem: RotaryProblem, x: Array, out: Array, cos: Doubles, sin: Doubles, in_range: Array | None
) -> None:
    """Rotate (tokens, heads, head_dim) of storage words; `out` may be `x`."""
    start, num_pairs = problem.rotary_offset, problem.rotary_dim // 2
    end = start + problem.rotary_dim
    if problem.interleaved:
        places = slice(start, end, 2), slice(start + 1, end, 2)
    else:
        places = slice(start, start + num_pairs), slice(start + num_pairs, end)
    first, second = (_widen(x[..., place], problem.dtype) for place in places)
    if problem.conjugate:
        sin = -sin
    with np.errstate(all="ignore"):
        turned = first * cos - second * sin, second * cos + first * sin
        rotated = [_narrow(values, problem.dtype) for values in turned]
    if not problem.in_place:
        out[..., :start] = x[..., :start]
        out[..., end:] = x[..., end:]
    for place, values in zip(places, rotated, strict=True):
        if in_range is not None:
            outside = x[..., place] if problem.keep else _narrow(np.array(np.nan), problem.dtype)
            values = np.where(in_range[:, None, None], values, outside)
        out[..., place] = values


def _widen(words: Array, dtype: str) -> Doubles:
    """Return storage words as float64, exactly."""
    if dtype == "bfloat16":
        words = (words.astype(np.uint32) << 16).view(np.float32)
    return words.astype(np.float64)


def _narrow(values: Doubles, dtype: str) -> Array:
    """Round float64 to storage words, once, to nearest even."""
    if dtype != "bfloat16":
        return values.astype(_STORAGE[dtype])
    bits = _round_to_odd(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


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
