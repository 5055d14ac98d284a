"""Calls whose results lie behind one another: in a graph, and where gradients are recorded.

In a graph they are one operator, as calls on arrays in memory are one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any

import torch

from .. import eager, joined, joint, together
from ..arrays import asked_of, memory_order
from ..call import Call, kind_of_text, text_of
from ..options import QKV, WITHOUT_TABLE
from ..table_forms import TableSource, no_table
from . import autograd, graphs
from .graphs import refuse_vmap  # noqa: F401, which an operator below names
from .operators import (
    FAKE,
    RUN,
    VMAP,
    check_traced,
    define,
    new,
)


def of_each(
    calls: Sequence[Call],
    out: tuple[Any, ...] | None,
    axis: int,
    rotate: Callable[[str, Call], tuple[Any, ...]],
) -> tuple[Any, ...]:
    """Rotate each call on its own, and put the results behind one another by PyTorch.

    `rotate` is told what messages call a call, and the call.
    """
    if out is not None:
        raise ValueError(
            "out must be None where a gradient is recorded or tensors are DTensors, got arrays"
        )
    qk = []
    for i, call in enumerate(calls):
        for name, x in zip(call.names, call.xs, strict=True):
            if not isinstance(x, torch.Tensor):
                raise TypeError(
                    f"streams[{i}].{name} must be a tensor where a gradient is recorded, got "
                    f"{type(x).__name__}"
                )
        without_v = call.of_kind(names=call.names[:2])._replace(xs=call.xs[:2])
        qk.append(rotate(f"streams[{i}]", without_v))
    qkv = [(*results, call.xs[2]) for results, call in zip(qk, calls, strict=True)]
    return tuple([_cat(parts, axis) for parts in zip(*qkv, strict=True)])


def _cat(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Put tensors behind one another, whose axes lie in memory as those of the first one."""
    first = parts[0]
    if first.is_contiguous():
        return torch.cat([*parts], dim=axis)
    order = memory_order(first.stride())
    joined = torch.cat([part.permute(order) for part in parts], dim=order.index(axis))
    return joined.permute([order.index(each) for each in range(first.ndim)])


def join(
    calls: Sequence[Call], out: tuple[Any, ...] | None, axis: int, sizes: Sequence[int]
) -> tuple[Any, ...]:
    """Put an operator into the graph that is traced; return `out`, or new tensors.

    What is given is written from new tensors: a stream may lie where another one is written.
    """
    for i, call in enumerate(calls):
        for name, x in zip(call.names, call.xs, strict=True):
            graphs.check_tensor(f"streams[{i}].{name}", x)
        autograd.check_recordable(call)
    records = any([autograd.wants_gradient(x) for call in calls for _, x in call.named])
    if out is not None:
        for name, y in zip(calls[0].names, out, strict=True):
            graphs.check_tensor(f"{name}_out", y)
        joint.check_outputs(calls, out, axis, sum(sizes))
        if records or any([autograd.wants_gradient(y) for y in out]):
            raise ValueError("out must be None where a gradient is recorded, got tensors")
    calls = [graphs.with_tensors(call, records) for call in calls]
    results = tuple(torch.ops.rope_cupy.join(*_traced_arguments(calls), axis))
    if out is None:
        return results
    for name, x, y, result in zip(calls[0].names, calls[0].xs, out, results, strict=True):
        joint.check_alike(f"{name}_out", y, f"streams[0].{name}", x)
        y.copy_(result)
    return out


def _traced_arguments(calls: Sequence[Call]) -> tuple[Any, ...]:
    """Return calls as the operator takes them that is traced.

    They share their options, but for whether they have a norm, and for the pairing of their tables.
    """
    arrays: list[Any] = []
    forms, offsets, has_offset = [], [], []
    for call in calls:
        own = graphs.Arguments(*graphs.traced_arguments(call)[: graphs.NUM_ARGUMENTS])._asdict()
        forms.append(own.pop("form"))
        offset = own.pop("position_offset")
        offsets.append(0 if offset is None else offset)
        has_offset.append(offset is not None)
        arrays += [*call.xs, *own.values()]
    with_table = [call for call in calls if call.table.form is not no_table]
    shared = (with_table or calls)[0]
    for call in calls:
        if call.options.norm is not None:
            shared = shared.of_kind(options=shared.options._replace(norm=call.options.norm))
    return (
        *(arrays, forms, offsets, has_offset),
        [call.options.norm is not None for call in calls],
        [bool(call.options.interleaved) for call in calls],
        *graphs.traced_arguments(shared)[graphs.NUM_ARGUMENTS :],
    )


def _join(
    arrays: Sequence[Any],
    forms: Sequence[str],
    offsets: Sequence[Any],
    has_offset: Sequence[bool],
    has_norm: Sequence[bool],
    interleaved: Sequence[bool],
    *options_and_axis: Any,
) -> tuple[Any, ...]:
    *options, axis = options_and_axis
    num = len(arrays) // len(forms)
    calls = []
    for i, form in enumerate(forms):
        begin = i * num + len(QKV)
        xs, (cos, sin, *others) = arrays[begin - len(QKV) : begin], arrays[begin : (i + 1) * num]
        of_positions = *others[:3], offsets[i] if has_offset[i] else None
        arguments = cos, sin, form, *of_positions, *others[3:], *options
        call = graphs.traced_call(tuple(xs), None, arguments)
        own = call.options
        if not has_norm[i]:
            own = own._replace(norm=None)
        if call.table.form is no_table:
            own = own._replace(**WITHOUT_TABLE)
        own = own._replace(interleaved=interleaved[i])
        call = call.of_kind(options=own)
        for _, x in (*zip(call.names, xs, strict=True), *call.weights):
            asked_of(x).check_transform("an input", x)
        calls.append(call)
    if any([autograd.wants_gradient(x) for call in calls for _, x in call.named]):
        return of_each(calls, None, axis, lambda _, call: autograd.rotate(call, new))
    return tuple(torch.ops.rope_cupy.join_new(*_arguments(calls), axis))


def _arguments(calls: Sequence[Call]) -> tuple[Any, ...]:
    """Return calls as the operator takes them that runs."""
    arrays: list[Any] = []
    for call in calls:
        arrays += [*call.xs, *call.table.arrays, *call.extra_arrays]
    return (
        arrays,
        [len(call.table.arrays) for call in calls],
        [0 if call.position_offset is None else call.position_offset for call in calls],
        [call.position_offset is not None for call in calls],
        [text_of(call.kind) for call in calls],
    )


def _calls(
    arrays: Sequence[Any],
    num_parts: Sequence[int],
    offsets: Sequence[Any],
    has_offset: Sequence[bool],
    kinds: Sequence[str],
) -> list[Call]:
    """Return the calls that an operator has been given: the inverse of `_arguments`."""
    calls, end = [], 0
    for text, num, offset, has in zip(kinds, num_parts, offsets, has_offset, strict=True):
        kind, _ = kind_of_text(text)
        num_extra = len(kind.extra_names)
        ends = (*accumulate((len(QKV), num, num_extra), initial=end),)
        xs, parts, extra = (tuple(arrays[i:j]) for i, j in pairwise(ends))
        table = TableSource(kind.form, parts)
        calls.append(Call(kind, xs, table, extra, offset if has else None, None))
        end = ends[-1]
    return calls


def _run_join(*arguments: Any) -> tuple[Any, ...]:
    *flat, axis = arguments
    calls = _calls(*flat)
    known = joined.join(calls)
    if known is not None:
        return known
    _, sizes = joint.tokens(calls)
    outs = joint.outputs(calls, None, axis, sizes)
    parts = joint.parts(calls, outs, axis, sizes)
    labels = joint.labels(len(parts))
    ready = [*map(joint.labelled, labels, repeat(_ready), parts)]
    together.write(ready, labels, are_apart=True)
    joined.keep(calls, ready, outs, axis)
    return outs


def _ready(call: Call) -> eager.Ready:
    return eager.ready(call, *eager.find(call))


def _fake_join(*arguments: Any) -> tuple[Any, ...]:
    *flat, axis = arguments
    calls = _calls(*flat)
    for label, call in zip(joint.labels(len(calls)), calls, strict=True):
        joint.labelled(label, check_traced, call)
    sizes = [call.xs[0].shape[axis] for call in calls]
    return joint.outputs(calls, None, axis, sizes)


define(
    __name__,
    "join_new",
    "(Tensor[] arrays, int[] num_parts, SymInt[] offsets, bool[] has_offset, str[] kinds, "
    "int axis) -> (Tensor, Tensor, Tensor)",
    {RUN: "_run_join", FAKE: "_fake_join"},
)
define(
    __name__,
    "join",
    f"(Tensor?[] arrays, str[] forms, SymInt[] offsets, bool[] has_offset, bool[] has_norm, "
    f"bool[] of_neighbours, {graphs.OPTIONS}, int axis) -> (Tensor, Tensor, Tensor)",
    {graphs.PARTS: "_join", VMAP: "refuse_vmap"},
)
