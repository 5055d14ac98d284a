"""From the arrays of a call to a launch: checked the first time, repeated by addresses after that.

A call is known by what its arrays look like at a glance (dtypes, shapes, strides, alignment, flags)
and by its options. What has been seen before has been checked, but for what depends on addresses:
overlaps, and the positions that an int starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import eq
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cpu, tensor
from .checks import described, index
from .memory import ACCESS_BYTES, ITEMSIZE, ArraySpec, cuda_index, overlap, span
from .options import TOKEN_NORM, Options, check_options, checked_parts, known_options
from .problem import (
    COUNTED,
    IMPLICIT,
    OF_POSITIONS,
    POINTER_OF,
    Pointers,
    RotaryProblem,
    TableSpec,
    check_inputs,
    implicit_position,
    output_names,
    rotary_problem,
)
from .recall import keep
from .tables import TableSource, TableView, source_of

if TYPE_CHECKING:  # arrays on the CPU need it not
    from .jit import Launcher


class Positions(NamedTuple):
    """What a caller gives to say which rows of the table tokens have."""

    positions: Any = None
    seqlen_offsets: Any = None
    cu_seqlens: Any = None


class Given(NamedTuple):
    """What a call is given."""

    names: tuple[str, ...]  # of the xs
    xs: tuple[Any, ...]
    table: TableSource
    row_names: tuple[str, ...]
    rows: tuple[Any, ...]  # that tell which rows of the table tokens have, and all other arrays
    first: int | None  # or the first of those rows, or what is added to those that are counted
    options: Options
    out: tuple[Any, ...] | None

    @property
    def positions(self) -> Positions:
        """What says so, as a caller gives it."""
        rows = {name: row for name, row in self.named_rows if name in OF_POSITIONS}
        return Positions(**{"positions": self.first} | rows)

    @property
    def more(self) -> tuple[tuple[str, Any], ...]:
        """The other arrays, by their names."""
        return tuple((name, row) for name, row in self.named_rows if name not in OF_POSITIONS)

    @property
    def named_rows(self) -> tuple[tuple[str, Any], ...]:
        """The rows by their names."""
        return tuple(zip(self.row_names, self.rows, strict=True))

    @property
    def out_names(self) -> tuple[str, ...]:
        """What the outputs are called in messages."""
        return output_names(self.names, self.options)


class _Place(NamedTuple):
    """An array of a call."""

    name: str
    spec: ArraySpec
    begin: int  # bytes from its address to the first that it touches
    end: int  # and to the one behind the last
    number: int  # of its address, where those of Pointers are counted through


class _Call(NamedTuple):
    """A call that has been checked, to be repeated on arrays that differ in nothing but address."""

    problem: RotaryProblem
    launcher: Launcher | None  # where a GPU has anything to rotate
    table: TableSpec
    to_sin: int  # bytes from the address of the table's last array to that of the first sine
    apart: tuple[tuple[_Place, _Place], ...]  # pairs that must share no memory
    inputs: tuple[tensor.Library, ...]
    outputs: tuple[tensor.Library, ...]
    wrote: Callable[[tuple[Any, ...]], None]  # tells the libraries of outputs that were given
    # Other libraries than the first output's, whose streams may be others: of all arrays that are
    # read or written, and of outputs.
    before: tuple[tensor.Library, ...] = ()
    behind: tuple[tensor.Library, ...] = ()


class Ready(NamedTuple):
    """A call at addresses that have been checked."""

    write: Callable[[], None]
    wrote: Callable[[tuple[Any, ...]], None]  # of the call


_calls: dict[Any, _Call] = {}  # by what is seen of a call at a glance
MAX_CALLS = 4096
SECTION = Options._fields.index("mrope_section")
NO_PARTS = None, None, None  # the last of Options
AN_INT_OR_ARRAY = "None, an int or an int32 or int64 array"  # positions are
MAX_KEPT = 16  # ways to call the same arrays


def rotate(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    more: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, ...]:
    """Rotate the xs, which messages call by `names`; return `out`, or new arrays of their kind.

    `positions` are the fields of Positions and `options` those of Options: they are checked here.
    The first output may be None for a new array where others are caches. `more` are other
    arrays, by their names.
    """
    if out is not None and out[0] is None and options[-1] is not None:  # a new q beside caches
        out = tensor.empty_like(names[0], xs[0]), *out[1:]
        q_out, *caches = rotate(names, xs, table, positions, options, out, more)
        return tensor.library_of(names[0], xs[0]).result(q_out, xs[0]), *caches
    source = source_of(table)
    if options[0] is None:
        options = source.interleaved, *options[1:]
    if options[-len(NO_PARTS) :] != NO_PARTS:
        options = *options[: -len(NO_PARTS)], *checked_parts(*options[-len(NO_PARTS) :])
    section = options[SECTION]
    try:
        types = () if section is None else map(type, section)
        options = known_options(*options, *types)
    except TypeError:  # one of a wrong type, which may not even be hashable: it is named
        options = check_options(*options)
    row_names: tuple[str, ...] = ()
    rows: tuple[Any, ...] = ()
    first = None
    row, seqlen_offsets, cu_seqlens = positions
    if seqlen_offsets is not None or cu_seqlens is not None:
        row_names, rows, first = _counted(row, seqlen_offsets, cu_seqlens)
    elif row is None:
        pass
    elif tensor.is_kind_of_array(type(row)):  # type: ignore[arg-type]
        row_names, rows = ("positions",), (row,)
    else:
        first = index("positions", row, AN_INT_OR_ARRAY)
    if more:
        more_names, arrays = zip(*more, strict=True)
        row_names, rows = row_names + more_names, rows + arrays
    in_place = out is not None and xs[0] is out[0] and xs[-1] is out[-1]
    parts = () if source.fixed else source.arrays
    seen = tensor.glance((*xs, *parts, *rows, *(() if in_place else out or ())))
    if seen is None:
        return _rotate_with_care(Given(names, xs, source, row_names, rows, first, options, out))
    key = source.fixed, first, names, options, source.form, row_names, in_place, out is None
    if seen.requires_grad and tensor.records_gradients():
        given = Given(names, xs, source, row_names, rows, first, options, out)
        return _of_torch().recorded(given, key, seen)  # type: ignore[no-any-return]
    ready = None if out is None else seen.kept.get(key)  # new arrays are kept by where they lie
    if ready is None or out is None:
        return rotate_seen(
            Given(names, xs, source, row_names, rows, first, options, out), key, seen
        )
    ready.write()
    ready.wrote(out)
    return out


def _counted(
    positions: Any, seqlen_offsets: Any, cu_seqlens: Any
) -> tuple[tuple[str, ...], tuple[Any, ...], int]:
    """Return what is known of tokens that are counted: the names of arrays, they, and an int."""

    def is_array(value: Any) -> bool:
        return tensor.is_kind_of_array(type(value))  # type: ignore[arg-type]

    check_counted(positions, seqlen_offsets, cu_seqlens, is_array)
    arrays = {"seqlen_offsets": seqlen_offsets, "cu_seqlens": cu_seqlens}
    first = 0 if positions is None else index("positions", positions, AN_INT_OR_ARRAY)
    if seqlen_offsets is not None and not is_array(seqlen_offsets):
        first += index("seqlen_offsets", arrays.pop("seqlen_offsets"), AN_INT_OR_ARRAY)
    there = {name: array for name, array in arrays.items() if array is not None}
    check_start(first, bool(there))
    return (*there,), (*there.values(),), first


def check_start(first: int, added: bool) -> None:
    """Refuse an int that no position is counted from; it is `added` to what arrays hold."""
    if first >= 2**63 or first < (-(2**63) if added else 0):
        wanted = "fit 64 bits" if added else "be 0 or more"
        raise ValueError(f"positions must {wanted} with seqlen_offsets added, got {first}")


def check_counted(
    positions: Any, seqlen_offsets: Any, cu_seqlens: Any, is_array: Callable[[Any], bool]
) -> None:
    """Refuse what tokens that are counted cannot have, of which one of the last two is given."""
    if is_array(positions):
        name = "cu_seqlens" if seqlen_offsets is None else "seqlen_offsets"
        raise ValueError(f"{name} must be None where positions are an array, got both")
    if cu_seqlens is not None and not is_array(cu_seqlens):
        raise TypeError(
            f"cu_seqlens must be None or an int32 or int64 array, got {described(cu_seqlens)}"
        )


def _traced(*call: Any) -> tuple[Any, ...]:
    from .torch import traced

    return traced(*call)


# torch.compile traces this in place of `rotate`, which so need not ask whether it is traced.
rotate._torchdynamo_inline = _traced  # type: ignore[attr-defined]


def _rotate_with_care(given: Given) -> tuple[Any, ...]:
    """Rotate what must be described every time, such as what PyTorch only traces."""
    arrays = *given.xs, *given.table.arrays, *given.rows, *(given.out or ())
    if any(map(tensor.is_distributed, given.xs)):
        return _of_torch().sharded(given)  # type: ignore[no-any-return]
    named = *zip(given.names, given.xs, strict=True), *given.named_rows
    for name, array in (*named, *(("table", part) for part in given.table.arrays)):
        tensor.check_transform(name, array)
    if all(map(tensor.is_traced, given.xs)) and (
        tensor.is_beside_real(given.xs[0]) or all(map(tensor.is_traced, given.table.arrays))
    ):
        last = given.positions, given.options, given.out, given.more
        return _of_torch().traced(given.names, given.xs, given.table, *last)  # type: ignore[no-any-return]
    if any(map(tensor.wants_gradient, arrays)):
        return _of_torch().recorded(given, None, None)  # type: ignore[no-any-return]
    return rotate_unseen(given)


@cache
def _of_torch() -> Any:
    """Return the module above this one, which imports PyTorch, as the caller has."""
    from . import torch

    return torch


def rotate_seen(given: Given, key: Any, seen: tensor.Glance) -> tuple[Any, ...]:
    """Rotate arrays that have been glanced at: the key is all that the glance does not hold."""
    ready, outs, owners = _ready_at(given, key, seen)
    ready.write()
    del owners  # which have kept it till here
    if given.out is not None:
        ready.wrote(outs)
    return outs


def rotate_unseen(given: Given) -> tuple[Any, ...]:
    """Check everything and rotate."""
    call, ready, outs, owners = _unseen(given)
    ready.write()
    del owners
    if given.out is not None:
        ready.wrote(outs)
        return outs
    return tuple(
        library.result(y, x) for library, y, x in zip(call.inputs, outs, given.xs, strict=True)
    )


def checked(
    given: Given, key: Any, seen: tensor.Glance | None
) -> tuple[Ready, tuple[tensor.Array, ...]]:
    """Check everything of a call and write nothing yet; what owns the memory is kept till then."""
    _, ready, _, owners = _unseen(given) if seen is None else (None, *_ready_at(given, key, seen))
    return ready, owners


def check_traced(given: Given) -> None:
    """Check all of a call on tensors that have no memory yet, but what only their values tell."""
    inputs = _describe(given.names, given.xs)
    check_inputs(given.names, tuple(array.spec for array in inputs))
    outputs = tuple(map(tensor.like_dense, inputs))
    if given.out is not None:
        outputs = _describe(given.out_names, given.out)
    table, rows = given.table.view(None), _describe(given.row_names, given.rows)
    problem, apart = _posed(given, inputs, outputs, table, rows)
    call = _Call(problem, None, table.specs[0], 0, apart, (), (), lambda _: None)
    _check_at(call, _pointers(given, inputs, outputs, table, rows), given.first)


def _ready_at(
    given: Given, key: Any, seen: tensor.Glance
) -> tuple[Ready, tuple[Any, ...], tuple[tensor.Array, ...]]:
    """Return what will write arrays that have been glanced at, those, and what owns the memory.

    The caller's arrays own it, and new ones, where these have been rotated before.
    """
    num, at, outs = len(given.xs), seen.at, given.out
    in_place = outs is not None and given.xs[0] is outs[0] and given.xs[-1] is outs[-1]
    ready = None if outs is None else seen.kept.get(key)
    if ready is not None and outs is not None:
        return ready, outs, ()
    out_at = () if outs is None else at[:num] if in_place else at[-num:]
    fixed = given.table.fixed
    call_key = key[2:], fixed and fixed.look, seen.look, tuple(map(eq, at, out_at))
    call = _calls.get(call_key)
    if call is None:
        call, ready, outs, owners = _unseen(given)
        keep(_calls, call_key, call, MAX_CALLS)
        return ready, outs, owners
    if outs is None:
        outs = tuple([lib.empty_like(x) for lib, x in zip(call.inputs, given.xs, strict=True)])
        out_at = call.outputs[0].pointers(outs) or ()
        if not out_at or any([address % ACCESS_BYTES for address in out_at]):
            return _unseen(given)[1:]
        key = key, out_at
        ready = seen.kept.get(key)
    if ready is None:
        behind = num if fixed else num + len(given.table.arrays)
        table = fixed.at if fixed else at[num:behind]
        pointers = Pointers(at[:num], out_at, table[0], table[-1] + call.to_sin)
        if given.rows:
            pointers = _with_rows(pointers, given, at[behind : behind + len(given.rows)])
        ready = keep(seen.kept, key, _made_ready(call, pointers, given.first), MAX_KEPT)
    return ready, outs, ()


def _unseen(given: Given) -> tuple[_Call, Ready, tuple[Any, ...], tuple[tensor.Array, ...]]:
    """Check everything; return that, what will have been written, and what owns the memory."""
    # The first output says on which stream all must be ready: a new one is of its input's library.
    outputs = _describe(given.out_names, given.out or ())
    first = outputs or _describe(given.names[:1], given.xs[:1])
    stream = tensor.stream_of(first[0])
    inputs = () if outputs else first
    begun = len(inputs)
    inputs += _describe(given.names[begun:], given.xs[begun:], stream)
    check_inputs(given.names, tuple(array.spec for array in inputs))
    table = given.table.view(stream)
    rows = _describe(given.row_names, given.rows, stream)
    outs = given.out
    if outs is None:
        outs = tuple(array.library.empty_like(x) for array, x in zip(inputs, given.xs, strict=True))
        outputs = _describe(given.out_names, outs)
    call = _checked(given, inputs, outputs, table, rows)
    pointers = _pointers(given, inputs, outputs, table, rows)
    owners = (*inputs, *outputs, *table.arrays, *rows)
    return call, _made_ready(call, pointers, given.first), outs, owners


def _pointers(
    given: Given,
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    table: TableView,
    rows: tuple[tensor.Array, ...],
) -> Pointers:
    pointers = Pointers(
        x=tuple(array.pointer for array in inputs),
        out=tuple(array.pointer for array in outputs),
        cos=table.pointers[0],
        sin=table.pointers[1],
    )
    return _with_rows(pointers, given, tuple(array.pointer for array in rows))


def _with_rows(pointers: Pointers, given: Given, rows: tuple[int, ...]) -> Pointers:
    """Return the pointers with the addresses of the arrays that tell the rows of tokens."""
    at: dict[str, Any] = {"first": given.first or 0}
    for name, pointer in zip(given.row_names, rows, strict=True):
        at[POINTER_OF[name]] = pointer
    return pointers._replace(**at)


def _describe(
    names: tuple[str, ...], arrays: tuple[Any, ...], stream: int | None = None
) -> tuple[tensor.Array, ...]:
    pairs = zip(names, arrays, strict=False)  # no arrays where none are given
    return tuple(tensor.describe(name, array, stream) for name, array in pairs)


def _checked(
    given: Given,
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    table: TableView,
    rows: tuple[tensor.Array, ...],
) -> _Call:
    """Check all that does not depend on addresses, and find what launches it."""
    problem, apart = _posed(given, inputs, outputs, table, rows)
    device = inputs[0].spec.device
    launcher = None
    if device != "cpu" and problem.num_rows:
        from .jit import Launcher
        from .plan import launch_plan

        stream_of = outputs[0].library.streams()
        launcher = Launcher(launch_plan(problem), cuda_index(device), stream_of)
    return _Call(
        problem=problem,
        launcher=launcher,
        table=table.specs[bool(given.options.interleaved)],
        to_sin=table.pointers[1] - table.arrays[-1].pointer,
        apart=apart,
        inputs=tuple(array.library for array in inputs),
        outputs=tuple(array.library for array in outputs),
        wrote=_teller(tuple(array.library for array in outputs)),
        before=_others(outputs[0], (*inputs, *outputs, *table.arrays, *rows)),
        behind=_others(outputs[0], outputs),
    )


def _others(first: tensor.Array, arrays: tuple[tensor.Array, ...]) -> tuple[tensor.Library, ...]:
    """Return the other libraries of arrays on a GPU than that of the first output."""
    if first.spec.device == "cpu":
        return ()
    return tuple({array.library: None for array in arrays if array.library is not first.library})


def _posed(
    given: Given,
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    table: TableView,
    rows: tuple[tensor.Array, ...],
) -> tuple[RotaryProblem, tuple[tuple[_Place, _Place], ...]]:
    """Check what does not depend on addresses; return the problem, and what must not overlap."""
    spec = table.specs[bool(given.options.interleaved)]
    same = tuple(map(_same, inputs, outputs))
    if given.options.cache:
        same = same[0], False, False  # another token's slot may lie where k or v is still read
    problem = rotary_problem(
        given.names,
        tuple(array.spec for array in inputs),
        tuple(array.spec for array in outputs),
        all(same),
        spec,
        tuple(zip(given.row_names, (array.spec for array in rows), strict=True)),
        given.options,
    )
    norm = given.options.norm
    if norm and norm.kind == TOKEN_NORM and problem.num_rows:
        from .plan import launch_plan

        launch_plan(problem)  # refuses on every device what no block can hold
    apart = _must_be_apart(given, inputs, outputs, same, spec, rows) if given.out else ()
    return problem, apart


def _same(x: tensor.Array, y: tensor.Array) -> bool:
    """Return whether y is x: the same elements at the same addresses."""
    return x.pointer == y.pointer and x.spec[:4] == y.spec[:4]


def _must_be_apart(
    given: Given,
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    same: tuple[bool, ...],
    table: TableSpec,
    rows: tuple[tensor.Array, ...],
) -> tuple[tuple[_Place, _Place], ...]:
    """Return which arrays may not overlap: an output with all others, but in place with its x."""
    names, num = given.names, len(given.names)
    arrays = [
        *zip(names, (x.spec for x in inputs), range(num), strict=True),
        *zip(given.out_names, (y.spec for y in outputs), range(num, 2 * num), strict=True),
        ("table", table.cos, 2 * num),
        ("table", table.sin, 2 * num + 1),
    ]
    for name, array in zip(given.row_names, rows, strict=True):
        behind = Pointers._fields.index(POINTER_OF[name]) - Pointers._fields.index("cos")
        arrays.append((name, array.spec, 2 * num + behind))
    places = [_Place(name, spec, *span(spec), number) for name, spec, number in arrays]
    return tuple(
        (places[y], places[other])
        for y in range(num, 2 * num)
        for other in (*range(y), *range(2 * num, len(places)))
        if not (same[y - num] and other == y - num)
    )


def _made_ready(call: _Call, pointers: Pointers, first: int | None) -> Ready:
    """Check what depends on addresses, and find what writes there."""
    row = _check_at(call, pointers, first)
    if row:
        to_cos, to_sin = (row * part.strides[0] * ITEMSIZE[part.dtype] for part in call.table[:2])
        cos, sin = pointers.cos + to_cos, pointers.sin + to_sin
        pointers = pointers._replace(cos=cos, sin=sin, first=row)
    return Ready(_writer(call, pointers), call.wrote)


def _check_at(call: _Call, pointers: Pointers, first: int | None) -> int:
    """Refuse arrays that overlap and positions beside the table; return the row to begin at."""
    row = 0
    if call.problem.position_kind in (IMPLICIT, COUNTED):
        row = implicit_position(first, call.table, call.problem.num_tokens)
    if call.apart:
        _check_apart(call, pointers)
    return row


def _check_apart(call: _Call, pointers: Pointers) -> None:
    x, out, *others, _ = pointers
    at = (*x, *out, *others)
    for y, other in call.apart:
        here, there = at[y.number], at[other.number]
        touch = here + y.begin < there + other.end and there + other.begin < here + y.end
        if touch and overlap(y.spec, here, other.spec, there):
            wanted = "" if y.name.endswith("_cache") else "be its input or "
            raise ValueError(
                f"{y.name} must {wanted}share no memory with {other.name}, got two arrays that "
                "overlap"
            )


def _writer(call: _Call, pointers: Pointers) -> Callable[[], None]:
    """Return what writes the outputs at these addresses."""
    if call.launcher:
        block = call.launcher.plan.argument_block(pointers)
        launch = call.launcher.with_arguments(block)
        return _in_order(call, call.launcher, launch) if call.before or call.behind else launch
    if call.problem.num_rows:
        return lambda: cpu.rotate(call.problem, pointers)
    return lambda: None


def _in_order(call: _Call, launcher: Launcher, launch: Callable[[], None]) -> Callable[[], None]:
    """Return a launch that waits for the streams of other libraries, and lets outputs' wait for it.

    Each library has a current stream of its own, and knows nothing of the others'.
    """
    device = launcher.device

    def write() -> None:
        stream = launcher.stream_of(device)
        for library in call.before:
            tensor.let_wait(device, stream, library.stream(device))
        launch()
        for library in call.behind:
            tensor.let_wait(device, library.stream(device), stream)

    return write


def _teller(outputs: tuple[tensor.Library, ...]) -> Callable[[tuple[Any, ...]], None]:
    """Return what tells the libraries of outputs that these have been written."""
    if len({*outputs}) == 1:
        return outputs[0].wrote

    def tell(outs: tuple[Any, ...]) -> None:
        for library, y in zip(outputs, outs, strict=True):
            library.wrote((y,))

    return tell
