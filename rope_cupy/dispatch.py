"""Which way a call goes: the only list of ways, and the only place that asks which of them it is.

a call ──┬── traced by JAX ────────────────► jax, whose program runs as `eager` later
         ├── traced by torch.compile ──────────────┐
         │                                         ▼
         ├── DTensors: their local parts ───► graphs: an operator, which runs as `eager` later
         ├── tensors without memory ───────────────┘
         ├── a gradient is recorded ───────► autograd, which runs as `eager`
         └── arrays in memory ─────────────► eager
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from . import arrays, eager, joined, joint, together
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


def rotate_each(*given: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Rotate what several calls are given, as `rotate` is: by one launch, where one kernel serves.

    All are checked before an output is written. Messages begin with the name of what is rotated.
    """
    labels = [each[0][0] for each in given]
    calls = [*map(joint.labelled, labels, repeat(_parsed), given)]
    _check_alike(calls)
    ready = [*map(joint.labelled, labels, repeat(_ready), calls)]
    plain = [each for each in ready if each]
    if len(plain) == len(calls):
        together.write(plain)
        return tuple([each.results() for each in plain])
    if any([call.out is not None for call in calls]):
        _check_each(calls)
    return tuple([*map(joint.labelled, labels, repeat(_by_way), calls)])


def _parsed(given: tuple[Any, ...]) -> Call:
    return parse(*given)


def _check(call: Call) -> None:
    """Check all of a call on tensors in memory, whether a gradient is recorded or not."""
    _check_transforms(call)
    eager.ready(call, *eager.find(call))


def _check_alike(calls: Sequence[Call]) -> None:
    (q,), (k,) = (call.xs for call in calls)
    options = calls[0].options
    joint.check_k(q, k, options.layout, options.head_dim is not None)


def _ready(call: Call) -> eager.Ready | None:
    """Return a call on arrays in memory, checked, or None where it goes by another way."""
    found = prepared, _, signature = eager.find(call)
    asks = prepared.requires_grad if prepared else True
    if asks and _wants_gradient(call):
        return None
    if prepared is None and signature is None:
        if _is_distributed(call) or _is_traced(call) or _is_of_jax(call):
            return None
        _check_transforms(call)
    return eager.ready(call, *found)


def _check_each(calls: Sequence[Call]) -> None:
    """Check calls that do not go together, before the first is written."""
    for call in calls:
        if _is_of_jax(call):
            from .ways import jax

            joint.labelled(call.names[0], jax.check, call)
        if _wants_gradient(call) and not _is_traced(call) and not _is_distributed(call):
            from .ways import autograd

            autograd.check(call)
    elsewhere = _is_traced, _is_distributed, _is_of_jax
    in_memory = [call for call in calls if not any([each(call) for each in elsewhere])]
    together.check([eager.ready(call, *eager.find(call)) for call in in_memory])


def join(given: Sequence[tuple[Any, ...]], out: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Rotate what calls are given of q, k and v, and write all behind one another.

    `out` are the joint arrays, or None for new ones. Gradients are those of calls on their own,
    whose results are put behind one another.
    """
    labels = joint.labels(len(given))
    calls = [*map(joint.labelled, labels, repeat(_parsed), given)]
    if any(map(_is_traced, calls)):
        from .ways import joins

        return joins.join(calls, out, *joint.traced_tokens(calls))
    known = joined.join(calls) if out is None else None
    if known is not None:
        return known
    axis, sizes = joint.tokens(calls)
    if not any(map(_is_distributed, calls)):
        outs = joint.outputs(calls, out, axis, sizes)
        written = joint.parts(calls, outs, axis, sizes)
        ready = [*map(joint.labelled, labels, repeat(_ready), written)]
        plain = [each for each in ready if each]
        if len(plain) == len(calls):
            together.write(plain, labels, are_apart=out is None)
            if out is None:
                joined.keep(calls, plain, outs, axis)
            return joint.results(calls, out, outs)
        for label, call in zip(labels, written, strict=True):
            joint.labelled(label, _check, call)  # v too, which PyTorch alone joins
    from .ways import joins

    return joins.of_each(calls, out, axis, lambda label, call: joint.labelled(label, _by_way, call))


def _by_way(call: Call) -> tuple[Any, ...]:
    """Rotate by the way that the arrays of a call want."""
    if _is_of_jax(call):
        from .ways import jax

        return jax.rotate(call)
    if _is_distributed(call):
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

    return _traced_call(graphs.parse(*given))


def _traced_call(call: Call) -> tuple[Any, ...]:
    from .ways import graphs

    if any([hasattr(x, "device_mesh") for x in call.xs]):
        from .ways import dtensor

        local, whole = dtensor.local_call(call)
        return whole(graphs.rotate(local))
    return graphs.rotate(call)


def _traced_each(*given: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Rotate in a graph that torch.compile traces, in place of `rotate_each`."""
    from .ways import graphs

    calls = [graphs.parse(*each) for each in given]
    _check_alike(calls)
    return tuple([_traced_call(call) for call in calls])


def _traced_join(given: Sequence[tuple[Any, ...]], out: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """Join in a graph that torch.compile traces, in place of `join`."""
    from .ways import graphs, joins

    calls = [graphs.parse(*each) for each in given]
    axis, sizes = joint.traced_tokens(calls)
    if any([hasattr(x, "device_mesh") for call in calls for x in call.xs]):
        return joins.of_each(calls, out, axis, lambda _, call: _traced_call(call))
    return joins.join(calls, out, axis, sizes)


# torch.compile traces these in place of functions that so need not ask whether they are traced.
_in_graphs: dict[Any, Any] = {rotate: _traced, rotate_each: _traced_each, join: _traced_join}
for _function, _other in _in_graphs.items():
    _function._torchdynamo_inline = _other
    UNTRACED.append(_function)


def _check_transforms(call: Call) -> None:
    inputs = (*zip(call.names, call.xs, strict=True), *call.extra)
    for name, array in (*inputs, *(("table", part) for part in call.table.arrays)):
        arrays.asked_of(array).check_transform(name, array)


def _is_distributed(call: Call) -> bool:
    return any([arrays.asked_of(x).is_distributed(x) for x in call.xs])


def _is_of_jax(call: Call) -> bool:
    """Return whether the call is part of a program that JAX traces."""
    return any(map(arrays.is_traced_by_jax, call.arrays))


def _is_traced(call: Call) -> bool:
    """Return whether the call stands for one of a graph: table and all, or beside constants."""
    x = call.xs[0]
    return all(arrays.asked_of(each).is_traced(each) for each in call.xs) and (
        arrays.asked_of(x).is_beside_real(x)
        or all([arrays.asked_of(part).is_traced(part) for part in call.table.arrays])
    )


def _wants_gradient(call: Call) -> bool:
    if not arrays.records_gradients():
        return False
    return any([arrays.asked_of(array).wants_gradient(array) for array in call.arrays])
