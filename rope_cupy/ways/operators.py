"""Operators that rotate when a graph runs. They record no gradients: see `graphs` for those.

An operator takes tensors, an int, and all else of a call as one text, and has the call of them
again when it runs: a graph may be stored, and run in another process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import torch

from .. import eager
from ..arrays.torch import outline
from ..call import Call, kind_of_text, text_of
from ..options import Cache, Norm, Options, Packed
from ..private_torch import is_schema
from ..problem import INPUT_OF, MAX_TENSORS, OF_POSITIONS
from ..table_forms import TableSource, complex_numbers, complex_pairs

KINDS = Options, Norm, Packed, Cache  # of which a text holds the fields
# What extra arrays are called, but for those that have other names where there is one input.
OF_OTHERS = "slot_mapping", "k_scale", "v_scale"
NUM_XS, NUM_OUTS = MAX_TENSORS, len(INPUT_OF)  # that an operator takes which writes


def arguments_of(call: Call) -> tuple[Any, ...]:
    """Return a call as an operator takes it that runs, behind the tensors that it rotates."""
    form, parts = call.table
    if form is complex_numbers:  # which Inductor gives to no operator that writes
        form, parts = complex_pairs, tuple([torch.view_as_real(part) for part in parts])
    return (
        *(*table_tensors(parts), *extra_tensors(call)),
        text_of(call.kind._replace(form=form)),
    )


def table_tensors(parts: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the arrays of a table as an operator takes them: None where there are fewer."""
    cos, sin = (*parts, None, None)[:2]
    return cos, sin


def extra_tensors(call: Call) -> tuple[Any, ...]:
    """Return the extra arrays and the offset of positions, as an operator takes them."""
    extra = dict(call.extra)
    return (
        *[extra.get(name) for name in OF_POSITIONS],
        call.position_offset,
        *(extra.get("weight", extra.get("q_weight")), extra.get("k_weight")),
        *(extra.get("bias", extra.get("q_bias")), extra.get("k_bias")),
        *[extra.get(name) for name in OF_OTHERS],
    )


def call_of(
    xs: tuple[torch.Tensor, ...], outs: tuple[torch.Tensor, ...] | None, arguments: Sequence[Any]
) -> Call:
    """Return the call that an operator has been given: the inverse of `arguments_of`.

    Numbers of NumPy, which a graph holds as tensors, are ints again.
    """
    cos, sin, positions, offsets, cu_seqlens, offset, *others, text = arguments
    kind, has_positions = kind_of_text(text)
    table = TableSource(kind.form, present((cos, sin)))
    arrays = present((positions, offsets, cu_seqlens, *others))
    call = Call(kind, xs, table, arrays, offset, outs)
    return _with_ints(call) if has_positions else call


def _with_ints(call: Call) -> Call:
    numbers = [array for _, array in call.position_arrays if not array.ndim]
    if not numbers or hasattr(numbers[0], "fake_mode"):
        return call
    offset = sum([int(each) for each in numbers], call.position_offset or 0)
    extra = tuple(
        (name, array) for name, array in call.extra if array.ndim or name not in OF_POSITIONS
    )
    return call.with_extra(extra)._replace(position_offset=offset)


def new(call: Call) -> tuple[torch.Tensor, ...]:
    """Rotate into new tensors by an operator."""
    arguments = arguments_of(call)
    if len(call.xs) == 1:
        return (torch.ops.rope_cupy.rotate_new(*call.xs, *arguments),)
    return tuple(torch.ops.rope_cupy.rotate_qk_new(*call.xs, *arguments))


def of_written(xs: tuple[Any, ...], outs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what is rotated and what is written as an operator takes them that writes."""
    return *(*xs, None, None)[:NUM_XS], *(*outs, None, None, None)[:NUM_OUTS]


def written_of(
    arguments: tuple[Any, ...],
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Return what is rotated, what is written, and what else an operator takes that writes."""
    xs, rest = present(arguments[:NUM_XS]), arguments[NUM_XS:]
    return xs, present(rest[:NUM_OUTS]), rest[NUM_OUTS:]


def present(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return those that are there."""
    return tuple([each for each in tensors if each is not None])


def check_traced(call: Call) -> None:
    """Check a call on the sizes that are traced, but for those that no one knows yet.

    A run checks its own sizes again.
    """
    extra = tuple((name, array) for name, array in call.extra if array.ndim)
    call = call.with_extra(extra)
    table = [("table", part) for part in call.table.arrays]
    outlines = [outline(name, array) for name, array in (*table, *call.named)]
    offset: Any = call.position_offset
    if isinstance(offset, torch.SymInt):  # which is compared as it is now, without a guard
        offset = offset.node.hint
        if offset is None:
            return
    if any(each is None for each in outlines):
        return
    kept = iter(outlines)

    def taken(number: int) -> tuple[Any, ...]:
        return tuple([next(kept) for _ in range(number)])

    form = call.table.form
    table_source = TableSource(form, taken(len(table)))
    xs, arrays = taken(len(call.xs)), taken(len(extra))
    outs = None if call.out is None else taken(len(call.out))
    eager.check(
        call._replace(
            xs=xs, table=table_source, extra_arrays=arrays, position_offset=offset, out=outs
        )
    )


def _run_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return eager.rotate(call_of((x,), None, arguments))[0]  # type: ignore[no-any-return]


def _run_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return eager.rotate(call_of((q, k), None, arguments))


def _run_write(*arguments: Any) -> None:
    eager.rotate(call_of(*written_of(arguments)))


def _fake_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return a tensor like the result, which has no memory yet."""
    check_traced(call_of((x,), None, arguments))
    return torch.empty_like(x)


def _fake_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    check_traced(call_of((q, k), None, arguments))
    return torch.empty_like(q), torch.empty_like(k)


def _fake_write(*arguments: Any) -> None:
    check_traced(call_of(*written_of(arguments)))


def placed(bases: tuple[torch.Tensor, ...], places: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Return the views of bases that places tell: see `graphs`."""
    views, end = [], 0
    for base in bases:
        begin, end = end + 1, end + 2 * places[end] + 2
        middle = (begin + end - 1) // 2
        sizes, strides, offset = places[begin:middle], places[middle : end - 1], places[end - 1]
        views.append(base.as_strided(sizes, strides, base.storage_offset() + offset))
    return tuple(views)


def _written_places(arguments: tuple[Any, ...]) -> Call:
    xs, bases, others = written_of(arguments)
    return call_of(xs, placed(bases, others[-1]), others[:-1])


def _run_places(*arguments: Any) -> None:
    eager.rotate(_written_places(arguments))


def _fake_places(*arguments: Any) -> None:
    check_traced(_written_places(arguments))


def schemas(behind: str) -> tuple[str, str, str]:
    """Return the schemas of what makes one tensor, or two, and of what writes up to four."""
    outs = "Tensor(a!) out, Tensor(b!)? second, Tensor(c!)? third, Tensor(d!)? fourth"
    return (
        f"(Tensor x, {behind}) -> Tensor",
        f"(Tensor q, Tensor k, {behind}) -> (Tensor, Tensor)",
        f"(Tensor x, Tensor? k, Tensor? v, {outs}, {behind}) -> ()",
    )


# Operators are PyTorch's, and so of the process: they outlive a module that is imported again (by
# `importlib.reload`, say), and then call the functions of the new one.

_TABLE = "Tensor? cos, Tensor? sin"
_ARRAYS = (
    "Tensor? positions, Tensor? seqlen_offsets, Tensor? cu_seqlens, SymInt? position_offset, "
    "Tensor? weight, Tensor? k_weight, Tensor? bias, Tensor? k_bias, Tensor? slot_mapping, "
    "Tensor? k_scale, Tensor? v_scale"
)
_NEW, _NEW_QK, _WRITES = schemas(f"{_TABLE}, {_ARRAYS}, str kind")
_PLACES = schemas(f"{_TABLE}, {_ARRAYS}, str kind, SymInt[] places")[-1]
# What these operators take. PyTorch keeps graphs on the disk by the operators of `graphs`, which
# have this for an argument: those that were stored by another version are not run.
VERSION = f"{crc32(repr((_WRITES, *[kind._fields for kind in KINDS])).encode()):08x}"
RUN, FAKE, VMAP = "CompositeExplicitAutograd", "fake", "vmap"


def define(module: str, name: str, schema: str, functions: dict[str, str]) -> None:
    """Define an operator by the names of functions of a module, and what PyTorch calls them for."""
    whole_name = f"rope_cupy::{name}"
    if hasattr(torch.ops.rope_cupy, name):
        known = getattr(torch.ops.rope_cupy, name).default._schema
        if not is_schema(known, whole_name + schema):
            raise ImportError(
                "rope_cupy.torch must be imported in a new process after another version of it, "
                f"whose operator {whole_name} takes other arguments"
            )
        return
    torch.library.define(whole_name, schema)
    for key, function in functions.items():
        call = _by_name(module, function)
        if key == FAKE:
            torch.library.register_fake(whole_name, call)
        elif key == VMAP:
            torch.library.register_vmap(whole_name, call)
        else:
            torch.library.impl(whole_name, key, call)


def _by_name(module: str, function: str) -> Callable[..., Any]:
    """Return what calls a function of a module as it is then."""

    def call(*arguments: Any) -> Any:
        return getattr(sys.modules[module], function)(*arguments)

    return call


define(__name__, "rotate_new", _NEW, {RUN: "_run_new", FAKE: "_fake_new"})
define(__name__, "rotate_qk_new", _NEW_QK, {RUN: "_run_qk_new", FAKE: "_fake_qk_new"})
define(__name__, "write_into", _WRITES, {RUN: "_run_write", FAKE: "_fake_write"})
define(__name__, "write_into_places", _PLACES, {RUN: "_run_places", FAKE: "_fake_places"})
