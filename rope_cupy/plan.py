"""LaunchPlan: the kernel, the launch and the argument block of a RotaryProblem. Pure, cached."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from . import arguments
from .access import Widths, access_widths
from .arguments import ArgumentPacker, argument_packer
from .choices import LAYER_NORM, TOKEN_NORM
from .launch_arguments import Launch, Member, ThreadWork, arguments_of
from .memory import ACCESS_BYTES, FLOATS_8, ITEMSIZE
from .problem import (
    BY_ELEMENT,
    FREQUENCY,
    IMPLICIT,
    INTERLEAVED_MROPE,
    NO_TABLE,
    ONE_ANGLE,
    SECTIONED_MROPE,
    TOKEN_INDEX,
    NormProblem,
    Pointers,
    RotaryProblem,
    View,
)
from .row_order import HEAD, RowOrder, row_order
from .template import (
    C_TYPES,
    AfterRotation,
    LayerNorm,
    RmsNorm,
    RotaryKernel,
    destination_type,
    form_type,
    position_type,
)

WARP = 32
OF_FORM = (  # what problems have in common whose tables one kernel reads
    *("rotary_dim", "rotary_offset", "table_dtype", "table_form", "table_step", "sin_offset"),
    *("position_kind", "position_dtype", "cu_dtype", "section_ends", "interleaved", "conjugate"),
)
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


@lru_cache(maxsize=4096)
def launch_plan(problem: RotaryProblem) -> LaunchPlan:
    """Choose how wide threads read and write, how rows are numbered, and the launch over them."""
    problem = _as_one_tensor(problem)
    widths, order = access_widths(problem), row_order(problem)
    work = _thread_work(problem, widths, order)
    member = Member(problem, widths, order, work, _launch(problem, work))
    template = _template(member)
    return LaunchPlan(
        template=template,
        kernel=template.name,
        grid=member.launch.grid,
        block=member.launch.block,
        packer=argument_packer(arguments_of(member, template.tensors)),
    )


@lru_cache(maxsize=1024)
def joint_plan(problems: tuple[RotaryProblem, ...]) -> LaunchPlan | None:
    """Plan one launch that solves several problems; None where they need several kernels."""
    alike = _alike(problems)
    planned = [(each, access_widths(each), row_order(each)) for each in alike]
    works = zip(*(_thread_work(*each) for each in planned), strict=True)
    work = ThreadWork(*(math.gcd(*numbers) for numbers in works))
    members = [Member(*each, work, _launch(each[0], work)) for each in planned]
    templates = [_template(member) for member in members]
    is_common = all(template.common for template in templates)
    templates = [
        template._replace(
            tensors=max(template.tensors for template in templates),
            in_place=all(template.in_place for template in templates),
            past_l1=is_common and template.past_l1,
            common=is_common,
            members=len(members),
        )
        for template in templates
    ]
    template, launches = templates[0], [member.launch for member in members]
    shapes = {(launch.block, launch.grid[1]) for launch in launches}
    threads = math.prod(launches[0].block)
    if {*templates} != {template} or len(shapes) > 1 or threads > _most_threads(problems[0]):
        return None
    first_blocks = (0, *accumulate(launch.grid[0] for launch in launches))
    joint = arguments.Joint(
        members=tuple(arguments_of(member, template.tensors) for member in members),
        first_blocks=first_blocks[:-1],
        rotates=tuple(int(problem.table_form != NO_TABLE) for problem in problems),
    )
    return LaunchPlan(
        template=template,
        kernel=template.name,
        grid=(first_blocks[-1], launches[0].grid[1]),
        block=launches[0].block,
        packer=argument_packer(joint),
    )


def _alike(problems: tuple[RotaryProblem, ...]) -> tuple[RotaryProblem, ...]:
    """Return problems of which those without a table, or weights, have the form of other ones'.

    The kernel reads nothing of them then.
    """
    form: dict[str, Any] = {}
    dtype = None
    is_after = any(problem.norm and problem.norm.norm.after for problem in problems)
    for problem in problems:
        if problem.table_form != NO_TABLE and not form:
            form = {name: getattr(problem, name) for name in OF_FORM}
            view = View((0, 0, 0, problem.cos.strides[3]), ACCESS_BYTES)
            form |= {"cos": view, "sin": view, "cos_row": 0, "sin_row": 0}
        if problem.norm and any(stride is not None for stride in problem.norm.strides):
            dtype = dtype or problem.norm.dtype
    alike = []
    for problem in problems:
        if problem.table_form == NO_TABLE:
            problem = problem._replace(**form)
        norm = problem.norm
        if norm and dtype and all(stride is None for stride in norm.strides):
            norm = norm._replace(dtype=dtype)
        if norm and is_after:  # which it is of what is not rotated as well as before it
            norm = norm._replace(norm=norm.norm._replace(after=True))
        alike.append(problem._replace(norm=norm))
    return tuple(alike)


def _as_one_tensor(problem: RotaryProblem) -> RotaryProblem:
    """Return q and k as one tensor where each head has angles of its own, as many as q has numbers.

    A thread then loads the angles of a head once for both. The two must differ in where they lie
    alone, and their sums must be of heads apart, or of tokens.
    """
    norm, by_head = problem.norm, problem.cos.strides[HEAD] != 0
    if not by_head or len(problem.tensors) != 2 or problem.is_double:
        return problem
    if norm and (problem.norm_kind != TOKEN_NORM or norm.norm.after):
        return problem
    q, k = problem.tensors
    strides = [(t.num_heads, t.start, t.x.strides, t.out.strides) for t in problem.tensors]
    if strides[0] != strides[1] or (norm and norm.strides[0] != norm.strides[1]):
        return problem
    both = q._replace(
        num_heads=2 * q.num_heads,
        x=View(q.x.strides, min(q.x.alignment, k.x.alignment)),
        out=View(q.out.strides, min(q.out.alignment, k.out.alignment)),
    )
    return problem._replace(tensors=(both,), of_two=True)


def _thread_work(problem: RotaryProblem, widths: Widths, order: RowOrder) -> ThreadWork:
    """Choose what a thread does."""
    copy_width = _copy_width(problem)
    pairs = _pairs_per_thread(problem, widths, copy_width)
    _, num_lanes = _lanes(problem, pairs, copy_width)
    if problem.norm_kind == TOKEN_NORM:
        rows = _rows_of_whole_tokens(problem, pairs, num_lanes)
    else:
        rows = _rows_per_thread(problem, pairs, num_lanes, order)
    return ThreadWork(rows, pairs, copy_width)


def _lanes(problem: RotaryProblem, pairs: int, copy_width: int) -> tuple[int, int]:
    """Return how many threads rotate a row, and how many it has with those that copy."""
    num_pair_lanes = problem.rotary_dim // 2 // pairs
    copied = (problem.head_dim - problem.rotary_dim) // copy_width if copy_width else 0
    return num_pair_lanes, num_pair_lanes + copied


def _launch(problem: RotaryProblem, work: ThreadWork) -> Launch:
    """Choose the blocks of threads."""
    num_pair_lanes, num_lanes = _lanes(problem, work.pairs, work.copy_width)
    token_threads = 0
    if problem.norm_kind == TOKEN_NORM:
        num_row_groups = max(tensor.num_heads for tensor in problem.tensors) // work.rows
        block, grid_y = (num_lanes, num_row_groups), 1
        tokens = problem.batch * problem.num_tokens
        needed = tuple(tokens if tensor.num_heads else 0 for tensor in problem.tensors)
        blocks, num_periods = _interleaved_blocks(needed, needed)
        limits = 128, 256, 512, _most_threads(problem)
        threads = num_row_groups * num_lanes
        token_threads = next((limit for limit in limits if threads <= limit), threads)
    else:
        thread_bytes = work.rows * 2 * work.pairs * ITEMSIZE[problem.dtype]
        block, grid_y = _block(num_lanes, thread_bytes, whole_rows=problem.norm is not None)
        rows_of_a_block = work.rows * block[1]
        needed = tuple(-(-problem.num_rows_of(t) // rows_of_a_block) for t in problem.tensors)
        blocks, num_periods = _interleaved_blocks(
            needed, tuple(t.num_heads for t in problem.tensors)
        )
    grid = num_periods * sum(blocks), grid_y
    return Launch(num_pair_lanes, num_lanes, grid, block, blocks, token_threads)


def _most_threads(problem: RotaryProblem) -> int:
    """Return how many threads a block that has a whole token may have."""
    return MOST_THREADS // (2 if problem.is_double else 1)


def _rows_of_whole_tokens(problem: RotaryProblem, pairs: int, num_lanes: int) -> int:
    """Return how many heads a thread has, so that a block has all of a token.

    Of two tensors that are one it has a head of each: their tables are of heads.
    """
    heads = [problem.heads_of_one(i) for i in range(len(problem.tensors))]
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
    row_bytes = 2 * pairs * _bytes_held(problem)
    light = [rows for rows in choices if rows * row_bytes <= TOKEN_BYTES] or choices[:1]
    wanted = [rows for rows in light if max(heads) // rows * num_lanes <= TOKEN_THREADS]
    return (wanted or light[-1:])[0] * (2 if problem.of_two else 1)


def _bytes_held(problem: RotaryProblem) -> int:
    """Return how many bytes a thread holds of an element: of what is rotated first, all."""
    norm = problem.norm and problem.norm.norm
    if norm and norm.after and not norm.num_roundings:
        return 8 if problem.is_double else 4
    return ITEMSIZE[problem.dtype]


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
    many elements at once, and where two angles a pair, in double, need too many registers. Without
    a table, no thread rotates any, and pairs say how many elements a thread copies.
    """
    if not problem.rotary_dim:
        return max(1, copy_width // 2)
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
    if _is_heavy(problem):
        pairs = min(pairs, 4)
    ends = problem.section_ends if problem.position_kind == SECTIONED_MROPE else ()
    return math.gcd(max(1, pairs), problem.rotary_dim // 2, *ends)  # all pairs are of one section


def _rows_per_thread(problem: RotaryProblem, pairs: int, num_lanes: int, order: RowOrder) -> int:
    """Return for how many heads of a token a thread loads the angles: for two where rows are short.

    It loads them for four heads where the launch is table-bound. It loads them for one head unless
    the heads of a token are neighbours and whole rows fill a warp: else neighbouring threads would
    read far apart.
    """
    if problem.of_two:
        return 2
    row_bytes = 2 * pairs * ITEMSIZE[problem.dtype]
    of_heads = problem.cos.strides[HEAD] or problem.sin.strides[HEAD]
    if of_heads or row_bytes > ACCESS_BYTES or order.axes[2] != HEAD or WARP % min(num_lanes, WARP):
        return 1
    if problem.norm and num_lanes > WARP:  # shared memory holds one sum of a thread
        return 1
    if _is_heavy(problem):
        return 1
    rows = 4 if _is_table_bound(problem) else 2
    return math.gcd(rows, *(tensor.num_heads for tensor in problem.tensors))


def _is_heavy(problem: RotaryProblem) -> bool:
    """Return whether weights, biases and means, in double, need too many registers."""
    return problem.is_double and problem.norm_kind == LAYER_NORM


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


def _template(member: Member) -> RotaryKernel:
    problem, widths, order, work, launch = member
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


def _norm_type(
    problem: RotaryProblem, work: ThreadWork, launch: Launch
) -> RmsNorm | LayerNorm | AfterRotation | str:
    if problem.norm is None:
        return "NoNorm"
    norm, weight = problem.norm.norm, C_TYPES[problem.norm.dtype]
    how = *_span(problem, work, launch.num_lanes), norm.num_roundings
    policy: RmsNorm | LayerNorm = RmsNorm(weight, launch.token_threads, *how, problem.of_two)
    if norm.kind == LAYER_NORM:
        policy = LayerNorm(weight, *how)
    return AfterRotation(policy) if norm.after else policy


def _is_common(problem: RotaryProblem, widths: Widths, work: ThreadWork) -> bool:
    """Return whether the kernel's short cuts hold: see kCommon in kernels/rotary.cu."""
    x_run = work.pairs * (2 if problem.interleaved else 1)
    by_element = problem.table_form == BY_ELEMENT
    table_run = x_run if by_element else work.pairs * problem.table_step
    x_whole = min(max(x_run, work.copy_width), ACCESS_BYTES // ITEMSIZE[problem.dtype])
    table_whole = min(table_run, ACCESS_BYTES // ITEMSIZE[problem.table_dtype])
    tensors, cos, sin = problem.tensors, problem.cos, problem.sin
    views = [view for tensor in tensors for view in (tensor.x, tensor.out)]
    if problem.k_out:
        views.append(problem.k_out)
    numbers = [
        *cos.strides,
        *(stride for view in views for stride in view.strides),
        *problem.position_strides,
        *(problem.cache.slot_strides if problem.cache else ()),
        problem.num_positions if problem.cos_row else 0,
        problem.cos_row,
    ]
    return (
        min(*widths.x, *widths.out) >= x_whole
        and min(widths.cos, widths.sin) >= table_whole
        and all(t.x.strides == t.out.strides or problem.cache for t in tensors)
        and all(view.strides[3] == 1 for view in views)
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
