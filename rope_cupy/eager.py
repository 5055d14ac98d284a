"""The way of a call on arrays in memory: find what is prepared for its signature, or prepare it.

A signature is all of a call but addresses and values: libraries, dtypes, shapes, strides,
alignments and options, and which output is which input. What has been checked and planned for a
signature serves every call that has it. Addresses are read at every call, and so is checked what
depends on them: alignments, memory that arrays share, and the positions that an int begins.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple

from . import arrays
from .arrays import Array
from .bounded import put
from .call import Call, kind_of
from .choices import TOKEN_NORM
from .memory import ACCESS_BYTES
from .options import Options
from .prepared import Addresses, Described, Prepared, inputs_of, places_of
from .problem import RotaryProblem, check_inputs, rotary_problem

MAX_PREPARED = 4096  # signatures
# Signatures of a kind of call and of the same outputs that are inputs, found several times faster.
MAX_RECENT = 8

_prepared: dict[Any, Prepared] = {}  # by signature


class Signature(NamedTuple):
    """All of a call but addresses and values."""

    names: tuple[str, ...]
    form: Callable[..., Any]  # of the table
    extra_names: tuple[str, ...]
    options: Options
    is_input: tuple[bool, ...]  # each output, of its own; of no outputs where new ones are made
    attributes: Any  # of all arrays: see `Library.attributes`
    remainders: tuple[int, ...]  # of their addresses, by the widest access of a thread
    same: tuple[bool, ...]  # whether outputs lie where their inputs do


def find(call: Call) -> tuple[Prepared | None, Addresses, Signature | None]:
    """Return what is prepared for a call, and the addresses of its arrays.

    Where nothing is prepared, the signature to prepare it for; None where an array is no plain one
    in memory, and so must be described every time.
    """
    kind, xs, (_, parts), extra_arrays, _, out = call
    is_input: tuple[bool, ...] = ()
    read = xs + parts + extra_arrays
    if out is not None:
        is_input = tuple(map(is_, out, inputs_of(xs, out)))
        if False in is_input:
            read += tuple([y for y, is_own in zip(out, is_input, strict=True) if not is_own])
    library = arrays.library_of_all(read)
    at = library.addresses(read) if library else None
    recent: Any = kind.recent
    if recent is None:
        recent = kind_of(*kind[:-1]).recent
    if at is not None:
        known = recent.get(is_input, ())
        for entry in known:
            matches, prepared = entry
            if matches(*read) and (at == prepared.checked_at or prepared.fits(at)):
                prepared.checked_at = at
                if entry is not known[0]:  # the one that matched last is asked first
                    recent[is_input] = (entry, *[each for each in known if each is not entry])
                return prepared, at, None
    return _find_by_attributes(call, recent, is_input, read)


def _find_by_attributes(
    call: Call, recent: dict[Any, Any], is_input: tuple[bool, ...], read: tuple[Any, ...]
) -> tuple[Prepared | None, Addresses, Signature | None]:
    """Find what has not been asked for lately, and let it be found faster from its second time."""
    seen = arrays.attributes_and_addresses(read)
    if seen is None:
        return None, (), None
    attributes, at = seen
    remainders = tuple([address % ACCESS_BYTES for address in at])
    places = places_of(call, is_input)
    same = tuple([at[x] == at[y] for x, y in zip(places.of_out, places.out, strict=True)])
    signature = Signature(*call.kind[:-1], is_input, attributes, remainders, same)
    prepared = _prepared.get(signature)
    if prepared is None:
        return None, at, signature
    prepared.first_row(call.position_offset)
    prepared.check_apart(at)
    library = arrays.library_of_all(read)
    is_known = library and prepared.was_found and library.addresses(read)
    matches = library.matcher(read) if library and is_known else None
    if matches:
        others = recent.get(is_input, ())[: MAX_RECENT - 1]
        recent[is_input] = ((matches, prepared), *others)
    prepared.was_found = True
    return prepared, at, None


def rotate(call: Call) -> tuple[Any, ...]:
    """Rotate arrays in memory; return `out`, or new arrays."""
    prepared, at, signature = find(call)
    return run(call, prepared, at) if prepared else rotate_new(call, signature)


def run(call: Call, prepared: Prepared, at: Addresses) -> tuple[Any, ...]:
    """Rotate by what `find` has found."""
    out = call.out
    if out is not None:
        prepared.write(at, call.position_offset)
        prepared.mark_written(out)
        return out
    outs, out_at = _new(call, prepared)
    if out_at is None:
        return rotate_new(call, None)
    prepared.write(at + out_at, call.position_offset)
    return outs


def _new(call: Call, prepared: Prepared) -> tuple[tuple[Any, ...], Addresses | None]:
    """Return new outputs and their addresses, None where these are not what is prepared for."""
    inputs = prepared.inputs
    outs = tuple([library.empty_like(x) for library, x in zip(inputs, call.xs, strict=True)])
    at = inputs[0].addresses(outs)
    if at is None or any([address % ACCESS_BYTES for address in at]):
        return outs, None
    return outs, at


class Ready(NamedTuple):
    """A call that has been checked, and whose outputs have memory, of which none is written yet."""

    call: Call
    prepared: Prepared
    at: Addresses
    outs: tuple[Any, ...]
    owners: Any  # what keeps the memory of arrays till they are written

    def write(self) -> None:
        """Write the outputs."""
        self.prepared.write(self.at, self.call.position_offset)

    def results(self) -> tuple[Any, ...]:
        """Tell that the outputs are written, and return what the caller gets for them."""
        if self.call.out is not None:
            self.prepared.mark_written(self.outs)
            return self.outs
        three = self.prepared.inputs, self.outs, self.call.xs
        return tuple([library.result(y, x) for library, y, x in zip(*three, strict=True)])


def ready(
    call: Call, prepared: Prepared | None, at: Addresses, signature: Signature | None
) -> Ready:
    """Check all of a call for which `find` has found this, and write nothing yet."""
    if prepared is None:
        return Ready(call, *_prepare(call, signature))
    prepared.first_row(call.position_offset)
    if call.out is not None:
        return Ready(call, prepared, at, call.out, None)
    outs, out_at = _new(call, prepared)
    if out_at is None:
        return Ready(call, *_prepare(call, None))
    return Ready(call, prepared, at + out_at, outs, None)


def check(call: Call) -> None:
    """Check a call on outlines of arrays that have no memory yet, but what values tell."""
    inputs = _describe(call.names, call.xs)
    check_inputs(call.names, tuple(array.spec for array in inputs))
    outputs = tuple(map(arrays.like_dense, inputs))
    if call.out is not None:
        outputs = _describe(call.out_names, call.out)
    extra = _describe(call.extra_names, call.extra_arrays)
    described = Described(inputs, outputs, call.table.view(None), extra)
    prepared, at = _checked(call, described)
    prepared.first_row(call.position_offset)
    prepared.check_apart(at)


def rotate_new(call: Call, signature: Signature | None) -> tuple[Any, ...]:
    """Rotate a call of which nothing is prepared, and keep what is prepared for its signature."""
    checked = Ready(call, *_prepare(call, signature))
    checked.write()
    return checked.results()


def _prepare(
    call: Call, signature: Signature | None
) -> tuple[Prepared, Addresses, tuple[Any, ...], Any]:
    """Describe, check and plan; return that, the addresses, the outputs, and what owns memory.

    It is kept where the call has a signature.
    """
    # The first output says on which stream all must be ready: a new one is of its input's library.
    outputs = _describe(call.out_names, call.out or ())
    first = outputs or _describe(call.names[:1], call.xs[:1])
    stream = arrays.stream_of(first[0])
    known = dict(zip(map(id, call.out or call.xs[:1]), first, strict=True))
    inputs = tuple(
        [
            known.get(id(x)) or arrays.describe(name, x, stream)
            for name, x in zip(call.names, call.xs, strict=True)
        ]
    )
    check_inputs(call.names, tuple([array.spec for array in inputs]))
    table = call.table.view(stream)
    extra = _describe(call.extra_names, call.extra_arrays, stream)
    outs = call.out
    if outs is None:
        outs = tuple(array.library.empty_like(x) for array, x in zip(inputs, call.xs, strict=True))
        outputs = _describe(call.out_names, outs)
    described = Described(inputs, outputs, table, extra)
    prepared, at = _checked(call, described)
    prepared.first_row(call.position_offset)
    prepared.check_apart(at)
    prepared.plan(described)
    if signature:
        prepared.remainders = [*signature.remainders]
        asked = [arrays.asked_of(each).requires_grad(each) for each in call.arrays]
        prepared.requires_grad = any(asked)
        put(_prepared, signature, prepared, MAX_PREPARED)
    return prepared, at, outs, described.all


def _checked(call: Call, described: Described) -> tuple[Prepared, Addresses]:
    """Check what does not depend on addresses; return what is prepared, and the addresses."""
    inputs, outputs, table, extra = described
    is_input: tuple[bool, ...] = (False,) * len(inputs)
    if call.out is not None:
        is_input = tuple(map(is_, call.out, inputs_of(call.xs, call.out)))
    places = places_of(call, is_input)
    same = tuple(map(_is_same, inputs_of(inputs, outputs), outputs))
    if call.options.cache:
        same = same[0], False, False, *same[3:]  # another token's slot may lie where k or v is read
    problem = rotary_problem(
        call.names,
        tuple(array.spec for array in inputs),
        tuple(array.spec for array in outputs),
        all(same),
        table.specs[bool(call.options.interleaved)],
        tuple(zip(call.extra_names, (array.spec for array in extra), strict=True)),
        call.options,
    )
    _check_norm(call, problem)
    written = [y for y, is_own in zip(outputs, is_input, strict=True) if not is_own]
    at = tuple([array.pointer for array in (*inputs, *table.arrays, *extra, *written)])
    return Prepared(call, problem, described, places, same), at


def _check_norm(call: Call, problem: RotaryProblem) -> None:
    """Refuse on every device what no block of threads can hold."""
    norm = call.options.norm
    if norm and norm.kind == TOKEN_NORM and problem.num_rows:
        from .plan import launch_plan

        launch_plan(problem)


def _is_same(x: Array, y: Array) -> bool:
    """Return whether y is x: the same elements at the same addresses."""
    return x.pointer == y.pointer and x.spec[:4] == y.spec[:4]


def _describe(
    names: tuple[str, ...], given: tuple[Any, ...], stream: int | None = None
) -> tuple[Array, ...]:
    pairs = zip(names, given, strict=False)  # no arrays where none are given
    return tuple(arrays.describe(name, array, stream) for name, array in pairs)
