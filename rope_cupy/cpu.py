"""The CPU path: the same RotaryProblem solved by NumPy, in float64 with one rounding at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .memory import FLOATS_8, ITEMSIZE, ndarray_at
from .options import NUM_AXES, TOKEN_NORM
from .problem import (
    BY_ELEMENT,
    FREQUENCY,
    GIVEN,
    IMPLICIT,
    INTERLEAVED_MROPE,
    OFFSET,
    ONE_ANGLE,
    PACKED,
    TOKEN_INDEX,
    CacheProblem,
    Pointers,
    RotaryProblem,
    RotaryTensor,
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
    "float8_e4m3fn": "u1",
    "float8_e5m2": "u1",
}
COPIED = 2  # the number of the tensor that is copied
RADIANS = 2 * np.pi / 2**64  # of a unit of 2^-64 turns


class Angles(NamedTuple):
    """(a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b): with one angle both are the same."""

    cos_a: Doubles
    sin_a: Doubles
    cos_b: Doubles
    sin_b: Doubles


def rotate(problem: RotaryProblem, pointers: Pointers) -> None:
    """Solve the problem on arrays at these addresses, which the caller keeps alive."""
    sizes = problem.batch, problem.num_tokens
    positions = _positions(problem, pointers)
    for i, tensor in enumerate(problem.tensors):
        if not tensor.num_heads:
            continue
        x_at, out_at = pointers.of_tensor(i)
        x = _heads(problem, tensor, x_at, tensor.x)
        stored = _to_words(problem, pointers, i)
        if problem.cache and i:
            out = np.empty(x.shape, _STORAGE[problem.cache.dtype])
        else:
            out = _heads(problem, tensor, out_at, tensor.out)
        angles_at = _angles(problem, pointers, tensor.num_heads)
        for block in _blocks(*sizes, tensor.num_heads * problem.head_dim):
            if i == COPIED:
                out[block] = stored.as_they_are(x[block])
                continue
            rows: Any = block
            in_range = None
            if positions is not None:
                of_block = positions[(slice(None), *block)]
                inside = (of_block >= 0) & (of_block < problem.num_positions)
                in_range = np.logical_and.reduce(inside)
                rows = _of_pairs(problem, np.where(in_range, of_block, 0))
            norm = _normalised(problem, pointers, i, x[block])
            _rotate_block(problem, x[block], out[block], angles_at(rows), in_range, norm, stored)
        if problem.cache and i:
            _write_slots(problem, problem.cache, pointers, tensor, out_at, out)


def _heads(problem: RotaryProblem, tensor: RotaryTensor, pointer: int, view: View) -> Array:
    """View a tensor, which may begin at a later head of its array, as storage words."""
    shape = problem.batch, problem.num_tokens, tensor.num_heads, problem.head_dim
    start = pointer + tensor.start * view.strides[2] * ITEMSIZE[problem.dtype]
    return ndarray_at(start, _STORAGE[problem.dtype], shape, view.strides)


class _Words(NamedTuple):
    """How numbers are stored."""

    dtype: str  # of the result
    x_dtype: str
    scale: float  # by which they are divided
    eager: bool

    def of(self, numbers: Array) -> Array:
        """Return numbers as words: rounded once, but twice on the way from double in PyTorch."""
        if self.dtype in FLOATS_8:
            return _narrow_to_8_bits(numbers / self.scale, self.dtype)
        if self.eager and ITEMSIZE[self.dtype] == 2:
            numbers = numbers.astype(np.float32)
        return _narrow(numbers.astype(np.float64), self.dtype)

    def as_they_are(self, words: Array) -> Array:
        """Return words of the input as those of the result."""
        if self.dtype == self.x_dtype:
            return words
        with np.errstate(all="ignore"):
            return self.of(_widen(words, self.x_dtype))


def _to_words(problem: RotaryProblem, pointers: Pointers, i: int) -> _Words:
    """Return how a tensor's numbers are stored."""
    dtype, scale = problem.dtype, 1.0
    if problem.cache and i:
        dtype, scale = problem.cache.dtype, problem.cache.scales[i - 1]
        pointer = (pointers.k_scale, pointers.v_scale)[i - 1]
        if pointer:
            kind = problem.cache.scale_dtype
            words = ndarray_at(pointer, _STORAGE[kind], (1,), (1,))
            with np.errstate(all="ignore"):
                scale = float(_widen(words, kind)[0].astype(np.float32))
    return _Words(dtype, problem.dtype, scale, problem.eager)


def _normalised(problem: RotaryProblem, pointers: Pointers, i: int, x: Array) -> Doubles | None:
    """Return (batch, tokens, heads, head_dim) of words normalised, None where there is no norm."""
    if problem.norm is None:
        return None
    norm, pointer = problem.norm.norm, (pointers.q_weight, pointers.k_weight)[i]
    of_token = norm.kind == TOKEN_NORM
    axes = (2, 3) if of_token else 3
    with np.errstate(all="ignore"):
        numbers: Array = _widen(x, problem.dtype)
        mean = np.mean(numbers * numbers, axis=axes, keepdims=True)
        if problem.eager:  # step by step in the dtype in which PyTorch's operations do it
            real = _eager_dtype(problem)
            root = np.sqrt(mean.astype(real) + real(norm.eps))
            numbers = numbers.astype(real) * (real(1) / root)
        else:
            numbers = numbers / np.sqrt(mean + norm.eps)
        if norm.num_roundings == 2:
            numbers = _rounded(numbers, problem.dtype).astype(numbers.dtype)
        if pointer:
            stride, heads = problem.norm.strides[i] or 0, x.shape[2] if of_token else 1
            shape, strides = (heads, problem.head_dim), (problem.head_dim * stride, stride)
            weights = ndarray_at(pointer, _STORAGE[problem.norm.dtype], shape, strides)
            factors = _widen(weights, problem.norm.dtype).astype(numbers.dtype)
            numbers = numbers * (factors + numbers.dtype.type(norm.weight_offset))
        if norm.num_roundings:
            numbers = _rounded(numbers, problem.dtype)
    return numbers.astype(np.float64)


def _rounded(numbers: Array, dtype: str) -> Doubles:
    """Return what is left of numbers in a dtype."""
    return _widen(_narrow(numbers.astype(np.float64), dtype), dtype)


def _eager_dtype(problem: RotaryProblem) -> type[np.floating[Any]]:
    """Return what PyTorch's operations compute in."""
    return np.float64 if problem.is_double else np.float32


def _write_slots(
    problem: RotaryProblem,
    cache: CacheProblem,
    pointers: Pointers,
    tensor: RotaryTensor,
    pointer: int,
    words: Array,
) -> None:
    """Write the rows of tokens to their slots, but for those that the cache does not hold."""
    sizes = problem.batch, problem.num_tokens
    slots = ndarray_at(pointers.slots, _STORAGE[cache.slot_dtype], sizes, cache.slot_strides)
    shape = cache.num_blocks, cache.block_size, tensor.num_heads, problem.head_dim
    at = ndarray_at(pointer, _STORAGE[cache.dtype], shape, tensor.out.strides)
    held = (slots >= 0) & (slots < cache.num_blocks * cache.block_size)
    at[np.divmod(slots[held], max(1, cache.block_size))] = words[held]


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
    if kind == TOKEN_INDEX:
        return np.broadcast_to(
            np.arange(problem.num_tokens) + pointers.position_offset, (1, *sizes)
        )
    if kind == PACKED:
        return _packed_positions(problem, pointers)
    storage = _STORAGE[problem.position_dtype or ""]
    if kind in (GIVEN, OFFSET):
        given = ndarray_at(pointers.positions, storage, sizes, problem.position_strides)[None]
        if kind == GIVEN:
            return given
        return _sum_of(np.arange(problem.num_tokens), np.int64(pointers.position_offset), given)
    strides = problem.position_axis, *problem.position_strides
    return ndarray_at(pointers.positions, storage, (NUM_AXES, *sizes), strides)


def _packed_positions(problem: RotaryProblem, pointers: Pointers) -> Array:
    """Return the place of every token in its sequence: -1 in none."""
    num_sequences, cu_storage = problem.num_sequences, _STORAGE[problem.cu_dtype or ""]
    begins = ndarray_at(pointers.cu_seqlens, cu_storage, (num_sequences + 1,), (problem.cu_stride,))
    tokens = np.arange(problem.num_tokens)
    sequences = np.searchsorted(begins, tokens, side="right") - 1
    found = (sequences >= 0) & (sequences < num_sequences)
    sequences = np.where(found, sequences, 0)
    parts = [tokens + 1, ~begins[sequences], np.int64(pointers.position_offset)]  # ~n is -n - 1
    if pointers.positions and num_sequences:
        storage = _STORAGE[problem.position_dtype or ""]
        shape, strides = (num_sequences,), (problem.position_axis,)
        parts.append(ndarray_at(pointers.positions, storage, shape, strides)[sequences])
    return np.where(found, _sum_of(*parts), -1)[None, None]


def _sum_of(*numbers: Any) -> Array:
    """Return the sum of integers, -1 where it has more than 64 bits: see kernels/positions.cuh."""
    low: Array = np.zeros((), np.uint64)
    high: Array = np.zeros((), np.int64)
    for number in numbers:
        word = np.asarray(number, np.int64).view(np.uint64)
        with np.errstate(over="ignore"):
            low = low + word
        high = high + (low < word) - (np.asarray(number) < 0)
    return np.where(high == 0, low.view(np.int64), -1)


def _of_pairs(problem: RotaryProblem, positions: Array) -> Array:
    """Return (batch, tokens, 1, pairs) from (axes, batch, tokens); 1 for all pairs, of one axis."""
    if len(positions) == 1:
        return np.expand_dims(positions[0], (2, 3))
    pair = np.arange(problem.rotary_dim // 2)
    if problem.position_kind == INTERLEAVED_MROPE:
        axis = pair % NUM_AXES
        ends = np.array([problem.rotary_dim, *problem.section_ends])
        axis = np.where(pair < ends[axis], axis, 0)
    else:
        axis = np.searchsorted(problem.section_ends, pair, side="right")
    return np.moveaxis(positions[axis], 0, -1)[:, :, None]


def _angles(problem: RotaryProblem, pointers: Pointers, num_heads: int) -> Callable[[Any], Angles]:
    """Return what finds angles of (batch, tokens, heads, pairs), by block or row."""
    num_pairs, storage = problem.rotary_dim // 2, _STORAGE[problem.table_dtype]
    if problem.table_dtype == FREQUENCY:
        turns = ndarray_at(pointers.cos, storage, (num_pairs,), problem.cos.strides[3:])
        scale = ndarray_at(pointers.sin, "f8", (1,), (1,))

        def computed(of_pairs: Array) -> Angles:
            parts = (of_pairs.astype(np.uint64) * turns).view(np.int64)
            cos, sin = scale * np.cos(parts * RADIANS), scale * np.sin(parts * RADIANS)
            return Angles(cos, sin, cos, sin)

        return computed
    first = _table(problem, num_heads, pointers, of_second=False)
    second = _table(problem, num_heads, pointers, of_second=True)

    def read(at: Any) -> Angles:
        if problem.position_kind != IMPLICIT:
            at = at[..., 0, 0] if at.shape[-1] < num_pairs else (at, 0, np.arange(num_pairs))
        cos, sin = (_widen(part[at], problem.table_dtype) for part in first)
        if problem.table_form == ONE_ANGLE:
            return Angles(cos, sin, cos, sin)
        others = [_widen(part[at], problem.table_dtype) for part in second]
        if problem.table_form == BY_ELEMENT:
            return Angles(cos, sin, *others)
        return Angles(cos, -others[0], others[1], sin)  # of rows [cos, -sin] and [sin, cos]

    return read


def _table(
    problem: RotaryProblem, num_heads: int, pointers: Pointers, of_second: bool
) -> tuple[Array, Array]:
    """View cosines and sines as (batch, tokens, heads, pairs), or by position (rows, 1, pairs).

    They are those of the first angle of each pair, or of the second.
    """
    num_pairs, storage = problem.rotary_dim // 2, _STORAGE[problem.table_dtype]

    def part(pointer: int, view: View, row: int) -> Array:
        step, to_second = problem.table_steps(view)
        pointer += of_second * to_second * ITEMSIZE[problem.table_dtype]
        if problem.position_kind == IMPLICIT:
            heads = num_heads if view.strides[2] else 1
            by_token = (problem.batch, problem.num_tokens, heads, num_pairs)
            return ndarray_at(pointer, storage, by_token, (*view.strides[:3], step))
        if not problem.num_positions:
            return np.zeros((1, 1, num_pairs), storage)  # every token is out of range
        by_position = (problem.num_positions, 1, num_pairs)
        return ndarray_at(pointer, storage, by_position, (row, 0, step))

    return (
        part(pointers.cos, problem.cos, problem.cos_row),
        part(pointers.sin, problem.sin, problem.sin_row),
    )


def _rotate_block(
    problem: RotaryProblem,
    x: Array,
    out: Array,
    angles: Angles,
    in_range: Array | None,
    norm: Doubles | None,
    stored: _Words,
) -> None:
    """Rotate (batch, tokens, heads, head_dim) of storage words; `out` may be `x`.

    `norm` are the numbers of the words once they are normalised, None where that is not asked.
    """
    start, num_pairs = problem.rotary_offset, problem.rotary_dim // 2
    end = start + problem.rotary_dim
    if problem.interleaved:
        places = slice(start, end, 2), slice(start + 1, end, 2)
    else:
        places = slice(start, start + num_pairs), slice(start + num_pairs, end)

    def kept(place: slice) -> Array:
        return stored.as_they_are(x[..., place]) if norm is None else stored.of(norm[..., place])

    with np.errstate(all="ignore"):
        first, second = (
            _widen(x[..., place], problem.dtype) if norm is None else norm[..., place]
            for place in places
        )
    if problem.conjugate:  # the transpose
        angles = Angles(angles.cos_a, -angles.sin_b, angles.cos_b, -angles.sin_a)
    rotate_pairs = _rotated_eagerly if problem.eager else _rotated
    with np.errstate(all="ignore"):
        results = rotate_pairs(problem, first, second, angles)
        rotated = [stored.of(numbers) for numbers in results]
    if not problem.in_place or norm is not None:
        for place in (slice(0, start), slice(end, None)):
            out[..., place] = kept(place)
    outside = [kept(place) for place in places] if in_range is not None else []
    for i, (place, values) in enumerate(zip(places, rotated, strict=True)):
        if in_range is not None:
            lost = outside[i] if problem.keep_out_of_range else stored.of(np.array(np.nan))
            values = np.where(in_range[..., None, None], values, lost)
        out[..., place] = values


def _rotated(
    problem: RotaryProblem, first: Doubles, second: Doubles, angles: Angles
) -> tuple[Array, Array]:
    """Return both elements of every pair, rotated."""
    cos_a, sin_a, cos_b, sin_b = angles
    return first * cos_a - second * sin_a, second * cos_b + first * sin_b


def _rotated_eagerly(
    problem: RotaryProblem, first: Doubles, second: Doubles, angles: Angles
) -> tuple[Array, Array]:
    """Return the same with each product and each sum rounded, as PyTorch's operations do it."""
    real = _eager_dtype(problem)
    parts: list[Array] = [numbers.astype(real) for numbers in (first, second, *angles)]
    a, b, cos_a, sin_a, cos_b, sin_b = parts

    def product(x: Array, y: Array) -> Array:
        if problem.dtype != problem.table_dtype:
            return x * y
        return _rounded(x * y, problem.dtype).astype(real)

    return product(a, cos_a) - product(b, sin_a), product(b, cos_b) + product(a, sin_b)


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


def _narrow_to_8_bits(values: Doubles, dtype: str) -> Array:
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
