"""The CPU path: the same RotaryProblem solved by NumPy, in float64 with one rounding at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .choices import LAYER_NORM, TOKEN_NORM
from .memory import FLOATS_8, ITEMSIZE, ndarray_at
from .options import NUM_AXES
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
from .words import STORAGE, narrow, narrow_to_8_bits, widen

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Doubles = NDArray[np.float64]

BLOCK_ELEMENTS = 1 << 17  # of x at a time, so that the intermediate arrays stay in the cache

COPIED = 2  # the number of the tensor that is copied
RADIANS = 2 * np.pi / 2**64  # of a unit of 2^-64 turns


class Angles(NamedTuple):
    """(a, b) becomes (a cos_a - b sin_a, b cos_b + a sin_b): with one angle both are the same."""

    cos_a: Doubles
    sin_a: Doubles
    cos_b: Doubles
    sin_b: Doubles


def rotate_all(problems: Sequence[RotaryProblem], pointers: Sequence[Pointers]) -> None:
    """Solve problems of calls that are written together."""
    for problem, each in zip(problems, pointers, strict=True):
        rotate(problem, each)


def rotate(problem: RotaryProblem, pointers: Pointers) -> None:
    """Solve the problem on arrays at these addresses, which the caller keeps alive."""
    positions = _positions(problem, pointers)
    own = _Words(problem.dtype, problem.dtype, 1.0, problem.eager)
    for i, tensor in enumerate(problem.tensors):
        if not tensor.num_heads:
            continue
        x_at, out_at = pointers.of_tensor(i)
        x = _heads(problem, tensor, x_at, tensor.x)
        if problem.cache is None or i == 0:
            out = _heads(problem, tensor, out_at, tensor.out)
            _rotate_tensor(problem, pointers, i, positions, x, out, own)
            continue
        words = np.empty(x.shape, STORAGE[problem.cache.dtype])
        in_cache = own._replace(dtype=problem.cache.dtype, scale=_scale(problem.cache, pointers, i))
        _rotate_tensor(problem, pointers, i, positions, x, words, in_cache)
        _write_slots(problem, problem.cache, pointers, tensor, out_at, words)
        if problem.k_out and i == 1:
            out = _heads(problem, tensor, pointers.k_out, problem.k_out)
            _rotate_tensor(problem, pointers, i, positions, x, out, own)


def _rotate_tensor(
    problem: RotaryProblem,
    pointers: Pointers,
    i: int,
    positions: Array | None,
    x: Array,
    out: Array,
    stored: _Words,
) -> None:
    """Rotate or copy the words of a tensor, (batch, tokens, heads, head_dim); `out` may be `x`."""
    batch, num_tokens, num_heads, head_dim = x.shape
    angles_at = _angles(problem, pointers, num_heads) if problem.rotary_dim else None
    for block in _blocks(batch, num_tokens, num_heads * head_dim):
        if i == COPIED:
            out[block] = stored.as_they_are(x[block])
            continue
        if angles_at is None:
            numbers = widen(x[block], problem.dtype)
            out[block] = stored.of(_normalised(problem, pointers, i, numbers))
            continue
        rows: Any = block
        in_range = None
        if positions is not None:
            of_block = positions[(slice(None), *block)]
            inside = (of_block >= 0) & (of_block < problem.num_positions)
            in_range = np.logical_and.reduce(inside)
            rows = _of_pairs(problem, np.where(in_range, of_block, 0))
        norm, angles = None, angles_at(rows)
        if problem.norm and problem.norm.norm.after:
            numbers = _rotated_heads(problem, x[block], angles, in_range)
            out[block] = stored.of(_normalised(problem, pointers, i, numbers))
            continue
        if problem.norm:
            numbers = widen(x[block], problem.dtype)
            norm = _normalised(problem, pointers, i, numbers)
        _rotate_block(problem, x[block], out[block], angles, in_range, norm, stored)


def _heads(problem: RotaryProblem, tensor: RotaryTensor, pointer: int, view: View) -> Array:
    """View a tensor, which may begin at a later head of its array, as storage words."""
    shape = problem.batch, problem.num_tokens, tensor.num_heads, problem.head_dim
    start = pointer + tensor.start * view.strides[2] * ITEMSIZE[problem.dtype]
    return ndarray_at(start, STORAGE[problem.dtype], shape, view.strides)


class _Words(NamedTuple):
    """How numbers are stored."""

    dtype: str  # of the result
    x_dtype: str
    scale: float  # by which they are divided
    eager: bool

    def of(self, numbers: Array) -> Array:
        """Return numbers as words: rounded once, but twice on the way from double in PyTorch."""
        if self.dtype in FLOATS_8:
            return narrow_to_8_bits(numbers / self.scale, self.dtype)
        with np.errstate(all="ignore"):
            if self.eager and ITEMSIZE[self.dtype] == 2:
                numbers = numbers.astype(np.float32)
            return narrow(numbers.astype(np.float64), self.dtype)

    def as_they_are(self, words: Array) -> Array:
        """Return words of the input as those of the result."""
        if self.dtype == self.x_dtype:
            return words
        with np.errstate(all="ignore"):
            return self.of(widen(words, self.x_dtype))


def _scale(cache: CacheProblem, pointers: Pointers, i: int) -> float:
    """Return by what the numbers of a tensor are divided that is written to its cache."""
    pointer = (pointers.k_scale, pointers.v_scale)[i - 1]
    if not pointer:
        return cache.scales[i - 1]
    words = ndarray_at(pointer, STORAGE[cache.scale_dtype], (1,), (1,))
    with np.errstate(all="ignore"):
        return float(widen(words, cache.scale_dtype)[0].astype(np.float32))


def _normalised(problem: RotaryProblem, pointers: Pointers, i: int, numbers: Array) -> Doubles:
    """Return the numbers of (batch, tokens, heads, head_dim) normalised, where there is a norm."""
    of = problem.norm
    if of is None:
        return numbers
    norm, pointer = of.norm, (pointers.q_weight, pointers.k_weight)[i]
    bias = (pointers.q_bias, pointers.k_bias)[i]
    of_token = norm.kind == TOKEN_NORM
    axes = (2, 3) if of_token else 3
    with np.errstate(all="ignore"):
        if norm.kind == LAYER_NORM:
            centre = np.mean(numbers, axis=axes, keepdims=True)
            if problem.eager:
                real = _eager_dtype(problem)
                numbers, centre = numbers.astype(real), centre.astype(real)
            numbers = (numbers - centre).astype(np.float64)
        mean = np.mean(numbers * numbers, axis=axes, keepdims=True)
        if problem.eager:  # step by step in the dtype in which PyTorch's operations do it
            real = _eager_dtype(problem)
            root = np.sqrt(mean.astype(real) + real(norm.eps))
            numbers = numbers.astype(real) * (real(1) / root)
        else:
            numbers = numbers / np.sqrt(mean + norm.eps)
        if norm.num_roundings == 2:
            numbers = _rounded(numbers, problem.dtype).astype(numbers.dtype)

        def of_norm(pointer: int, stride: int | None) -> Array:
            """Return weights or biases, as (heads, head_dim)."""
            heads, step = numbers.shape[2] if of_token else 1, stride or 0
            shape, strides = (heads, problem.head_dim), (problem.head_dim * step, step)
            words = ndarray_at(pointer, STORAGE[of.dtype], shape, strides)
            return widen(words, of.dtype).astype(numbers.dtype)

        if pointer:
            factors = of_norm(pointer, of.strides[i])
            numbers = numbers * (factors + numbers.dtype.type(norm.weight_offset))
        if bias:
            numbers = numbers + of_norm(bias, of.strides[2 + i])
        if norm.num_roundings:
            numbers = _rounded(numbers, problem.dtype)
    return numbers.astype(np.float64)


def _rounded(numbers: Array, dtype: str) -> Doubles:
    """Return what is left of numbers in a dtype."""
    return widen(narrow(numbers.astype(np.float64), dtype), dtype)


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
    sizes = problem.batch, cache.num_tokens
    slots = ndarray_at(pointers.slots, STORAGE[cache.slot_dtype], sizes, cache.slot_strides)
    shape = cache.num_blocks, cache.block_size, tensor.num_heads, problem.head_dim
    at = ndarray_at(pointer, STORAGE[cache.dtype], shape, tensor.out.strides)
    held = (slots >= 0) & (slots < cache.num_blocks * cache.block_size)
    at[np.divmod(slots[held], max(1, cache.block_size))] = words[:, : cache.num_tokens][held]


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
    storage = STORAGE[problem.position_dtype or ""]
    if kind in (GIVEN, OFFSET):
        given = ndarray_at(pointers.positions, storage, sizes, problem.position_strides)[None]
        if kind == GIVEN:
            return given
        return _sum_of(np.arange(problem.num_tokens), np.int64(pointers.position_offset), given)
    strides = problem.position_axis, *problem.position_strides
    return ndarray_at(pointers.positions, storage, (NUM_AXES, *sizes), strides)


def _packed_positions(problem: RotaryProblem, pointers: Pointers) -> Array:
    """Return the place of every token in its sequence: -1 in none."""
    num_sequences, cu_storage = problem.num_sequences, STORAGE[problem.cu_dtype or ""]
    begins = ndarray_at(pointers.cu_seqlens, cu_storage, (num_sequences + 1,), (problem.cu_stride,))
    tokens = np.arange(problem.num_tokens)
    sequences = np.searchsorted(begins, tokens, side="right") - 1
    found = (sequences >= 0) & (sequences < num_sequences)
    sequences = np.where(found, sequences, 0)
    parts = [tokens + 1, ~begins[sequences], np.int64(pointers.position_offset)]  # ~n is -n - 1
    if pointers.positions and num_sequences:
        storage = STORAGE[problem.position_dtype or ""]
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
    num_pairs, storage = problem.rotary_dim // 2, STORAGE[problem.table_dtype]
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
        cos, sin = (widen(part[at], problem.table_dtype) for part in first)
        if problem.table_form == ONE_ANGLE:
            return Angles(cos, sin, cos, sin)
        others = [widen(part[at], problem.table_dtype) for part in second]
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
    num_pairs, storage = problem.rotary_dim // 2, STORAGE[problem.table_dtype]

    def part(pointer: int, view: View, row: int) -> Array:
        step, to_second = problem.table_steps(view)
        pointer += of_second * to_second * ITEMSIZE[problem.table_dtype]
        if problem.position_kind == IMPLICIT:
            heads = problem.table_heads if view.strides[2] else 1
            by_token = (problem.batch, problem.num_tokens, heads, num_pairs)
            part = ndarray_at(pointer, storage, by_token, (*view.strides[:3], step))
            return part.repeat(num_heads // heads, axis=2) if heads > 1 else part
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
    start, places = problem.rotary_offset, _places(problem)
    end = start + problem.rotary_dim

    def kept(place: slice) -> Array:
        return stored.as_they_are(x[..., place]) if norm is None else stored.of(norm[..., place])

    with np.errstate(all="ignore"):
        first, second = (
            widen(x[..., place], problem.dtype) if norm is None else norm[..., place]
            for place in places
        )
        rotated = [stored.of(each) for each in _rotated_pairs(problem, first, second, angles)]
    if not problem.in_place or norm is not None:
        for place in (slice(0, start), slice(end, None)):
            out[..., place] = kept(place)
    outside = [kept(place) for place in places] if in_range is not None else []
    for i, (place, values) in enumerate(zip(places, rotated, strict=True)):
        if in_range is not None:
            lost = outside[i] if problem.keep_out_of_range else stored.of(np.array(np.nan))
            values = np.where(in_range[..., None, None], values, lost)
        out[..., place] = values


def _rotated_heads(
    problem: RotaryProblem, x: Array, angles: Angles, in_range: Array | None
) -> Doubles:
    """Return the numbers of (batch, tokens, heads, head_dim) of words, rotated before a norm."""
    numbers, places = widen(x, problem.dtype), _places(problem)
    with np.errstate(all="ignore"):
        first, second = (numbers[..., place] for place in places)
        rotated = _rotated_pairs(problem, first, second, angles)
    for place, values in zip(places, rotated, strict=True):
        if in_range is not None:
            lost = numbers[..., place] if problem.keep_out_of_range else np.nan
            values = np.where(in_range[..., None, None], values, lost)
        numbers[..., place] = values
    rounds = problem.norm and problem.norm.norm.num_roundings
    if problem.eager and not rounds:  # sums are rounded as products are
        return _rounded(numbers, problem.dtype) if _rounds_products(problem) else numbers
    if rounds:
        numbers = widen(_Words(problem.dtype, "", 1.0, problem.eager).of(numbers), problem.dtype)
    return numbers


def _places(problem: RotaryProblem) -> tuple[slice, slice]:
    """Return where the first and the second elements of pairs lie in a head."""
    start, num_pairs = problem.rotary_offset, problem.rotary_dim // 2
    end = start + problem.rotary_dim
    if problem.interleaved:
        return slice(start, end, 2), slice(start + 1, end, 2)
    return slice(start, start + num_pairs), slice(start + num_pairs, end)


def _rotated_pairs(
    problem: RotaryProblem, first: Doubles, second: Doubles, angles: Angles
) -> tuple[Array, Array]:
    """Return both elements of every pair, rotated as the problem wants it."""
    if problem.conjugate:  # the transpose
        angles = Angles(angles.cos_a, -angles.sin_b, angles.cos_b, -angles.sin_a)
    rotate_pairs = _rotated_eagerly if problem.eager else _rotated
    return rotate_pairs(problem, first, second, angles)


def _rotated(
    problem: RotaryProblem, first: Doubles, second: Doubles, angles: Angles
) -> tuple[Array, Array]:
    """Return both elements of every pair, rotated."""
    cos_a, sin_a, cos_b, sin_b = angles
    return first * cos_a - second * sin_a, second * cos_b + first * sin_b


def _rounds_products(problem: RotaryProblem) -> bool:
    """Return whether PyTorch's operations round products to q's dtype."""
    return problem.dtype == problem.table_dtype


def _rotated_eagerly(
    problem: RotaryProblem, first: Doubles, second: Doubles, angles: Angles
) -> tuple[Array, Array]:
    """Return the same with each product and each sum rounded, as PyTorch's operations do it."""
    real = _eager_dtype(problem)
    parts: list[Array] = [numbers.astype(real) for numbers in (first, second, *angles)]
    a, b, cos_a, sin_a, cos_b, sin_b = parts

    def product(x: Array, y: Array) -> Array:
        rounds = _rounds_products(problem)
        return _rounded(x * y, problem.dtype).astype(real) if rounds else x * y

    return product(a, cos_a) - product(b, sin_a), product(b, cos_b) + product(a, sin_b)
