"""From the arrays and options of a call to the problem that it poses. Pure, cached."""

from __future__ import annotations

from functools import lru_cache

from ..memory import ArraySpec
from ..options import Options
from .arrays import check_alignment, check_device, output_names
from .axes import input_views, output_views, tensors_of
from .cache import cache_problem
from .norm import norm_problem
from .positions import position_kind, position_strides, section_ends
from .records import (
    FREQUENCY,
    IMPLICIT,
    MATRICES,
    NO_TABLE,
    OF_AXES,
    OF_POSITIONS,
    PACKED,
    TOKEN_INDEX,
    RotaryProblem,
    TableSpec,
)
from .table import check_rotary_dim, check_table, table_view


@lru_cache(maxsize=4096)
def rotary_problem(
    names: tuple[str, ...],
    xs: tuple[ArraySpec, ...],
    outs: tuple[ArraySpec, ...],
    in_place: bool,
    table: TableSpec,
    extra_arrays: tuple[tuple[str, ArraySpec], ...],
    options: Options,
) -> RotaryProblem:
    """Check that arrays which have passed `check_inputs` fit the others; return their problem.

    `names` are the caller's names of the inputs. `extra_arrays` are the other arrays by their
    names: positions, offsets, weights, slots and scales.
    """
    first = xs[0]
    views = input_views(names, xs, options)
    batch, num_tokens, _, head_dim = views[0].shape
    out_views = output_views(names, xs, outs, views, options)
    written = outs[: len(xs)], out_views[: len(xs)]
    tensors = tensors_of(names[0], (xs, views), written, in_place, options.packed)
    num_heads = tuple(tensor.num_heads for tensor in tensors)
    rotary_dim = check_rotary_dim(table, head_dim, options.rotary_offset)
    if table.form != NO_TABLE:
        check_device("table", table.cos, names[0], first)
    given = dict(extra_arrays)
    of_positions = {name: array for name, array in extra_arrays if name in OF_POSITIONS}
    check_table(table, batch, num_tokens, num_heads, of_positions)
    of_outs = output_names(names, options, len(outs))
    named = [*zip(names, xs, strict=True), *zip(of_outs, outs, strict=True)]
    named += extra_arrays
    if table.form != NO_TABLE:
        named += [("table", table.cos), ("table", table.sin)]
    kind = position_kind(of_positions, batch, num_tokens, rotary_dim // 2, options)
    if kind == IMPLICIT and table.cos.dtype == FREQUENCY:
        kind = TOKEN_INDEX
    for name, array in extra_arrays:
        check_device(name, array, names[0], first)
    norm = norm_problem(given, num_heads, head_dim, options, rotates=rotary_dim > 0)
    cache = cache_problem(given, first.dtype, (batch, num_tokens), outs, out_views, options)
    for name, array in named:
        check_alignment(name, array)
    by_position = kind != IMPLICIT
    sin = table.cos if table.cos.dtype == FREQUENCY else table.sin
    positions = given.get("positions", given.get("seqlen_offsets"))
    cu_seqlens = given.get("cu_seqlens")
    return RotaryProblem(
        dtype=first.dtype,
        batch=batch,
        num_tokens=num_tokens,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rotary_offset=options.rotary_offset,
        tensors=tensors,
        in_place=in_place,
        table_dtype=table.cos.dtype,
        cos=table_view(table.cos, table.form, by_position),
        sin=table_view(sin, table.form, by_position),
        table_form=table.form,
        table_step=table.step,
        sin_offset=table.sin_offset,
        table_heads=table.shape[2] if len(table.shape) == 4 else 1,
        table_column=table.cos.strides[-1] if table.form == MATRICES else 0,
        num_positions=table.cos.shape[0] if by_position else 1,
        cos_row=table.cos.strides[0] if by_position else 0,
        sin_row=sin.strides[0] if by_position else 0,
        position_kind=kind,
        position_dtype=positions.dtype if positions else None,
        cu_dtype=cu_seqlens.dtype if cu_seqlens else None,
        position_strides=position_strides(kind, positions),
        position_axis=positions.strides[0] if kind in (PACKED, *OF_AXES) and positions else 0,
        section_ends=section_ends(options),
        num_sequences=cu_seqlens.shape[0] - 1 if cu_seqlens else 0,
        cu_stride=cu_seqlens.strides[0] if cu_seqlens else 0,
        interleaved=bool(options.interleaved),
        conjugate=options.conjugate,
        keep_out_of_range=options.out_of_range == "keep",
        eager=options.rounding == "eager",
        norm=norm,
        cache=cache,
    )
