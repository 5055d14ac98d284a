"""Streams that are joined into new arrays as some were before: one check of a signature for all.

What is kept is of all arrays of the streams together, beside what `eager` keeps of each: a model
joins the same kinds of streams in each of its layers, and else each would be found on its own, and
a view be made of each part of each joint array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from . import arrays, together
from .bounded import put
from .call import Call, Kind
from .eager import MAX_RECENT, Ready
from .memory import ACCESS_BYTES
from .together import Together

MAX_JOINED = 256  # kinds of streams

_joined: dict[tuple[int, ...], tuple[Joined, ...]] = {}  # by the identities of the streams' kinds


class Joined(NamedTuple):
    """What is prepared for streams of one signature."""

    kinds: tuple[Kind, ...]  # which therefore last
    matches: Callable[..., bool]
    together: Together
    ends: tuple[int, ...]  # of each stream's arrays among all, behind a 0
    shifts: tuple[tuple[int, ...], ...]  # bytes from each joint array to a stream's part of it
    axis: int
    total: int  # tokens
    requires_grad: bool


def join(calls: Sequence[Call]) -> tuple[Any, ...] | None:
    """Join streams in memory into new arrays, None where that is not known of such streams.

    What would be refused is not known either, for none is told here which stream it is.
    """
    known = _joined.get(_key(calls))
    if known is None:
        return None
    read = _read(calls)
    library = arrays.library_of_all(read)
    at = library.addresses(read) if library else None
    if library is None or at is None:
        return None
    for joined in known:
        if joined.matches(*read):
            break
    else:
        return None
    if joined.requires_grad and arrays.records_gradients():
        return None
    xs = calls[0].xs
    outs = tuple([library.empty_sized(x, joined.axis, joined.total) for x in xs])
    out_at = library.addresses(outs)
    if out_at is None:
        return None
    values = []
    bounds = pairwise(joined.ends)
    for call, part, (begin, end), shifts in zip(
        calls, joined.together.parts, bounds, joined.shifts, strict=True
    ):
        own = at[begin:end] + tuple(
            [address + shift for address, shift in zip(out_at, shifts, strict=True)]
        )
        if [address % ACCESS_BYTES for address in own] != part.remainders or 0 in own:
            return None
        first, offset = 0, call.position_offset
        if offset is not None or part.needs_start:
            try:
                first, own = part.from_position(own, offset)
            except ValueError:
                return None
        values.append((own, first))
    joined.together.run(values)
    return tuple([library.result(y, x) for y, x in zip(outs, xs, strict=True)])


def keep(calls: Sequence[Call], ready: Sequence[Ready], outs: tuple[Any, ...], axis: int) -> None:
    """Keep what was prepared for streams that have been joined, once each was found prepared."""
    common = together.by_one_launch(ready)
    if common is None or not all([part.was_found for part in common.parts]):
        return
    read = _read(calls)
    library = arrays.library_of_all(read)
    at = library.addresses(outs) if library else None
    matches = library.matcher(read) if library and at and library.addresses(read) else None
    if matches is None or at is None:
        return
    ends, shifts = [0], []
    for call, each in zip(calls, ready, strict=True):
        ends.append(ends[-1] + len(_read([call])))
        own = [each.at[place] for place in each.prepared.places.out]
        shifts.append(tuple([address - start for address, start in zip(own, at, strict=True)]))
    joined = Joined(
        kinds=tuple([call.kind for call in calls]),
        matches=matches,
        together=common,
        ends=tuple(ends),
        shifts=tuple(shifts),
        axis=axis,
        total=arrays.shape_of("q_out", outs[0])[axis],
        requires_grad=any([part.requires_grad for part in common.parts]),
    )
    key = _key(calls)
    put(_joined, key, (joined, *_joined.get(key, ())[: MAX_RECENT - 1]), MAX_JOINED)


def _key(calls: Sequence[Call]) -> tuple[int, ...]:
    return tuple([id(call.kind) for call in calls])


def _read(calls: Sequence[Call]) -> tuple[Any, ...]:
    read: tuple[Any, ...] = ()
    for call in calls:
        read += call.xs + call.table.arrays + call.extra_arrays
    return read
