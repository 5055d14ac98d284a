"""Which way a call goes: the only list of ways, and the only place that asks which of them it is.

a call ──┬── traced by torch.compile ──────────────┐
         │                                         ▼
         ├── DTensors: their local parts ───► graphs: an operator, which runs as `eager` later
         ├── tensors without memory ───────────────┘
         ├── a gradient is recorded ───────► autograd, which runs as `eager`
         └── arrays in memory ─────────────► eager
"""

from __future__ import annotations

from typing import Any

from . import arrays, eager
from .call import NO_EXTRA, Call, Extra, parse
from .options import NO_PARTS
from .ways import UNTRACED


def rotate(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    extra: Extra = NO_EXTRA,
    parts: tuple[Any, Any, Any] = NO_PARTS,
) -> tuple[Any, ...]:
    """Rotate the xs, which messages call by `names`; return `out`, or new arrays of their kind.

    The arguments are those of `call.parse`. The first output may be None for a new array where
    others are caches.
    """
    new_q = out is not None and out[0] is None and parts[-1] is not None
    if out is not None and new_q:
        out = arrays.empty_like(names[0], xs[0]), *out[1:]
    call = parse(names, xs, table, positions, options, out, extra, parts)
    prepared, at, signature = eager.find(call)
    if prepared and not (prepared.requires_grad and _wants_gradient(call)):
        outs = eager.run(call, prepared, at)
    elif signature and not _wants_gradient(call):
        outs = eager.rotate_new(call, signature)
    else:
        outs = _by_way(call)
    if new_q:
        return arrays.library_of(names[0], xs[0]).result(outs[0], xs[0]), *outs[1:]
    return outs


def _by_way(call: Call) -> tuple[Any, ...]:
    """Rotate by the way that the arrays of a call want."""
    if any([arrays.asked_of(x).is_distributed(x) for x in call.xs]):
        from .ways import dtensor

        local, whole = dtensor.local_call(call)
        return whole(_by_way(local))
    if _wants_gradient(call) and not _is_traced(call):
        from .ways import autograd

        _check_transforms(call)
        return autograd.record(call, _without_gradient)
    return _without_gradient(call)


def _without_gradient(call: Call) -> tuple[Any, ...]:
    """Rotate by a way that records no gradient itself. A graph records its own."""
    _check_transforms(call)
    if _is_traced(call):
        from .ways import graphs

        return graphs.rotate(call)
    return eager.rotate(call)


def _traced(*given: Any) -> tuple[Any, ...]:
    """Rotate in a graph that torch.compile traces, in place of `rotate`."""
    from .ways import graphs

    call = graphs.parse(*given)
    if any([hasattr(x, "device_mesh") for x in call.xs]):
        from .ways import dtensor

        local, whole = dtensor.local_call(call)
        return whole(graphs.rotate(local))
    return graphs.rotate(call)


# torch.compile traces this in place of `rotate`, which so need not ask whether it is traced.
rotate._torchdynamo_inline = _traced  # type: ignore[attr-defined]
UNTRACED.append(rotate)


def _check_transforms(call: Call) -> None:
    inputs = (*zip(call.names, call.xs, strict=True), *call.extra)
    for name, array in (*inputs, *(("table", part) for part in call.table.arrays)):
        arrays.asked_of(array).check_transform(name, array)


def _is_traced(call: Call) -> bool:
    """Return whether the call stands for one of a graph: table and all, or beside constants."""
    x = call.xs[0]
    return all([arrays.asked_of(each).is_traced(each) for each in call.xs]) and (
        arrays.asked_of(x).is_beside_real(x)
        or all([arrays.asked_of(part).is_traced(part) for part in call.table.arrays])
    )


def _wants_gradient(call: Call) -> bool:
    return any([arrays.asked_of(array).wants_gradient(array) for array in call.arrays])
