"""The CPU path: the same RotaryProblem solved by NumPy, in float64 with one rounding at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import ndarray_at
from .problem import (
    FREQUENCY,
    GIVEN,
    IMPLICIT,
    MIXED,
    NUM_AXES,
    OFFSET,
    PACKED,
    Pointers,
    RotaryProblem,
    View,
)

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Doubles = NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 17  # of x at a time, so that the intermediate arrays stay in the cache

_STORAGE = {
    "float16": "f2",
    "bfloat16": "u2",
    "float32": "f4",
    "float64": "f8",
    "int32": "i4",
    "int64": "i8",
    FREQUENCY: "u8",
}
RADIANS = 2 * np.pi / 2**64  # of a unit of 2^-64 turns


def rotate(problem: RotaryProblem, pointers: Pointers) -> None:
    """Solve the problem on arrays at these addresses, which the caller keeps alive."""
    sizes = problem.batch, problem.num_tokens
    storage = _STORAGE[problem.dtype]
    positions = _positions(problem, pointers)
    for tensor, x_at, out_at in zip(problem.tensors, pointers.x, pointers.out, strict=True):
        shape = (*sizes, tensor.num_heads, problem.head_dim)
        x = ndarray_at(x_at, storage, shape, tensor.x.strides)
        out = ndarray_at(out_at, storage, shape, tensor.out.strides)
        angles_at = _angles(problem, pointers, tensor.num_heads)
        for block in _blocks(*sizes, tensor.num_heads * problem.head_dim):
            rows: Any = block
            in_range = None
            if positions is not None:
                of_block = positions[(slice(None), *block)]
                inside = (of_block >= 0) & (of_block < problem.num_positions)
                in_range = np.logical_and.reduce(inside)
                rows = _of_pairs(problem, np.where(in_range, of_block, 0))
            _rotate_block(problem, x[block], out[block], *angles_at(rows), in_range)


def _blocks(batch: int, num_tokens: int, token_size: int) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, tokens) into blocks of about BLOCK_ELEMENTS."""
    tokens = max(1, min(num_tokens, BLOCK_ELEMENTS // max(1, token_size)))
    batches = max(1, BLOCK_ELEMENTS // max(1, tokens * token_size))
    for b, start in product(range(0, batch, batches), range(0, num_tokens, tokens)):
        yield slice(b, b + batches), slice(start, start + tokens)


def _positions(problem: RotaryProblem, pointers: Pointers) -> Array | None:
    """Return the explicit positions as (axes, batch, tokens)."""
    kind, sizes = problem.position_kind, (problem.batch, problem.num_tokens)
    if kind == IMPLICIT:
        return None
    if problem.position_dtype is None:  # COUNTED
        return np.broadcast_to(np.arange(problem.num_tokens) + pointers.first, (1, *sizes))
    storage = _STORAGE[problem.position_dtype]
    if kind == PACKED:
        return _packed_positions(problem, pointers, storage)
    if kind in (GIVEN, OFFSET):
        given = ndarray_at(pointers.positions, storage, sizes, problem.position_strides)[None]
        return given if kind == GIVEN else given + np.arange(problem.num_tokens) + pointers.first
    strides = problem.position_axis, *problem.position_strides
    return ndarray_at(pointers.positions, storage, (NUM_AXES, *sizes), strides)


def _packed_positions(problem: RotaryProblem, pointers: Pointers, storage: str) -> Array:
    """Return the place of every token in its sequence: -1 in none."""
    num_sequences = problem.num_sequences
    begins = ndarray_at(pointers.cu_seqlens, storage, (num_sequences + 1,), (problem.cu_stride,))
    tokens = np.arange(problem.num_tokens)
    sequences = np.searchsorted(begins, tokens, side="right") - 1
    found = (sequences >= 0) & (sequences < num_sequences)
    sequences = np.where(found, sequences, 0)
    places = tokens - begins[sequences] + pointers.first
    if pointers.positions and num_sequences:
        offsets = ndarray_at(
            pointers.positions, storage, (num_sequences,), (problem.position_axis,)
        )
        places = places + offsets[sequences]
    return np.where(found, places, -1)[None, None]


def _of_pairs(problem: RotaryProblem, positions: Array) -> Array:
    """Return (batch, tokens, 1, pairs) from (axes, batch, tokens); 1 for all pairs, of one axis."""
    if len(positions) == 1:
        return np.expand_dims(positions[0], (2, 3))
    pair = np.arange(problem.rotary_dim // 2)
    if problem.position_kind == MIXED:
        axis = pair % NUM_AXES
        ends = np.array([problem.rotary_dim, *problem.section_ends])
        axis = np.where(pair < ends[axis], axis, 0)
    else:
        axis = np.searchsorted(problem.section_ends, pair, side="right")
    return np.moveaxis(positions[axis], 0, -1)[:, :, None]


def _angles(
    problem: RotaryProblem, pointers: Pointers, num_heads: int
) -> Callable[[Any], tuple[Doubles, Doubles]]:
    """Return what finds cosines and sines of (batch, tokens, heads, pairs), by block or row."""
    num_pairs, storage = problem.rotary_dim // 2, _STORAGE[problem.table_dtype]
    if problem.table_dtype == FREQUENCY:
        turns = ndarray_at(pointers.cos, storage, (num_pairs,), problem.cos.strides[3:])
        scale = ndarray_at(pointers.sin, "f8", (1,), (1,))

        def computed(of_pairs: Array) -> tuple[Doubles, Doubles]:
            parts = (of_pairs.astype(np.uint64) * turns).view(np.int64)
            return scale * np.cos(parts * RADIANS), scale * np.sin(parts * RADIANS)

        return computed
    cos = _table(problem, num_heads, pointers.cos, problem.cos, problem.cos_row)
    sin = _table(problem, num_heads, pointers.sin, problem.sin, problem.sin_row)

    def read(at: Any) -> tuple[Doubles, Doubles]:
        if problem.position_kind != IMPLICIT:
            at = at[..., 0, 0] if at.shape[-1] < num_pairs else (at, 0, np.arange(num_pairs))
        return _widen(cos[at], problem.table_dtype), _widen(sin[at], problem.table_dtype)

    return read


def _table(problem: RotaryProblem, num_heads: int, pointer: int, view: View, row: int) -> Array:
    """View cosines or sines as (batch, tokens, heads, pairs), or by position (rows, 1, pairs)."""
    storage = _STORAGE[problem.table_dtype]
    num_pairs = problem.rotary_dim // 2
    if problem.position_kind == IMPLICIT:
        heads = num_heads if view.strides[2] else 1
        by_token = (problem.batch, problem.num_tokens, heads, num_pairs)
        return ndarray_at(pointer, storage, by_token, view.strides)
    if not problem.num_positions:
        return np.zeros((1, 1, num_pairs), storage)  # every token is out of range
    by_position = (problem.num_positions, 1, num_pairs)
    return ndarray_at(pointer, storage, by_position, (row, 0, view.strides[3]))


def _rotate_block(
    problem: RotaryProblem, x: Array, out: Array, cos: Doubles, sin: Doubles, in_range: Array | None
) -> None:
    """Rotate (batch, tokens, heads, head_dim) of storage words; `out` may be `x`."""
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
            values = np.where(in_range[..., None, None], values, outside)
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
