"""The kernel's argument of a problem, from how its rows are shared out among threads. Pure."""

from __future__ import annotations

from typing import NamedTuple

from . import arguments
from .access import Widths
from .arguments import Distance, Double, Patched, Single, divisor
from .choices import LAYER_NORM, TOKEN_NORM
from .memory import ITEMSIZE
from .problem import RotaryProblem, View
from .row_order import HEAD, RowOrder, out_strides


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


class Member(NamedTuple):
    """A problem, and how its rows are shared out."""

    problem: RotaryProblem
    widths: Widths
    order: RowOrder
    work: ThreadWork
    launch: Launch


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


def arguments_of(member: Member, num_tensors: int) -> arguments.Arguments:
    """Return what a launch is given, with places for a number of tensors."""
    problem, widths, order, work, _ = member
    return arguments.Arguments(
        tensors_and_table=_tensors_and_table(member, num_tensors),
        norm=_norm_arguments(problem, widths, work),
        biases=_bias_arguments(problem, widths),
        slots=_slots_arguments(problem, order),
        k=_k_arguments(problem, widths, order, work),
        form=arguments.MatricesArguments(problem.table_column) if problem.has_columns else None,
    )


def _tensors_and_table(member: Member, num_tensors: int) -> arguments.TensorsAndTable:
    problem, widths, order, _, launch = member

    def of_tokens(batch: int, token: int) -> arguments.View:
        return arguments.View(*order.strides((batch, token, 0)), element=0, width=0)

    def of_table(part: View, width: int) -> arguments.View:
        element = part.strides[3] // problem.table_step
        return arguments.View(*order.strides(part.strides), element, width)

    # A launch of fewer tensors fills the other places with the first ones; no block asks for them.
    places = [i % len(problem.tensors) for i in range(num_tensors)]
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
        tensors=tuple(_tensor(member, i) for i in places),
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
        head_axis=order.axes.index(HEAD),
        table_heads=tuple(divisor(_heads_of_one(problem, i)) for i in places),
    )


def _heads_of_one(problem: RotaryProblem, i: int) -> int:
    """Return how many heads of a tensor have the angles of one head of the table."""
    if problem.table_heads == 1:
        return 1
    return max(1, problem.heads_of_one(i) // problem.table_heads)


def _tensor(member: Member, i: int) -> arguments.Tensor:
    problem, widths, order, work, launch = member
    tensor = problem.tensors[i]
    num_row_groups = tensor.num_heads // work.rows  # of a token
    outer, middle, inner = order.sizes(problem.batch, problem.num_tokens, num_row_groups)
    x, out = tensor.x.strides, out_strides(problem, i)
    x_step: int | Distance = num_row_groups * x[HEAD]
    out_step: int | Distance = num_row_groups * out[HEAD]
    if problem.of_two:
        x_step, out_step = (
            Distance(f"{of}0", f"{of}1", ITEMSIZE[problem.dtype]) for of in ("x", "out")
        )
    return arguments.Tensor(
        blocks=launch.blocks[i],
        num_row_groups=outer * middle * inner,
        inner=divisor(max(1, inner)),
        middle=divisor(max(1, middle)),
        x=arguments.View(*order.strides(x), x[3], widths.x[i]),
        x_step=x_step,
        out=arguments.View(*order.strides(out), tensor.out.strides[3], widths.out[i]),
        out_step=out_step,
    )


def _norm_arguments(
    problem: RotaryProblem, widths: Widths, work: ThreadWork
) -> arguments.RmsNormArguments | None:
    if problem.norm is None:
        return None
    norm, per_token = problem.norm, problem.norm_kind == TOKEN_NORM
    real = Double if problem.is_double else Single

    def of_tensor(i: int) -> tuple[arguments.Weights, float, Patched]:
        num_heads, stride = problem.heads_of_one(i % len(problem.tensors)), norm.strides[i] or 0
        head = problem.head_dim * stride if per_token else 0
        step: int | Distance = num_heads // work.rows * head
        if problem.of_two and stride:
            step = Distance("q_weight", "k_weight", ITEMSIZE[norm.dtype])
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


def _bias_arguments(problem: RotaryProblem, widths: Widths) -> arguments.BiasArguments | None:
    norm = problem.norm
    if norm is None or norm.norm.kind != LAYER_NORM:
        return None

    def of_biases(name: str, stride: int) -> tuple[arguments.Weights, Patched]:
        start = problem.rotary_offset * stride * ITEMSIZE[norm.dtype]
        return arguments.Weights(0, 0, stride, widths.weights), Patched(name, start)

    (q_layout, q_bias), (k_layout, k_bias) = (
        of_biases(name, stride or 0)
        for name, stride in zip(("q_bias", "k_bias"), norm.strides[2:], strict=True)
    )
    return arguments.BiasArguments(bias_layout=(q_layout, k_layout), biases=(q_bias, k_bias))


def _slots_arguments(problem: RotaryProblem, order: RowOrder) -> arguments.SlotsArguments | None:
    cache = problem.cache
    if cache is None:
        return None
    k, v = (tensor.out.strides for tensor in problem.tensors[1:])
    k_scale, v_scale = map(Single, cache.scales)
    return arguments.SlotsArguments(
        slot=arguments.View(*order.strides((*cache.slot_strides, 0)), element=0, width=0),
        num_slots=cache.num_blocks * cache.block_size,
        end_of_slots=min(cache.num_tokens * max(1, cache.slot_strides[1]), 2**63 - 1)
        if cache.num_tokens < problem.num_tokens
        else 2**63 - 1,
        block_size=divisor(max(1, cache.block_size)),
        block=(k[0], v[0]),
        place=(k[1], v[1]),
        scale=(k_scale, v_scale),
    )


def _k_arguments(
    problem: RotaryProblem, widths: Widths, order: RowOrder, work: ThreadWork
) -> arguments.KArguments | None:
    if problem.k_out is None:
        return None
    strides = problem.k_out.strides
    return arguments.KArguments(
        k_out=arguments.View(*order.strides(strides), strides[3], widths.out[-1]),
        k_step=problem.tensors[1].num_heads // work.rows * strides[HEAD],
        k_data=Patched("k_out", problem.rotary_offset * strides[3] * ITEMSIZE[problem.dtype]),
    )
