"""Forms of tables: where cosines and sines lie in the arrays that a table is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .arrays import Array, describe
from .memory import ACCESS_BYTES, FLOATS, ITEMSIZE, ArraySpec, alignment
from .problem import (
    ANY_POSITION,
    BY_ELEMENT,
    FREQUENCY,
    MATRICES,
    NO_TABLE,
    ONE_ANGLE,
    TableSpec,
    check_dtype,
)

COMPLEX_PARTS = {"complex64": "float32", "complex128": "float64"}


class TableView(NamedTuple):
    """A table as it lies in memory during one call."""

    arrays: tuple[Array, ...]  # these keep the memory
    pointers: tuple[int, int]  # of the first cosine and the first sine
    specs: tuple[TableSpec, TableSpec]  # for the half and for the interleaved pairing


class TableSource(NamedTuple):
    """The arrays of a table, and the form in which they hold it."""

    form: Callable[..., TableView]
    arrays: tuple[Any, ...]

    def view(self, stream: int | None) -> TableView:
        """Return where the table lies now, ready for work on `stream`."""
        return self.form(stream, *self.arrays)


_NO_ARRAY = ArraySpec((ANY_POSITION, 0), (0, 1), "float32", "", ACCESS_BYTES, False)
_NO_SPEC = TableSpec(_NO_ARRAY, _NO_ARRAY, 1, 0, NO_TABLE)


def half_width(stream: int | None, cos: Any, sin: Any) -> TableView:
    arrays = _describe_two(cos, sin, stream)
    spec = TableSpec(arrays[0].spec, arrays[1].spec, 1, 0)
    return TableView(arrays, (arrays[0].pointer, arrays[1].pointer), (spec, spec))


def full_width(stream: int | None, cos: Any, sin: Any) -> TableView:
    arrays = _describe_two(cos, sin, stream)
    width = _check_even(arrays[0].spec)
    halves = [_every(array.spec, slice(0, width // 2)) for array in arrays]
    evens = [_every(array.spec, slice(0, None, 2)) for array in arrays]
    step = 2 if all(spec.strides[-1] == 2 for spec in evens) else 1
    specs = TableSpec(halves[0], halves[1], 1, 0), TableSpec(evens[0], evens[1], step, 0)
    return TableView(arrays, (arrays[0].pointer, arrays[1].pointer), specs)


def elementwise(stream: int | None, cos: Any, sin: Any) -> TableView:
    arrays = _describe_two(cos, sin, stream)
    _check_even(arrays[0].spec)
    spec = TableSpec(arrays[0].spec, arrays[1].spec, 1, 0, BY_ELEMENT)
    return TableView(arrays, (arrays[0].pointer, arrays[1].pointer), (spec, spec))


def cos_sin_cache(stream: int | None, cos_sin: Any) -> TableView:
    cache = describe("cos_sin", cos_sin, stream)
    check_dtype("cos_sin", cache.spec, FLOATS)
    if len(cache.spec.shape) != 2 or cache.spec.shape[1] % 2:
        raise ValueError(
            "cos_sin must have the shape (positions, rotary_dim) with an even rotary_dim, got "
            f"{cache.spec.shape}"
        )
    num_pairs = cache.spec.shape[1] // 2
    cos = _every(cache.spec, slice(0, num_pairs))
    return _one_array(cache, cos, num_pairs * cache.spec.strides[-1], 1)


def complex_numbers(stream: int | None, freqs_cis: Any) -> TableView:
    freqs = describe("freqs_cis", freqs_cis, stream)
    check_dtype("freqs_cis", freqs.spec, tuple(COMPLEX_PARTS))
    _check_shape("freqs_cis", freqs.spec, 0)
    strides = tuple(2 * stride for stride in freqs.spec.strides)
    cos = freqs.spec._replace(strides=strides, dtype=COMPLEX_PARTS[freqs.spec.dtype])
    return _one_array(freqs, cos, 1, 2 if strides[-1] == 2 else 1)


def complex_pairs(stream: int | None, freqs_cis: Any) -> TableView:
    """View complex numbers as pairs of real ones, on one axis more: a graph holds them so."""
    pairs = describe("freqs_cis", freqs_cis, stream)
    check_dtype("freqs_cis", pairs.spec, tuple(COMPLEX_PARTS.values()))
    strides = pairs.spec.strides
    cos = pairs.spec._replace(shape=pairs.spec.shape[:-1], strides=strides[:-1])
    _check_shape("freqs_cis", cos, 0)
    return _one_array(pairs, cos, strides[-1], 2 if strides[-2:] == (2, 1) else 1)


def matrices(stream: int | None, freqs: Any) -> TableView:
    matrices = describe("freqs", freqs, stream)
    check_dtype("freqs", matrices.spec, FLOATS)
    shape, strides = matrices.spec.shape, matrices.spec.strides
    if shape[-2:] != (2, 2):
        raise ValueError(f"freqs must have 2 x 2 matrices on its last two axes, got shape {shape}")
    _check_shape("freqs", matrices.spec, 2)
    rows = matrices.spec._replace(shape=(*shape[:-2], 2), strides=(*strides[:-2], strides[-1]))
    step = 4 if strides[-3:] == (4, 2, 1) else 1
    return _one_array(matrices, rows, strides[-2], step, MATRICES)


def frequencies(stream: int | None, words: Any) -> TableView:
    """View what `_frequency_words` has made as one row that stands for all positions."""
    array = describe("table", words, stream)
    num_pairs = array.spec.shape[0] - 1
    shape = ANY_POSITION, num_pairs
    cos = array.spec._replace(shape=shape, strides=(0, int(num_pairs > 1)), dtype=FREQUENCY)
    pointer = array.pointer + num_pairs * ITEMSIZE[FREQUENCY]
    sin = cos._replace(strides=(0, 0), alignment=alignment(pointer))
    spec = TableSpec(cos, sin, 1, 0)
    return TableView((array,), (array.pointer, pointer), (spec, spec))


def no_table(stream: int | None) -> TableView:
    """View no array at all: nothing is rotated."""
    return TableView((), (0, 0), (_NO_SPEC, _NO_SPEC))


FORMS = {
    form.__name__: form
    for form in (
        *(
            half_width,
            full_width,
            elementwise,
            cos_sin_cache,
            complex_numbers,
            complex_pairs,
            matrices,
            frequencies,
            no_table,
        ),
    )
}


# What stands for pairs of neighbours, where a call does not say which elements are rotated.
OF_NEIGHBOURS = complex_numbers, matrices


def _one_array(
    array: Array, cos: ArraySpec, to_sin: int, step: int, form: str = ONE_ANGLE
) -> TableView:
    """View sines that lie `to_sin` elements behind their cosines in one array."""
    pointer = array.pointer + to_sin * ITEMSIZE[cos.dtype]
    sin = cos._replace(alignment=alignment(pointer))
    spec = TableSpec(cos, sin, step, to_sin if step > 1 else 0, form)
    return TableView((array,), (array.pointer, pointer), (spec, spec))


def _describe_two(cos: Any, sin: Any, stream: int | None) -> tuple[Array, Array]:
    first = describe("cos", cos, stream)
    second = describe("sin", sin, stream)
    check_dtype("cos", first.spec, FLOATS)
    if second.spec.dtype != first.spec.dtype:
        raise TypeError(f"sin must have cos's dtype {first.spec.dtype}, got {second.spec.dtype}")
    if second.spec.shape != first.spec.shape:
        raise ValueError(f"sin must have cos's shape {first.spec.shape}, got {second.spec.shape}")
    if second.spec.device != first.spec.device:
        raise ValueError(
            f"sin must be on cos's device {first.spec.device}, got {second.spec.device}"
        )
    _check_shape("cos", first.spec, 0)
    return first, second


def _check_even(spec: ArraySpec) -> int:
    """Return the width of a table that has a number for each element."""
    if spec.shape[-1] % 2:
        raise ValueError(f"cos must have an even last axis, rotary_dim, got shape {spec.shape}")
    return spec.shape[-1]


def _check_shape(name: str, spec: ArraySpec, trailing: int) -> None:
    if len(spec.shape) - trailing not in (2, 3, 4):
        behind = ", 2, 2" if trailing else ""
        raise ValueError(
            f"{name} must have the shape (positions, pairs{behind}), (batch, tokens, pairs{behind})"
            f" or (batch, tokens, heads, pairs{behind}), got {spec.shape}"
        )


def _every(spec: ArraySpec, pairs: slice) -> ArraySpec:
    """Return the spec of array[..., pairs] for a slice that starts at 0."""
    start, stop, step = pairs.indices(spec.shape[-1])
    size = len(range(start, stop, step))
    stride = spec.strides[-1] * step if size > 1 else 0
    return spec._replace(shape=(*spec.shape[:-1], size), strides=(*spec.strides[:-1], stride))
