"""LaunchPlan: the kernel, grid, block and argument block that solve a RotaryProblem. Pure, cached.

The argument block mirrors `Arguments` in kernels/rotary.cu: the pointers, then these integers.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import NamedTuple

from .memory import ACCESS_BYTES, FLOATS_8, ITEMSIZE
from .options import HEAD_NORM, TOKEN_NORM
from .problem import (
    BY_ELEMENT,
    COUNTED,
    FREQUENCY,
    GIVEN,
    IMPLICIT,
    MATRICES,
    MIXED,
    ONE_ANGLE,
    PACKED,
    SECTIONS,
    NormProblem,
    Pointers,
    RotaryProblem,
    RotaryTensor,
    View,
)

WARP = 32
BLOCK_BYTES = 4096  # of x: with less, GPUs cannot start blocks as fast as the memory serves them
BLOCK_THREADS = range(128, 257)  # as wanted; a block of whole warps may have up to 512
MAX_LANES = 256  # of a block
MOST_THREADS = 1024  # of a block that has a whole token; of those that compute in double half of it
TOKEN_THREADS = 128  # of such a block, as wanted
TOKEN_BYTES = 128  # of x, at most, that each of them then has
MOST_ROWS = 8  # and heads
BATCH, TOKEN, HEAD = 0, 1, 2  # axes
L2_BYTES = 2**23  # of a table that stays in the L2 while other data passes through
TILE_BYTES = L2_BYTES // 2  # of a table, at most
MIN_TILE = 256  # tokens, with fewer of which a head's would lie in pieces
C_TYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
    FREQUENCY: "frequency",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "int32": "int",
    "int64": "long long",
    None: "void",
}


class LaunchPlan(NamedTuple):
    kernel: str  # the C++ name: a template and its arguments
    grid: tuple[int, int]
    block: tuple[int, int]
    to_slice: tuple[tuple[int, int], ...]  # bytes from where x and out of each tensor begin
    arguments: bytes  # what lies between the first pointers and cu_seqlens
    norm: bytes | None  # what lies before the pointers of weights
    to_weight: tuple[int, int]  # bytes to the rotated slice's
    cache: bytes | None  # what lies before the pointers of slots and scales
    table: bytes  # what lies behind all else, for tables that need it

    def argument_block(self, pointers: Pointers) -> bytes:
        """Return the kernel's one argument; a launch of one tensor repeats it as the second."""
        slices: list[int] = []
        for side in range(2):
            slices += [pointers.of_tensor(i)[side] + to[side] for i, to in enumerate(self.to_slice)]
        data = pointers.cos, pointers.sin, pointers.positions
        block = struct.pack(f"<{len(slices) + 3}Q", *slices, *data) + self.arguments
        block += struct.pack("<Qq", pointers.cu_seqlens, pointers.first)
        if self.norm:
            weights = pointers.q_weight, pointers.k_weight
            at = [at and at + to for at, to in zip(weights, self.to_weight, strict=True)]
            block += self.norm + struct.pack("<2Q", *at)
        if self.cache:
            last = pointers.slots, pointers.k_scale, pointers.v_scale
            block += self.cache + struct.pack("<3Q", *last)
        return block + self.table


class Order(NamedTuple):
    """How rows are numbered: over an outer, a middle and an inner axis."""

    axes: tuple[int, int, int]
    tile: int  # or by this many tokens at a time, each of which all heads pass; 0 for none

    def strides(self, strides: tuple[int, ...]) -> list[int]:
        """Return the strides of the three axes from those of batch, tokens and heads."""
        if self.tile:
            return [self.tile * strides[TOKEN], strides[HEAD], strides[TOKEN]]
        return [strides[axis] for axis in self.axes]

    def sizes(self, batch: int, num_tokens: int, num_heads: int) -> tuple[int, int, int]:
        """Return the sizes of the three axes."""
        if self.tile:
            return num_tokens // self.tile, batch * num_heads, self.tile
        outer, middle, inner = ((batch, num_tokens, num_heads)[axis] for axis in self.axes)
        return outer, middle, inner


class Share(NamedTuple):
    """What one thread does."""

    rows: int  # heads of a token, for which it loads the angles once
    pairs: int  # of each row
    pass_run: int  # or elements of each row that it copies from outside the slice; 0 for none


@lru_cache(maxsize=4096)
def launch_plan(problem: RotaryProblem) -> LaunchPlan:
    """Choose how wide threads read and write, how rows are numbered, and the launch over them."""
    widths, order = _access_widths(problem), _order(problem)
    pass_run = _pass_run(problem)
    pairs = _pairs_per_thread(problem, widths, pass_run)
    num_pair_lanes = problem.rotary_dim // 2 // pairs
    num_lanes = num_pair_lanes
    if pass_run:
        num_lanes += (problem.head_dim - problem.rotary_dim) // pass_run
    if _norm_kind(problem) == TOKEN_NORM:
        share = Share(_rows_of_whole_tokens(problem, pairs, num_lanes), pairs, pass_run)
        num_sets = max(tensor.num_heads for tensor in problem.tensors) // share.rows
        block, grid_y = (num_lanes, num_sets), 1
        tokens = problem.batch * problem.num_tokens
        needed = tuple(tokens if tensor.num_heads else 0 for tensor in problem.tensors)
        blocks, num_periods = _periods(needed, needed)
        limits = 128, 256, 512, _most_threads(problem)
        of_token = next(limit for limit in limits if num_sets * num_lanes <= limit)
    else:
        of_token = 0
        share = Share(_rows_per_thread(problem, pairs, num_lanes, order), pairs, pass_run)
        thread_bytes = share.rows * 2 * pairs * ITEMSIZE[problem.dtype]
        block, grid_y = _block(num_lanes, thread_bytes, whole_rows=problem.norm is not None)
        rows_of_a_block = share.rows * block[1]
        needed = tuple(-(-problem.num_rows_of(t) // rows_of_a_block) for t in problem.tensors)
        blocks, num_periods = _periods(needed, tuple(t.num_heads for t in problem.tensors))
    lanes = num_pair_lanes, num_lanes
    return LaunchPlan(
        kernel=_kernel_name(
            problem, widths, share, order, _span(problem, share, num_lanes), of_token
        ),
        grid=(num_periods * sum(blocks), grid_y),
        block=block,
        to_slice=_to_slice(problem),
        arguments=_pack(problem, widths, share.rows, blocks, order, lanes),
        norm=_pack_norm(problem, widths, share.rows),
        to_weight=_to_weight(problem),
        cache=_pack_cache(problem, order),
        table=struct.pack("<q", problem.table_column) if _has_columns(problem) else b"",
    )


def _norm_kind(problem: RotaryProblem) -> str | None:
    """Return what is normalised as one: a head, all of a token's, or nothing.

    Of a token with one head in every tensor, both are the same.
    """
    if problem.norm is None:
        return None
    one = all(tensor.num_heads == 1 for tensor in problem.tensors[:2])
    return HEAD_NORM if one else problem.norm.norm.kind


def _most_threads(problem: RotaryProblem) -> int:
    """Return how many threads a block that has a whole token may have."""
    return MOST_THREADS // (2 if problem.is_double else 1)


def _rows_of_whole_tokens(problem: RotaryProblem, pairs: int, num_lanes: int) -> int:
    """Return how many heads a thread has, so that a block has all of a token."""
    heads = [tensor.num_heads for tensor in problem.tensors]
    most = _most_threads(problem)
    of_heads = problem.cos.strides[HEAD] or problem.sin.strides[HEAD]
    choices = [
        rows
        for rows in range(1, 2 if of_heads else MOST_ROWS + 1)
        if math.gcd(*heads) % rows == 0 and max(heads) // rows * num_lanes <= most
    ]
    if not choices:
        raise ValueError(
            f"norm='heads' must have tokens that fit a block of {most} threads, of which each has "
            f"up to {MOST_ROWS} heads, got {max(heads)} heads of {num_lanes} threads each, for as "
            "wide an access as all arrays' alignments allow"
        )
    row_bytes = 2 * pairs * ITEMSIZE[problem.dtype]
    light = [rows for rows in choices if rows * row_bytes <= TOKEN_BYTES] or choices[:1]
    wanted = [rows for rows in light if max(heads) // rows * num_lanes <= TOKEN_THREADS]
    return (wanted or light[-1:])[0]


def _span(problem: RotaryProblem, share: Share, num_lanes: int) -> tuple[int, bool]:
    """Return how many threads of a norm add up by shuffles, and whether there are more."""
    counts = [num_lanes]
    if _norm_kind(problem) == TOKEN_NORM:
        counts = [t.num_heads // share.rows * num_lanes for t in problem.tensors[:2]]
    span = math.gcd(WARP, *counts)
    return span, max(counts) > span


class Widths(NamedTuple):
    """How many elements of each array may move in one access."""

    x: tuple[int, ...]  # one for each tensor
    out: tuple[int, ...]
    cos: int
    sin: int
    weights: int


def _access_widths(problem: RotaryProblem) -> Widths:
    x_dtype, table_dtype, offset = problem.dtype, problem.table_dtype, problem.rotary_offset
    column = problem.table_column if _has_columns(problem) else 0
    return Widths(
        x=tuple(_width(tensor.x, x_dtype, 1, offset) for tensor in problem.tensors),
        out=tuple(
            _width(tensor.out, _out_dtype(problem, i), 1, offset)
            for i, tensor in enumerate(problem.tensors)
        ),
        cos=_width(problem.cos, table_dtype, problem.table_step, problem.cos_row, column),
        sin=_width(problem.sin, table_dtype, problem.table_step, problem.sin_row, column),
        weights=_weight_width(problem),
    )


def _has_columns(problem: RotaryProblem) -> bool:
    """Return whether the numbers of a table's matrices lie apart, each in its own place."""
    return problem.table_form == MATRICES and problem.table_step == 1


def _pair_bytes(problem: RotaryProblem) -> int:
    """Return how many bytes of a table a pair owns: of one angle, those beside its cosine."""
    if problem.table_form != ONE_ANGLE:
        return 4 * ITEMSIZE[problem.table_dtype]
    return problem.table_step * ITEMSIZE[problem.table_dtype]


def _out_dtype(problem: RotaryProblem, i: int) -> str:
    return problem.cache.dtype if problem.cache and i else problem.dtype


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


def _pairs_per_thread(problem: RotaryProblem, widths: Widths, pass_run: int) -> int:
    """Return how many pairs of a row a thread rotates: of every half, or run, one access.

    In the half pairing fewer where the lanes that pass elements through have one access each, or
    angles are dear, or what is written has 8 bits. Fewer too where no tensor moves as many elements
    at once, and where two angles a pair, in double, would not leave it enough registers.
    """
    most = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    outs = [width for i, width in enumerate(widths.out) if _out_dtype(problem, i) == problem.dtype]
    widest = min(most, max(*widths.x, *outs))
    mixed = problem.position_kind == MIXED  # for which a thread loads three angles a pair
    one_access = problem.interleaved or pass_run or _has_dear_angles(problem) or mixed
    one_access = one_access or (problem.cache is not None and problem.cache.dtype in FLOATS_8)
    pairs = widest // 2 if one_access else widest
    if problem.table_form != ONE_ANGLE and problem.is_double:
        pairs = min(pairs, 2)
    ends = problem.section_ends if problem.position_kind == SECTIONS else ()
    return math.gcd(max(1, pairs), problem.rotary_dim // 2, *ends)  # all pairs are of one section


def _rows_per_thread(problem: RotaryProblem, pairs: int, num_lanes: int, order: Order) -> int:
    """Return for how many heads of a token a thread loads the angles: of a short row, for two.

    For four where angles are dear. Only where the heads of a token lie
    beside each other and whole rows fill a warp: else neighbouring threads would read far apart.
    """
    row_bytes = 2 * pairs * ITEMSIZE[problem.dtype]
    of_heads = problem.cos.strides[HEAD] or problem.sin.strides[HEAD]
    if of_heads or row_bytes > ACCESS_BYTES or order.axes[2] != HEAD or WARP % min(num_lanes, WARP):
        return 1
    if problem.norm and num_lanes > WARP:  # shared memory holds one sum of a thread
        return 1
    rows = 4 if _has_dear_angles(problem) else 2
    return math.gcd(rows, *(tensor.num_heads for tensor in problem.tensors))


def _has_dear_angles(problem: RotaryProblem) -> bool:
    """Return whether the angles are the most of what a thread loads, or are computed by it."""
    return _pair_bytes(problem) >= ACCESS_BYTES or problem.table_dtype == FREQUENCY


def _pass_run(problem: RotaryProblem) -> int:
    """Return how many elements a thread copies from outside the slice; 0 with nothing to copy."""
    rest = problem.head_dim - problem.rotary_dim
    if not rest or (problem.in_place and not problem.norm):
        return 0
    widest = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    return math.gcd(widest, problem.rotary_offset, problem.rotary_dim, rest)


def _block(num_lanes: int, thread_bytes: int, whole_rows: bool) -> tuple[tuple[int, int], int]:
    """Return the lanes and sets of rows of a block, and the blocks over the lanes of a row."""
    grid_y = 1 if whole_rows else -(-num_lanes // MAX_LANES)
    lanes = -(-num_lanes // grid_y)
    threads = min(max(BLOCK_BYTES // thread_bytes, BLOCK_THREADS[0]), BLOCK_THREADS[-1])
    sets = WARP // math.gcd(WARP, lanes)  # of whole warps
    if lanes * sets > 2 * BLOCK_THREADS[-1]:
        sets = 1
    return (lanes, sets * max(1, threads // (lanes * sets))), grid_y


def _periods(needed: tuple[int, ...], heads: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return how many blocks each tensor has in a period, and how many periods there are.

    In a period the blocks of a tensor are to the other's as its heads are; a launch of few blocks
    is one period, so that none is left without rows.
    """
    blocks = tuple(num_heads // (math.gcd(*heads) or 1) for num_heads in heads)
    if sum(blocks) > min(sum(needed) // 16, 512):
        return tuple(needed), 1
    return blocks, max(-(-num // each) for num, each in zip(needed, blocks, strict=True) if each)


def _kernel_name(
    problem: RotaryProblem,
    widths: Widths,
    share: Share,
    order: Order,
    span: tuple[int, bool],
    of_token: int,
) -> str:
    x_run = share.pairs * (2 if problem.interleaved else 1)
    table_run = share.pairs * problem.table_step
    if problem.table_form == BY_ELEMENT:
        table_run = x_run
    is_common = _is_common(problem, widths, x_run, share.pass_run, table_run)
    # With positions: faster alone, and the same within the noise with attention behind it. Without
    # them it is not: see the results of 2026-11-25 in benchmarks/results.
    has_positions = problem.position_kind not in (IMPLICIT, COUNTED)
    is_light = problem.in_place or problem.cache is not None
    past_l1 = is_common and is_light and has_positions and order.axes[2] == HEAD
    arguments = (
        C_TYPES[problem.dtype],
        C_TYPES[problem.table_dtype],
        _position_type(problem),
        _norm_type(problem, span, of_token),
        _destination_type(problem),
        max(2, len(problem.tensors)),
        _cpp(problem.interleaved),
        _cpp(problem.conjugate),
        _cpp(problem.eager),
        share.rows,
        share.pairs,
        _table_type(problem),
        share.pass_run,
        _cpp(problem.in_place),
        _cpp(past_l1),
        _cpp(is_common),
    )
    return f"rotary_kernel<{', '.join(map(str, arguments))}>"


def _position_type(problem: RotaryProblem) -> str:
    index, kind = C_TYPES[problem.position_dtype], problem.position_kind
    if kind in (IMPLICIT, GIVEN):
        return index
    if kind == COUNTED:
        return "Counted"
    if kind == PACKED:
        begins = C_TYPES[problem.cu_dtype]
        return f"Packed<{begins if problem.position_dtype is None else index}, {begins}>"
    return f"{kind.capitalize()}<{index}>"


def _table_type(problem: RotaryProblem) -> str:
    if problem.table_form == BY_ELEMENT:
        return "ByElement"
    if problem.table_form == MATRICES:
        return f"Matrices<{problem.table_step}>"
    return f"OneAngle<{problem.table_step}, {problem.sin_offset}>"


def _norm_type(problem: RotaryProblem, span: tuple[int, bool], of_token: int) -> str:
    if problem.norm is None:
        return "NoNorm"
    threads, shares = span
    roundings = problem.norm.norm.num_roundings
    arguments = C_TYPES[problem.norm.dtype], of_token, threads, _cpp(shares), roundings
    return f"RmsNorm<{', '.join(map(str, arguments))}>"


def _destination_type(problem: RotaryProblem) -> str:
    if problem.cache is None:
        return "Outputs"
    cache = problem.cache
    arguments = cache.slot_dtype, cache.dtype, cache.scale_dtype
    return f"Slots<{', '.join(C_TYPES[dtype] for dtype in arguments)}>"


def _is_common(
    problem: RotaryProblem, widths: Widths, x_run: int, pass_run: int, table_run: int
) -> bool:
    """Return whether the kernel's short cuts hold: see kCommon in kernels/rotary.cu."""
    x_whole = min(max(x_run, pass_run), ACCESS_BYTES // ITEMSIZE[problem.dtype])
    table_whole = min(table_run, ACCESS_BYTES // ITEMSIZE[problem.table_dtype])
    tensors, cos, sin = problem.tensors, problem.cos, problem.sin
    numbers = [
        *cos.strides,
        *(stride for tensor in tensors for stride in (*tensor.x.strides, *tensor.out.strides)),
        *problem.position_strides,
        *(problem.cache.slot_strides if problem.cache else ()),
        problem.num_positions if problem.cos_row else 0,
        problem.cos_row,
    ]
    return (
        min(*widths.x, *widths.out) >= x_whole
        and min(widths.cos, widths.sin) >= table_whole
        and all(t.x.strides == t.out.strides or problem.cache for t in tensors)
        and all(t.x.strides[3] == t.out.strides[3] == 1 for t in tensors)
        and (cos.strides, problem.cos_row) == (sin.strides, problem.sin_row)
        and cos.strides[2:] == (0, problem.table_step)
        and all(abs(number) < 2**31 for number in numbers)
        and (problem.norm is None or _has_common_weights(problem.norm, widths, x_run, pass_run))
    )


def _has_common_weights(norm: NormProblem, widths: Widths, *runs: int) -> bool:
    whole = min(max(runs), ACCESS_BYTES // ITEMSIZE[norm.dtype])
    return widths.weights >= whole and all(stride in (None, 1) for stride in norm.strides)


def _cpp(flag: bool) -> str:
    return "true" if flag else "false"


def _order(problem: RotaryProblem) -> Order:
    """Number rows as they lie in memory, the widest stride first; or by tiles of tokens."""
    strides = problem.tensors[0].x.strides
    sizes = problem.batch, problem.num_tokens, max(t.num_heads for t in problem.tensors)
    outer, middle, inner = sorted(
        range(3), key=lambda axis: (sizes[axis] != 1, -abs(strides[axis]))
    )
    if _norm_kind(problem) == TOKEN_NORM:
        outer, middle, inner = (*(axis for axis in (outer, middle, inner) if axis != HEAD), HEAD)
    return Order((outer, middle, inner), _tile(problem) if inner == TOKEN else 0)


def _tile(problem: RotaryProblem) -> int:
    """Return how many tokens at a time all heads should pass, 0 for all of them.

    Where a head's tokens lie beside each other, every head reads the whole table: a large one would
    come from memory every time, and a tile of it stays in the L2. Only where a batch's heads follow
    on those of the batch before, and have the same angles, so that both count as heads.
    """
    is_whole = problem.sin_offset or problem.table_form != ONE_ANGLE
    row_bytes = problem.rotary_dim // 2 * _pair_bytes(problem) * (1 if is_whole else 2)
    is_small = problem.num_tokens < 2 or problem.num_tokens * row_bytes <= L2_BYTES
    if is_small or problem.table_dtype == FREQUENCY:
        return 0
    by_token = _strides_by_token(problem)
    views = [
        (tensor.num_heads, strides)
        for i, tensor in enumerate(problem.tensors)
        for strides in (tensor.x.strides, _out_strides(problem, i))
    ]
    follow_on = problem.batch == 1 or (
        all(strides[BATCH] == num_heads * strides[HEAD] for num_heads, strides in views)
        and not any(strides[BATCH] for strides in by_token)
    )
    if not follow_on or any(each[HEAD] for each in by_token):
        return 0
    widest = max(abs(strides[TOKEN]) for strides in (*by_token, *(each[1] for each in views)))
    in_32_bits = (2**31 - 1) // max(1, widest)  # tokens, so that offsets within a tile fit
    most = min(TILE_BYTES // row_bytes, in_32_bits)
    tiles = range(most, MIN_TILE - 1, -1)
    return next((tile for tile in tiles if problem.num_tokens % tile == 0), 0)


def _strides_by_token(problem: RotaryProblem) -> list[tuple[int, ...]]:
    """Return the strides over batch, token and head of every array but tensors, read by token."""
    pairs = [problem.position_strides, *([problem.cache.slot_strides] if problem.cache else [])]
    return [problem.cos.strides, problem.sin.strides, *((*pair, 0) for pair in pairs)]


def _out_strides(problem: RotaryProblem, i: int) -> tuple[int, ...]:
    """Return the strides by which a tensor is written; the kernel finds a slot's place itself."""
    strides = problem.tensors[i].out.strides
    return (0, 0, strides[HEAD]) if problem.cache and i else strides


def divisor(value: int) -> tuple[int, int, int]:
    """Return value, multiplier, shift: n // value == (2 n * multiplier >> 32) >> shift, n < 2^31.

    Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
    """
    shift = (value - 1).bit_length()
    return value, (1 << 31 + shift) // value + 1, shift


def _to_slice(problem: RotaryProblem) -> tuple[tuple[int, int], ...]:
    def to_slice(tensor: RotaryTensor, i: int) -> tuple[int, int]:
        views = (tensor.x, problem.dtype), (tensor.out, _out_dtype(problem, i))
        to_x, to_out = (
            (tensor.start * view.strides[HEAD] + problem.rotary_offset * view.strides[3])
            * ITEMSIZE[dtype]
            for view, dtype in views
        )
        return to_x, to_out

    tensors = problem.tensors if len(problem.tensors) > 1 else problem.tensors * 2
    return tuple(to_slice(tensor, i) for i, tensor in enumerate(tensors))


def _to_weight(problem: RotaryProblem) -> tuple[int, int]:
    if problem.norm is None:
        return 0, 0
    q, k = (problem.rotary_offset * (stride or 0) for stride in problem.norm.strides)
    return q * ITEMSIZE[problem.norm.dtype], k * ITEMSIZE[problem.norm.dtype]


def _pack(
    problem: RotaryProblem,
    widths: Widths,
    rows: int,
    blocks: tuple[int, ...],
    order: Order,
    lanes: tuple[int, int],
) -> bytes:
    def view(strides: tuple[int, ...], element: int, width: int) -> list[int]:
        return [*order.strides(strides), element, width]

    def table(part: View, width: int) -> list[int]:
        return view(part.strides, part.strides[3] // problem.table_step, width)

    num_pair_lanes, num_lanes = lanes
    words = [*divisor(sum(blocks)), num_lanes, problem.rotary_dim // 2]
    words += table(problem.cos, widths.cos)
    words += view((*problem.position_strides, 0), 0, 0)
    words += [problem.num_positions, problem.cos_row]
    for which in range(max(2, len(problem.tensors))):
        # A launch of one tensor fills the second place with the first, which no block asks for.
        which %= len(problem.tensors)
        tensor = problem.tensors[which]
        num_sets = tensor.num_heads // rows
        outer, middle, inner = order.sizes(problem.batch, problem.num_tokens, num_sets)
        words += [blocks[which], outer * middle * inner]
        words += [*divisor(max(1, inner)), *divisor(max(1, middle))]
        x, out = tensor.x.strides, _out_strides(problem, which)
        words += [*view(x, x[3], widths.x[which]), num_sets * x[HEAD]]
        words += [*view(out, tensor.out.strides[3], widths.out[which]), num_sets * out[HEAD]]
    words += table(problem.sin, widths.sin)
    words += [problem.sin_row, problem.keep, problem.rotary_offset, num_pair_lanes]
    words += view((0, 1, 0), 0, 0)  # the numbers of tokens
    words += [problem.position_axis, *problem.section_ends]
    words += [problem.num_sequences, problem.cu_stride]
    return struct.pack(f"<{len(words)}q", *words)


def _pack_norm(problem: RotaryProblem, widths: Widths, rows: int) -> bytes | None:
    if problem.norm is None:
        return None
    norm, of_token = problem.norm, _norm_kind(problem) == TOKEN_NORM
    tensors = (problem.tensors * 2)[:2]
    words = []
    for tensor, stride in zip(tensors, (stride or 0 for stride in norm.strides), strict=True):
        head = problem.head_dim * stride if of_token else 0
        words += [head, tensor.num_heads // rows * head, stride, widths.weights]
    counts = [problem.head_dim * (t.num_heads if of_token else 1) for t in tensors]
    numbers = [*(1 / count if count else 0.0 for count in counts)]
    numbers += [norm.norm.eps, norm.norm.weight_offset]
    number = "d" if problem.is_double else "f4x"
    return struct.pack("<8q" + len(numbers) * number, *words, *numbers)


def _pack_cache(problem: RotaryProblem, order: Order) -> bytes | None:
    cache = problem.cache
    if cache is None:
        return None
    words = [*order.strides((*cache.slot_strides, 0)), 0, 0]
    words += [cache.num_blocks * cache.block_size, *divisor(max(1, cache.block_size))]
    outs = [tensor.out.strides for tensor in problem.tensors[1:]]
    words += [*(strides[0] for strides in outs), *(strides[1] for strides in outs)]
    return struct.pack(f"<{len(words)}q" + 2 * "f4x", *words, *cache.scales)
