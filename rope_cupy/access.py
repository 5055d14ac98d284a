"""Widths: how many elements of each array a thread may read or write at once. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from .memory import ACCESS_BYTES, ITEMSIZE
from .problem import RotaryProblem, View


class Widths(NamedTuple):
    """How many elements of each array may move in one access."""

    x: tuple[int, ...]  # one for each tensor
    out: tuple[int, ...]  # then of k beside its cache, where it is written there
    cos: int
    sin: int
    weights: int


def access_widths(problem: RotaryProblem) -> Widths:
    """Return how many elements of each array of a problem may move in one access."""
    x_dtype, table_dtype, offset = problem.dtype, problem.table_dtype, problem.rotary_offset
    column = problem.table_column if problem.has_columns else 0
    outs = [tensor.out for tensor in problem.tensors]
    if problem.k_out:
        outs.append(problem.k_out)
    return Widths(
        x=tuple(_width(tensor.x, x_dtype, 1, offset) for tensor in problem.tensors),
        out=tuple(_width(out, problem.out_dtype(i), 1, offset) for i, out in enumerate(outs)),
        cos=_width(problem.cos, table_dtype, problem.table_step, problem.cos_row, column),
        sin=_width(problem.sin, table_dtype, problem.table_step, problem.sin_row, column),
        weights=_weight_width(problem),
    )


def _weight_width(problem: RotaryProblem) -> int:
    """Return the elements of one access of the weights of both tensors, where there are any."""
    norm = problem.norm
    if norm is None:
        return 1
    views = [
        View((0, 0, problem.head_dim * stride, stride), alignment)
        for stride, alignment in zip(norm.strides, norm.alignments, strict=True)
        if stride is not None
    ]
    widths = [_width(view, norm.dtype, 1, problem.rotary_offset) for view in views]
    return min(widths, default=ACCESS_BYTES // ITEMSIZE[norm.dtype])


def _width(view: View, dtype: str, step: int, *offsets: int) -> int:
    """Return the elements of one access: the largest power of two that divides every start."""
    *rows, element = view.strides
    if element != step:
        return 1
    itemsize = ITEMSIZE[dtype]
    return max(1, math.gcd(ACCESS_BYTES // itemsize, view.alignment // itemsize, *rows, *offsets))
