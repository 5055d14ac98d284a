"""From the arrays of a call to a launch: checked the first time, repeated by addresses after that.

A call is known by what its arrays look like at a glance (dtypes, shapes, strides, alignment, flags)
and by its options. What has been seen before has been checked, but for what depends on addresses:
overlaps, and the positions that an int starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from operator import eq, is_
from typing import Any, NamedTuple

from . import cpu, jit, tensor
from .checks import index
from .memory import ACCESS_BYTES, ITEMSIZE, ArraySpec, cuda_index, overlap
from .plan import LaunchPlan, launch_plan
from .problem import (
    Options,
    Pointers,
    RotaryProblem,
    TableSpec,
    check_inputs,
    implicit_position,
    out_names,
    rotary_problem,
)
from .tables import TableSource, TableView, source_of


class _Given(NamedTuple):
    """What a call is given."""

    names: tuple[str, ...]  # of the xs
    xs: tuple[Any, ...]
    table: TableSource
    positions: tuple[Any, ...]  # the array of them, if it is one
    first: int | None  # the first of them, where they are an int
    options: Options
    out: tuple[Any, ...] | None


class _Place(NamedTuple):
    """An array of a call."""

    name: str
    spec: ArraySpec
    number: int  # of its address, where those of Pointers are counted through


@dataclass(eq=False)
class _Call:
    """A call that has been checked, to be repeated on arrays that differ in nothing but address."""

    problem: RotaryProblem
    launch: tuple[LaunchPlan, int] | None  # and its device, where a GPU has anything to rotate
    table: TableSpec
    to_sin: int  # bytes from the address of the table's last array to that of the first sine
    apart: tuple[tuple[_Place, _Place], ...]  # pairs that must share no memory
    inputs: tuple[tensor.Library, ...]
    outputs: tuple[tensor.Library, ...]


_calls: dict[Any, _Call] = {}  # by what is seen of a call at a glance
MAX_CALLS = 4096


def rotate(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: Any,
    options: Options,
    out: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    """Rotate the xs, which messages call by `names`; return `out`, or new arrays of their kind."""
    rows: tuple[Any, ...] = ()
    first = None
    if tensor.is_array(positions):
        rows = (positions,)
    elif positions is not None:
        first = index("positions", positions, "None, an int or an int32 or int64 array")
    given = _Given(names, xs, source_of(table), rows, first, options, out)
    in_place = out is not None and all(map(is_, xs, out))
    seen = tensor.glance((*xs, *given.table.arrays, *rows, *(() if in_place else out or ())))
    if seen is None:
        return _rotate_unseen(given)[1]
    at, looks = seen
    if in_place:
        at += at[: len(xs)]
    same = None if out is None else tuple(map(eq, at, at[-len(xs) :]))
    key = names, given.table.form, len(rows), options, in_place, same, looks
    call = _calls.get(key)
    if call is not None:
        return _rotate_again(call, given, at)
    call, outs = _rotate_unseen(given)
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = call
    return outs


def _rotate_again(call: _Call, given: _Given, at: tuple[int, ...]) -> tuple[Any, ...]:
    """Rotate arrays at these addresses by a call that has been checked."""
    num, outs = len(given.xs), given.out
    if outs is None:
        outs = tuple(
            library.empty_like(x) for library, x in zip(call.inputs, given.xs, strict=True)
        )
        seen = tensor.glance(outs)
        if seen is None or any(address % ACCESS_BYTES for address in seen[0]):
            return _rotate_unseen(given)[1]
        at += seen[0]
    table = at[num : num + len(given.table.arrays)]
    _run(
        call,
        Pointers(
            x=at[:num],
            out=at[-num:],
            cos=table[0],
            sin=table[-1] + call.to_sin,
            positions=at[-num - 1] if given.positions else 0,
        ),
        given.first,
    )
    if given.out is not None:
        for library, y in zip(call.outputs, outs, strict=True):
            library.wrote(y)
    return outs


def _rotate_unseen(given: _Given) -> tuple[_Call, tuple[Any, ...]]:
    """Check everything, rotate, and return the call that has been checked and the outputs."""
    # A given output says on which stream the inputs must be ready.
    outputs = _describe(out_names(given.names), given.out or ())
    stream = tensor.stream_of(outputs[0]) if outputs else None
    inputs = _describe(given.names, given.xs, stream)
    check_inputs(given.names, tuple(array.spec for array in inputs))
    table = given.table.view(stream)
    positions = _describe(("positions",), given.positions, stream)
    outs = given.out
    if outs is None:
        outs = tuple(array.library.empty_like(x) for array, x in zip(inputs, given.xs, strict=True))
        outputs = _describe(out_names(given.names), outs)
    call = _checked(given, inputs, outputs, table, positions)
    _run(
        call,
        Pointers(
            x=tuple(array.pointer for array in inputs),
            out=tuple(array.pointer for array in outputs),
            cos=table.pointers[0],
            sin=table.pointers[1],
            positions=positions[0].pointer if positions else 0,
        ),
        given.first,
    )
    if given.out is None:
        return call, tuple(
            array.library.result(y, x) for array, y, x in zip(inputs, outs, given.xs, strict=True)
        )
    for array, y in zip(outputs, outs, strict=True):
        array.library.wrote(y)
    return call, outs


def _describe(
    names: tuple[str, ...], arrays: tuple[Any, ...], stream: int | None = None
) -> tuple[tensor.Array, ...]:
    pairs = zip(names, arrays, strict=False)  # no arrays where none are given
    return tuple(tensor.describe(name, array, stream) for name, array in pairs)


def _checked(
    given: _Given,
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    table: TableView,
    positions: tuple[tensor.Array, ...],
) -> _Call:
    """Check all that does not depend on addresses."""
    names = given.names
    spec = table.specs[given.options.interleaved]
    same = tuple(map(_same, inputs, outputs))
    problem = rotary_problem(
        names,
        tuple(array.spec for array in inputs),
        tuple(array.spec for array in outputs),
        all(same),
        spec,
        positions[0].spec if positions else None,
        given.options,
    )
    for name, array in zip(names + out_names(names), inputs + outputs, strict=True):
        tensor.check_gradient(name, array.requires_grad)
    tensor.check_gradient("table", table.requires_grad)
    device = inputs[0].spec.device
    is_launched = device != "cpu" and problem.num_rows
    return _Call(
        problem=problem,
        launch=(launch_plan(problem), cuda_index(device)) if is_launched else None,
        table=spec,
        to_sin=table.pointers[1] - table.arrays[-1].pointer,
        apart=_must_be_apart(names, inputs, outputs, same, spec, positions) if given.out else (),
        inputs=tuple(array.library for array in inputs),
        outputs=tuple(array.library for array in outputs),
    )


def _same(x: tensor.Array, y: tensor.Array) -> bool:
    """Return whether y is x: the same elements at the same addresses."""
    return x.pointer == y.pointer and x.spec[:4] == y.spec[:4]


def _must_be_apart(
    names: tuple[str, ...],
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    same: tuple[bool, ...],
    table: TableSpec,
    positions: tuple[tensor.Array, ...],
) -> tuple[tuple[_Place, _Place], ...]:
    """Return which arrays may not overlap: an output with all others, but in place with its x."""
    arrays = [
        *((name, x.spec) for name, x in zip(names, inputs, strict=True)),
        *((name, y.spec) for name, y in zip(out_names(names), outputs, strict=True)),
        ("table", table.cos),
        ("table", table.sin),
        *(("positions", array.spec) for array in positions),
    ]
    places = [_Place(*array, number) for number, array in enumerate(arrays)]
    num = len(names)
    return tuple(
        (places[y], places[other])
        for y in range(num, 2 * num)
        for other in (*range(y), *range(2 * num, len(places)))
        if not (same[y - num] and other == y - num)
    )


def _run(call: _Call, pointers: Pointers, first: int | None) -> None:
    """Check what depends on addresses, then write the outputs."""
    arguments = _arguments(call, pointers, first)
    if call.launch:
        plan, device = call.launch
        jit.launch(plan, arguments, device, call.outputs[0].stream(device))
    elif call.problem.num_rows:
        cpu.rotate(call.problem, arguments)


@lru_cache(maxsize=4096)
def _arguments(call: _Call, pointers: Pointers, first: int | None) -> Any:
    """Return what to launch with, or refuse arrays that overlap and positions beside the table."""
    row = 0
    if call.problem.position_dtype is None:
        row = implicit_position(first, call.table, call.problem.num_tokens)
    at = (*pointers.x, *pointers.out, pointers.cos, pointers.sin, pointers.positions)
    for y, other in call.apart:
        if overlap(y.spec, at[y.number], other.spec, at[other.number]):
            raise ValueError(
                f"{y.name} must be its input or share no memory with {other.name}, got two arrays "
                "that overlap"
            )
    to_cos, to_sin = (row * part.strides[0] * ITEMSIZE[part.dtype] for part in call.table[:2])
    pointers = pointers._replace(cos=pointers.cos + to_cos, sin=pointers.sin + to_sin)
    if call.launch:
        return jit.Arguments(call.launch[0].argument_block(pointers))
    return pointers
