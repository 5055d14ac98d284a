"""LaunchPlan: the kernel, the launch and the argument block of a RotaryProblem. Pure, cached."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from . import arguments
from .access import Widths, access_widths
from .arguments import ArgumentPacker, Double, Patched, Single, argument_packer, divisor
from .memory import ACCESS_BYTES, FLOATS_8, ITEMSIZE
from .options import TOKEN_NORM
from .problem import (
    BY_ELEMENT,
    FREQUENCY,
    IMPLICIT,
    INTERLEAVED_MROPE,
    ONE_ANGLE,
    SECTIONED_MROPE,
    TOKEN_INDEX,
    NormProblem,
    Pointers,
    RotaryProblem,
    View,
)
from .row_order import HEAD, RowOrder, out_strides, row_order
from .template import C_TYPES, RmsNorm, RotaryKernel, destination_type, form_type, position_type

WARP = 32
BLOCK_BYTES = 4096  # of x: with less, GPUs cannot start blocks as fast as the memory serves them
BLOCK_THREADS = range(128, 257)  # wanted threads; a block of whole warps may have up to 512
MAX_LANES = 256  # of a block
MOST_THREADS = 1024  # of a block that has a whole token; half as many in double
TOKEN_THREADS = 128  # wanted threads of such a block
TOKEN_BYTES = 128  # of x, at most, that each of its threads then has
MOST_ROWS = 8  # heads of such a thread, at most


class LaunchPlan(NamedTuple):
    """A kernel and its launch. Only what `packer` patches differs between two calls of a plan."""

    template: RotaryKernel
    kernel: str  # its C++ name
    grid: tuple[int, int]
    block: tuple[int, int]  # threads
    packer: ArgumentPacker

    def argument_block(self, pointers: Pointers) -> bytes:
        """Return the kernel's one argument; a launch of one tensor repeats it as the second."""
        return self.packer.pack(pointers)


class ThreadWork(NamedTuple):
    """What one thread does."""

    rows: int  # heads of a token, for which it loads the angles once: a row group
    pairs: int  # of each row
    copy_width: int  # elements of each row that other threads copy from outside the slice; or 0


class Launch(NamedTuple):
    """How a launch is divided."""

    num_pair_lanes: int  # threads of a row that rotate it
    num_lanes: int  # these and the threads behind them, which copy
    grid: tuple[int, int]
    block: tuple[int, int]
    blocks: tuple[int, ...]  # of each tensor, in a period
    token_threads: int  # that a block with a whole token may have; 0 for other blocks


@lru_cache(maxsize=4096)
def launch_plan(problem: RotaryProblem) -> LaunchPlan:
    """Choose how wide threads read and write, how rows are numbered, and the launch over them."""
    widths, order = access_widths(problem), row_order(problem)
    work, launch = _launch(problem, widths, order)
    template = _template(problem, widths, work, order, launch)
    return LaunchPlan(
        template=template,
        kernel=template.name,
        grid=launch.grid,
        block=launch.block,
        packer=argument_packer(_arguments(problem, widths, work, order, launch)),
    )


def _launch(problem: RotaryProblem, widths: Widths, order: RowOrder) -> tuple[ThreadWork, Launch]:
    """Choose what a thread does, and the blocks of threads."""
    copy_width = _copy_width(problem)
    pairs = _pairs_per_thread(problem, widths, copy_width)
    num_lanes = num_pair_lanes = problem.rotary_dim // 2 // pairs
    if copy_width:
        num_lanes += (problem.head_dim - problem.rotary_dim) // copy_width
    if problem.norm_kind == TOKEN_NORM:
        work = ThreadWork(_rows_of_whole_tokens(problem, pairs, num_lanes), pairs, copy_width)
        num_row_groups = max(tensor.num_heads for tensor in problem.tensors) // work.rows
        block, grid_y = (num_lanes, num_row_groups), 1
        tokens = problem.batch * problem.num_tokens
        needed = tuple(tokens if tensor.num_heads else 0 for tensor in problem.tensors)
        blocks, num_periods = _interleaved_blocks(needed, needed)
        limits = 128, 256, 512, _most_threads(problem)
        token_threads = next(limit for limit in limits if num_row_groups * num_lanes <= limit)
    else:
        token_threads = 0
        work = ThreadWork(_rows_per_thread(problem, pairs, num_lanes, order), pairs, copy_width)
        thread_bytes = work.rows * 2 * pairs * ITEMSIZE[problem.dtype]
        block, grid_y = _block(num_lanes, thread_bytes, whole_rows=problem.norm is not None)
        rows_of_a_block = work.rows * block[1]
        needed = tuple(-(-problem.num_rows_of(t) // rows_of_a_block) for t in problem.tensors)
        blocks, num_periods = _interleaved_blocks(
            needed, tuple(t.num_heads for t in problem.tensors)
        )
    grid = num_periods * sum(blocks), grid_y
    return work, Launch(num_pair_lanes, num_lanes, grid, block, blocks, token_threads)


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


def _span(problem: RotaryProblem, work: ThreadWork, num_lanes: int) -> tuple[int, bool]:
    """Return how many threads of a norm add up by shuffles, and whether there are more."""
    counts = [num_lanes]
    if problem.norm_kind == TOKEN_NORM:
        counts = [t.num_heads // work.rows * num_lanes for t in problem.tensors[:2]]
    span = math.gcd(WARP, *counts)
    return span, max(counts) > span


def _pairs_per_thread(problem: RotaryProblem, widths: Widths, copy_width: int) -> int:
    """Return how many pairs of a row a thread rotates: one access of every half, or of every run.

    In the half pairing it rotates half as many where other lanes copy one access each, the launch
    is table-bound, or what is written has 8 bits. It also rotates fewer where no tensor moves as
    many elements at once, and where two angles a pair, in double, need too many registers.
    """
    most = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    outs = [width for i, width in enumerate(widths.out) if problem.out_dtype(i) == problem.dtype]
    widest = min(most, max(*widths.x, *outs))
    # A thread loads three angles a pair where neighbouring pairs belong to different axes.
    has_three_angles = problem.position_kind == INTERLEAVED_MROPE
    one_access = problem.interleaved or copy_width or _is_table_bound(problem) or has_three_angles
    one_access = one_access or (problem.cache is not None and problem.cache.dtype in FLOATS_8)
    pairs = widest // 2 if one_access else widest
    if problem.table_form != ONE_ANGLE and problem.is_double:
        pairs = min(pairs, 2)
    ends = problem.section_ends if problem.position_kind == SECTIONED_MROPE else ()
    return math.gcd(max(1, pairs), problem.rotary_dim // 2, *ends)  # all pairs are of one section


def _rows_per_thread(problem: RotaryProblem, pairs: int, num_lanes: int, order: RowOrder) -> int:
    """Return for how many heads of a token a thread loads the angles: for two where rows are short.

    It loads them for four heads where the launch is table-bound. It loads them for one head unless
    the heads of a token are neighbours and whole rows fill a warp: else neighbouring threads would
    read far apart.
    """
    row_bytes = 2 * pairs * ITEMSIZE[problem.dtype]
    of_heads = problem.cos.strides[HEAD] or problem.sin.strides[HEAD]
    if of_heads or row_bytes > ACCESS_BYTES or order.axes[2] != HEAD or WARP % min(num_lanes, WARP):
        return 1
    if problem.norm and num_lanes > WARP:  # shared memory holds one sum of a thread
        return 1
    rows = 4 if _is_table_bound(problem) else 2
    return math.gcd(rows, *(tensor.num_heads for tensor in problem.tensors))


def _is_table_bound(problem: RotaryProblem) -> bool:
    """Return whether a thread loads more of the table than of a tensor, or computes the angles."""
    return problem.pair_bytes >= ACCESS_BYTES or problem.table_dtype == FREQUENCY


def _copy_width(problem: RotaryProblem) -> int:
    """Return how many elements a thread copies from outside the slice; 0 with nothing to copy."""
    rest = problem.head_dim - problem.rotary_dim
    if not rest or (problem.in_place and not problem.norm):
        return 0
    widest = ACCESS_BYTES // ITEMSIZE[problem.dtype]
    return math.gcd(widest, problem.rotary_offset, problem.rotary_dim, rest)


def _block(num_lanes: int, thread_bytes: int, whole_rows: bool) -> tuple[tuple[int, int], int]:
    """Return the lanes and the row groups of a block, and the blocks over the lanes of a row."""
    grid_y = 1 if whole_rows else -(-num_lanes // MAX_LANES)
    lanes = -(-num_lanes // grid_y)
    threads = min(max(BLOCK_BYTES // thread_bytes, BLOCK_THREADS[0]), BLOCK_THREADS[-1])
    row_groups = WARP // math.gcd(WARP, lanes)  # of whole warps
    if lanes * row_groups > 2 * BLOCK_THREADS[-1]:
        row_groups = 1
    return (lanes, row_groups * max(1, threads // (lanes * row_groups))), grid_y


def _interleaved_blocks(
    needed: tuple[int, ...], heads: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """Return how many blocks each tensor has in a period, and how many periods there are.

    In a period, the numbers of blocks of the tensors have the ratio of their heads. A launch of few
    blocks is one period, so that no block is left without rows.
    """
    blocks = tuple(num_heads // (math.gcd(*heads) or 1) for num_heads in heads)
    if sum(blocks) > min(sum(needed) // 16, 512):
        return tuple(needed), 1
    return blocks, max(-(-num // each) for num, each in zip(needed, blocks, strict=True) if each)


def _template(
    problem: RotaryProblem,
    widths: Widths,
    work: ThreadWork,
    order: RowOrder,
    launch: Launch,
) -> RotaryKernel:
    is_common = _is_common(problem, widths, work)
    # With positions, launches that leave L1 to the table are faster alone, and as fast with
    # attention behind them. Without positions they are not: see benchmarks/results of 2026-11-25.
    has_positions = problem.position_kind not in (IMPLICIT, TOKEN_INDEX)
    is_light = problem.in_place or problem.cache is not None
    return RotaryKernel(
        t=C_TYPES[problem.dtype],
        table=C_TYPES[problem.table_dtype],
        position=position_type(problem),
        norm=_norm_type(problem, work, launch),
        destination=destination_type(problem),
        tensors=max(2, len(problem.tensors)),
        interleaved=problem.interleaved,
        conjugate=problem.conjugate,
        eager=problem.eager,
        rows=work.rows,
        pairs=work.pairs,
        form=form_type(problem),
        copy_width=work.copy_width,
        in_place=problem.in_place,
        past_l1=is_common and is_light and has_positions and order.axes[2] == HEAD,
        common=is_common,
    )


def _norm_type(problem: RotaryProblem, work: ThreadWork, launch: Launch) -> RmsNorm | str:
    if problem.norm is None:
        return "NoNorm"
    span, cross_warp = _span(problem, work, launch.num_lanes)
    return RmsNorm(
        weight=C_TYPES[problem.norm.dtype],
        token_threads=launch.token_threads,
        span=span,
        cross_warp=cross_warp,
        roundings=problem.norm.norm.num_roundings,
    )


def _is_common(problem: RotaryProblem, widths: Widths, work: ThreadWork) -> bool:
    """Return whether the kernel's short cuts hold: see kCommon in kernels/rotary.cu."""
    x_run = work.pairs * (2 if problem.interleaved else 1)
    by_element = problem.table_form == BY_ELEMENT
    table_run = x_run if by_element else work.pairs * problem.table_step
    x_whole = min(max(x_run, work.copy_width), ACCESS_BYTES // ITEMSIZE[problem.dtype])
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
        and (
            problem.norm is None
            or _has_common_weights(problem.norm, widths, x_run, work.copy_width)
        )
    )


def _has_common_weights(norm: NormProblem, widths: Widths, *runs: int) -> bool:
    whole = min(max(runs), ACCESS_BYTES // ITEMSIZE[norm.dtype])
    return widths.weights >= whole and all(stride in (None, 1) for stride in norm.strides)


def _slice_offsets(problem: RotaryProblem, i: int) -> tuple[int, int]:
    """Return the bytes from where x and out of a tensor begin to the rotated slice."""
    tensor = problem.tensors[i]
    views = (tensor.x, problem.dtype), (tensor.out, problem.out_dtype(i))
    x, out = (
        (tensor.start * view.strides[HEAD] + problem.rotary_offset * view.strides[3])
        * ITEMSIZE[dtype]
        for view, dtype in views
    )
    return x, out


def _arguments(
    problem: RotaryProblem, widths: Widths, work: ThreadWork, order: RowOrder, launch: Launch
) -> arguments.Arguments:
    return arguments.Arguments(
        tensors_and_table=_tensors_and_table(problem, widths, work, order, launch),
        norm=_norm_arguments(problem, widths, work),
        destination=_slots_arguments(problem, order),
        form=arguments.MatricesArguments(problem.table_column) if problem.has_columns else None,
    )


def _tensors_and_table(
    problem: RotaryProblem, widths: Widths, work: ThreadWork, order: RowOrder, launch: Launch
) -> arguments.TensorsAndTable:
    def of_tokens(batch: int, token: int) -> arguments.View:
        return arguments.View(*order.strides((batch, token, 0)), element=0, width=0)

    def of_table(part: View, width: int) -> arguments.View:
        element = part.strides[3] // problem.table_step
        return arguments.View(*order.strides(part.strides), element, width)

    # A launch of one tensor fills the second place with the first, which no block asks for.
    places = [i % len(problem.tensors) for i in range(max(2, len(problem.tensors)))]
    offsets = [_slice_offsets(problem, i) for i in places]
    return arguments.TensorsAndTable(
        x=tuple(Patched(f"x{i}", x) for i, (x, _) in enumerate(offsets)),
        out=tuple(Patched(f"out{i}", out) for i, (_, out) in enumerate(offsets)),
        cos_data=Patched("cos"),
        sin_data=Patched("sin"),
        positions=Patched("positions"),
        period=divisor(sum(launch.blocks)),
        num_lanes=launch.num_lanes,
        num_pairs=problem.rotary_dim // 2,
        cos=of_table(problem.cos, widths.cos),
        position=of_tokens(*problem.position_strides),
        num_positions=problem.num_positions,
        cos_row=problem.cos_row,
        tensors=tuple(_tensor(problem, i, widths, work, order, launch) for i in places),
        sin=of_table(problem.sin, widths.sin),
        sin_row=problem.sin_row,
        keep_out_of_range=int(problem.keep_out_of_range),
        rotary_offset=problem.rotary_offset,
        num_pair_lanes=launch.num_pair_lanes,
        token=of_tokens(0, 1),
        position_arguments=arguments.PositionArguments(
            axis=problem.position_axis,
            section_ends=problem.section_ends,
            num_sequences=problem.num_sequences,
            cu_stride=problem.cu_stride,
        ),
    )


def _tensor(
    problem: RotaryProblem,
    i: int,
    widths: Widths,
    work: ThreadWork,
    order: RowOrder,
    launch: Launch,
) -> arguments.Tensor:
    tensor = problem.tensors[i]
    num_row_groups = tensor.num_heads // work.rows  # of a token
    outer, middle, inner = order.sizes(problem.batch, problem.num_tokens, num_row_groups)
    x, out = tensor.x.strides, out_strides(problem, i)
    return arguments.Tensor(
        blocks=launch.blocks[i],
        num_row_groups=outer * middle * inner,
        inner=divisor(max(1, inner)),
        middle=divisor(max(1, middle)),
        x=arguments.View(*order.strides(x), x[3], widths.x[i]),
        x_step=num_row_groups * x[HEAD],
        out=arguments.View(*order.strides(out), tensor.out.strides[3], widths.out[i]),
        out_step=num_row_groups * out[HEAD],
    )


def _norm_arguments(
    problem: RotaryProblem, widths: Widths, work: ThreadWork
) -> arguments.RmsNormArguments | None:
    if problem.norm is None:
        return None
    norm, per_token = problem.norm, problem.norm_kind == TOKEN_NORM
    real = Double if problem.is_double else Single

    def of_tensor(i: int) -> tuple[arguments.Weights, float, Patched]:
        num_heads, stride = (
            problem.tensors[i % len(problem.tensors)].num_heads,
            norm.strides[i] or 0,
        )
        head = problem.head_dim * stride if per_token else 0
        step = num_heads // work.rows * head
        count = problem.head_dim * (num_heads if per_token else 1)
        return (
            arguments.Weights(head, step, stride, widths.weights),
            real(1 / count if count else 0.0),
            Patched(
                ("q_weight", "k_weight")[i], problem.rotary_offset * stride * ITEMSIZE[norm.dtype]
            ),
        )

    (q_layout, q_inverse, q_weight), (k_layout, k_inverse, k_weight) = map(of_tensor, range(2))
    return arguments.RmsNormArguments(
        layout=(q_layout, k_layout),
        inverse_count=(q_inverse, k_inverse),
        eps=real(norm.norm.eps),
        weight_offset=real(norm.norm.weight_offset),
        weights=(q_weight, k_weight),
    )


def _slots_arguments(problem: RotaryProblem, order: RowOrder) -> arguments.SlotsArguments | None:
    cache = problem.cache
    if cache is None:
        return None
    k, v = (tensor.out.strides for tensor in problem.tensors[1:])
    k_scale, v_scale = map(Single, cache.scales)
    return arguments.SlotsArguments(
        slot=arguments.View(*order.strides((*cache.slot_strides, 0)), element=0, width=0),
        num_slots=cache.num_blocks * cache.block_size,
        block_size=divisor(max(1, cache.block_size)),
        block=(k[0], v[0]),
        place=(k[1], v[1]),
        scale=(k_scale, v_scale),
    )
