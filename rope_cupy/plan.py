"""LaunchPlan: the kernel, grid, block and argument block that solve a RotaryProblem. Pure, cached.

The argument block mirrors `Arguments` in kernels/rotary.cu: the pointers, then these integers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple

from .memory import ACCESS_BYTES, ITEMSIZE
from .problem import Pointers, RotaryProblem, View

BLOCK_THREADS = 128
C_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}


class LaunchPlan(NamedTuple):
    kernel: str  # the C++ name: a template and its arguments
    grid: tuple[int, int]
    block: tuple[int, int]
    arguments: bytes  # what follows the pointers in the argument block

    def argument_block(self, pointers: Pointers) -> bytes:
        """Return the kernel's one argument; a launch of one tensor repeats it as the second."""
        x, out = (pointers.x * 2)[:2], (pointers.out * 2)[:2]
        addresses = (*x, *out, pointers.cos, pointers.sin, pointers.positions)
        return struct.pack("<7Q", *addresses) + self.arguments


@lru_cache(maxsize=4096)
def launch_plan(problem: RotaryProblem) -> LaunchPlan:
    """Choose how wide threads read and write, how rows are numbered, and the launch over them."""
    widths = _access_widths(problem)
    num_pairs = problem.rotary_dim // 2
    pairs = _pairs_per_thread(problem, widths)
    pass_run = _pass_run(problem)
    num_pair_lanes = num_pairs // pairs
    num_lanes = num_pair_lanes + (
        (problem.head_dim - problem.rotary_dim) // pass_run if pass_run else 0
    )

    grid_y = -(-num_lanes // BLOCK_THREADS)
    block_x = -(-num_lanes // grid_y)
    block_y = BLOCK_THREADS // block_x
    axes = _axis_order(problem)
    return LaunchPlan(
        kernel=_kernel_name(problem, widths, pairs, pass_run),
        grid=(-(-problem.num_rows // block_y), grid_y),
        block=(block_x, block_y),
        arguments=_pack(problem, widths, axes, num_pair_lanes, num_lanes),
    )


class Widths(NamedTuple):
    """How many elements of each array may move in one access."""

    x: tuple[int, ...]  # one for each tensor
    out: tuple[int, ...]
    cos: int
    sin: int


def _access_widths(problem: RotaryProblem) -> Widths:
    x_dtype, table_dtype, offset = problem.dtype, problem.table_dtype, problem.rotary_offset
    return Widths(
        x=tuple(_width(tensor.x, x_dtype, 1, offset) for tensor in problem.tensors),
        out=tuple(_width(tensor.out, x_dtype, 1, offset) for tensor in problem.tensors),
        cos=_width(problem.cos, table_dtype, problem.table_step, problem.cos_row),
        sin=_width(problem.sin, table_dtype, problem.table_step, problem.sin_row),
    )


def _width(view: View, dtype: str, step: int, *offsets: int) -> int:
    """Return the elements of one access: the largest power of two that divides every start."""
    *rows, element = view.strides
    if element != step:
        return 1
    itemsize = ITEMSIZE[dtype]
    return max(1, math.gcd(ACCESS_BYTES // itemsize, view.alignment // itemsize, *rows, *offsets))


def _pairs_per_thread(problem: RotaryProblem, widths: Widths) -> int:
    """As many pairs as one access holds elements, fewer where no tensor moves as many at once."""
    pairs = most = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    widest = max(*widths.x, *widths.out)
    if widest < most:
        pairs = max(1, widest // 2) if problem.interleaved else widest
    return math.gcd(pairs, problem.rotary_dim // 2)


def _pass_run(problem: RotaryProblem) -> int:
    """Return how many elements a thread copies from outside the slice; 0 with nothing to copy."""
    rest = problem.head_dim - problem.rotary_dim
    if problem.in_place or not rest:
        return 0
    widest = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    return math.gcd(widest, problem.rotary_offset, problem.rotary_dim, rest)


def _kernel_name(problem: RotaryProblem, widths: Widths, pairs: int, pass_run: int) -> str:
    x_run = 2 * pairs if problem.interleaved else pairs
    arguments = (
        C_TYPES[problem.dtype],
        C_TYPES[problem.table_dtype],
        _cpp(problem.interleaved),
        _cpp(problem.conjugate),
        pairs,
        problem.table_step,
        problem.sin_offset,
        pass_run,
        _cpp(_is_common(problem, widths, x_run, pass_run, pairs * problem.table_step)),
    )
    return f"rotary_kernel<{', '.join(map(str, arguments))}>"


def _is_common(
    problem: RotaryProblem, widths: Widths, x_run: int, pass_run: int, table_run: int
) -> bool:
    """Return whether the kernel's short cuts hold: see kCommon in kernels/rotary.cu."""
    x_whole = min(max(x_run, pass_run), ACCESS_BYTES // ITEMSIZE[problem.dtype])
    table_whole = min(table_run, ACCESS_BYTES // ITEMSIZE[problem.table_dtype])
    tensors, cos, sin = problem.tensors, problem.cos, problem.sin
    strides = [*cos.strides, *(stride for tensor in tensors for stride in tensor.x.strides)]
    return (
        min(*widths.x, *widths.out) >= x_whole
        and min(widths.cos, widths.sin) >= table_whole
        and all(t.x.strides == t.out.strides and t.x.strides[3] == 1 for t in tensors)
        and (cos.strides, problem.cos_row) == (sin.strides, problem.sin_row)
        and cos.strides[2:] == (0, problem.table_step)
        and all(abs(stride) < 2**31 for stride in strides)
    )


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"


def _axis_order(problem: RotaryProblem) -> tuple[int, int, int]:
    """Number rows as they lie in memory: axes batch 0, token 1 and head 2, widest stride first."""
    strides = problem.tensors[0].x.strides
    outer, middle, inner = sorted(range(3), key=lambda axis: -abs(strides[axis]))
    return outer, middle, inner


def divisor(value: int) -> tuple[int, int, int]:
    """Return value, multiplier, shift: n // value == n * multiplier >> shift for 0 <= n < 2^31.

    Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
    """
    shift = 31 + (value - 1).bit_length()
    return value, (1 << shift) // value + 1, shift


def _pack(
    problem: RotaryProblem,
    widths: Widths,
    axes: tuple[int, int, int],
    num_pair_lanes: int,
    num_lanes: int,
) -> bytes:
    num_heads = [tensor.num_heads for tensor in problem.tensors]
    sizes = (problem.batch, problem.num_tokens, sum(num_heads))

    def view(strides: tuple[int, ...], origin: int, element: int, width: int) -> list[int]:
        return [origin, *(strides[axis] for axis in axes), element, width]

    words: list[int] = []
    for which in range(2):
        # A launch of one tensor fills the second place with the first, which no row asks for.
        tensor = problem.tensors[which % len(num_heads)]
        for strides, width in ((tensor.x.strides, widths.x), (tensor.out.strides, widths.out)):
            origin = problem.rotary_offset * strides[3] - which * num_heads[0] * strides[2]
            words += view(strides, origin, strides[3], width[which % len(num_heads)])
    cos, sin = problem.cos.strides, problem.sin.strides
    words += view(cos, 0, cos[3] // problem.table_step, widths.cos)
    words += view(sin, 0, sin[3] // problem.table_step, widths.sin)
    words += [-num_heads[0] * cos[2], -num_heads[0] * sin[2]]
    words += view((*problem.position_strides, 0), 0, 0, 0)
    words += [
        ITEMSIZE[problem.position_dtype] if problem.position_dtype else 0,
        problem.num_positions,
        problem.cos_row,
        problem.sin_row,
        problem.keep,
        problem.num_rows,
        *divisor(max(1, sizes[axes[2]])),
        *divisor(max(1, sizes[axes[1]])),
        axes.index(2),
        num_heads[0],
        problem.rotary_offset,
        problem.rotary_dim // 2,
        num_pair_lanes,
        num_lanes,
    ]
    return struct.pack(f"<{len(words)}q", *words)
