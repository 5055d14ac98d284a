"""Prepared: what has been checked and planned for a signature, to be run at any addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from . import cpu
from .arguments import Distance
from .arrays import Array, Library, let_wait
from .bounded import put
from .call import Call
from .memory import ACCESS_BYTES, ITEMSIZE, ArraySpec, cuda_index, overlap, span
from .problem import (
    IMPLICIT,
    INPUT_OF,
    MAX_TENSORS,
    POINTER_OF,
    TOKEN_INDEX,
    Pointers,
    RotaryProblem,
    implicit_position,
    needs_start,
)
from .table_forms import TableView

if TYPE_CHECKING:  # arrays on the CPU need it not
    from .jit import Launcher
    from .plan import LaunchPlan

ABSENT = "absent"  # the name of a value that stands for what is not there
MAX_PLACES = 1024  # numbers of inputs, parts of a table and other arrays
MAX_APART = 256  # distances of two arrays that are known to share no byte

Addresses = tuple[int, ...]


class Described(NamedTuple):
    """The arrays of a call, described."""

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    table: TableView
    extra: tuple[Array, ...]

    @property
    def all(self) -> tuple[Array, ...]:
        """All of them."""
        return *self.inputs, *self.outputs, *self.table.arrays, *self.extra


class Places(NamedTuple):
    """Where the addresses of a call's arrays stand: the inputs', the table's, the extra arrays',
    and those of outputs that are no inputs.
    """

    x: tuple[int, ...]
    out: tuple[int, ...]
    of_out: tuple[int, ...]  # the input's of each output
    cos: int
    sin: int
    extra: tuple[int, ...]


def inputs_of(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the input of each output."""
    if len(outputs) == len(inputs):
        return inputs
    return tuple([inputs[INPUT_OF[i]] for i in range(len(outputs))])


def places_of(call: Call, is_input: tuple[bool, ...]) -> Places:
    """Return where addresses stand. `is_input` tells of each output whether it is its input."""
    return _places(len(call.xs), len(call.table.arrays), len(call.extra_arrays), is_input)


@lru_cache(maxsize=MAX_PLACES)
def _places(num: int, num_parts: int, num_extra: int, is_input: tuple[bool, ...]) -> Places:
    last = num + num_parts + num_extra
    out = []
    of_out = INPUT_OF[: len(is_input)]
    for x, is_own in zip(of_out, is_input, strict=True):
        out.append(x if is_own else last)
        last += not is_own
    return Places(
        x=tuple(range(num)),
        out=tuple(out),
        of_out=of_out,
        # Without a table they stand at the first input, and nothing is read there.
        cos=num if num_parts else 0,
        sin=num + num_parts - 1 if num_parts else 0,
        extra=tuple(range(num + num_parts, num + num_parts + num_extra)),
    )


class Located(NamedTuple):
    """An array of a call, and where it lies from the address that stands at its place."""

    name: str
    spec: ArraySpec
    place: int
    shift: int  # bytes from the address to its first element
    begin: int  # its span, in bytes from its first element
    end: int


class Pair(NamedTuple):
    """An output and another array, which must share no byte."""

    out: int  # where its address stands
    other: int
    low: int  # the distances of the addresses between which the arrays' spans touch
    high: int
    apart: dict[int, None]  # distances at which spans touch and no byte is shared
    names: tuple[str, str]
    specs: tuple[ArraySpec, ArraySpec]
    shift: int  # bytes from the other's address to its first element


class Prepared:
    """A problem, the launch that solves it, and what addresses must be for that."""

    def __init__(
        self,
        call: Call,
        problem: RotaryProblem,
        described: Described,
        places: Places,
        same: tuple[bool, ...],
    ) -> None:
        table, outputs = described.table, described.outputs
        self.problem, self.places, self.extra_names = problem, places, call.extra_names
        self.table = table.specs[bool(call.options.interleaved)]
        self.to_sin = table.pointers[1] - table.arrays[-1].pointer if table.arrays else 0
        self.begins_at_row = problem.position_kind in (IMPLICIT, TOKEN_INDEX)
        self.needs_start = needs_start(self.table, problem.num_tokens)
        self.located = _located(call, described, places, self.to_sin)
        self.pairs = _pairs(*self.located, same) if call.out else ()
        self.limits = [pair[:5] for pair in self.pairs]  # which `fits` unpacks faster than pairs
        # Outputs that are their inputs, by another object.
        in_place = zip(places.of_out, places.out, same, strict=True)
        self.same = tuple((x, y) for x, y, is_same in in_place if is_same and x != y)
        self.inputs = tuple(array.library for array in described.inputs)
        self.library = outputs[0].library  # on whose current stream a launch comes
        self.mark_written = _marker(tuple(array.library for array in outputs))
        self.launcher: Launcher | None = None
        # Behind the addresses in the values of a launch: 0 for what is not there, the first
        # position, and what is constant of the argument block.
        self.behind: tuple[Any, ...] = 0, 0
        # What `eager` keeps with it.
        self.remainders: list[int] = []
        self.requires_grad = False
        self.was_found = False  # since it was prepared
        self.checked_at: Addresses = ()

    def plan(self, described: Described) -> None:
        """Plan the launch, where a GPU has anything to rotate."""
        first = described.outputs[0]
        if first.spec.device == "cpu" or not self.problem.num_rows:
            return
        from .jit import Launcher
        from .plan import launch_plan

        plan = launch_plan(self.problem)
        device, take = cuda_index(first.spec.device), taker((self,), plan)
        self.launcher = Launcher(plan, device, first.library.streams(), take)
        self.behind = 0, 0, *constants_of(plan)
        before = _others(first.library, described.all)
        behind = _others(first.library, described.outputs)
        self.launch = _in_order(self.launcher, before, behind) if before else self.launcher.launch

    def fits(self, at: Addresses) -> bool:
        """Return whether this serves arrays at these addresses."""
        if [address % ACCESS_BYTES for address in at] != self.remainders or 0 in at:
            return False
        for x, y in self.same:
            if at[x] != at[y]:
                return False
        for out, other, low, high, apart in self.limits:
            if low < at[other] - at[out] < high and at[other] - at[out] not in apart:
                return False
        return True

    def check_apart(self, at: Addresses) -> None:
        """Refuse outputs that share memory with other arrays."""
        check_apart(self.pairs, at)

    def first_row(self, position_offset: int | None) -> int:
        """Return the row of the table that the first token has, or refuse tokens beside it."""
        if not self.begins_at_row:
            return 0
        return implicit_position(position_offset, self.table, self.problem.num_tokens)

    def write(self, at: Addresses, position_offset: int | None) -> None:
        """Write the outputs. Where this raises, nothing has been written."""
        first, behind = 0, self.behind
        if position_offset is not None or self.needs_start:
            first, at = self.from_position(at, position_offset)
            behind = 0, first, *self.constants
        if self.launcher:
            self.launch(at + behind)
        elif self.problem.num_rows:
            cpu.rotate(self.problem, self.pointers(at, first))

    def from_position(self, at: Addresses, offset: int | None) -> tuple[int, Addresses]:
        """Return what a launch is given of the first token's position: that, and where rows are."""
        if self.begins_at_row:
            at = self._moved(at, self.first_row(offset))
        return offset or 0, at

    def _moved(self, at: Addresses, row: int) -> Addresses:
        """Return the addresses with those of the table at one of its rows."""
        cos, sin = self.places.cos, self.places.sin
        moved, axis = [*at], min(1, len(self.table.shape) - 2)  # of positions, or of tokens
        for place, part in {cos: self.table.cos, sin: self.table.sin}.items():
            moved[place] += row * part.strides[axis] * ITEMSIZE[part.dtype]
        return (*moved,)

    def pointers(self, at: Addresses, first: int) -> Pointers:
        """Return the addresses by what they are of."""
        places = self.places
        extra = {
            POINTER_OF[name]: at[place]
            for name, place in zip(self.extra_names, places.extra, strict=True)
        }
        return Pointers(
            x=tuple([at[place] for place in places.x]),
            out=tuple([at[place] for place in places.out]),
            cos=at[places.cos],
            sin=at[places.sin] + self.to_sin,
            position_offset=first,
            **extra,
        )

    @property
    def constants(self) -> tuple[Any, ...]:
        """What is constant of the argument block."""
        return self.behind[2:]

    @property
    def waits(self) -> bool:
        """Whether streams of other libraries take part in a launch."""
        return self.launcher is not None and self.launch is not self.launcher.launch

    @property
    def num_addresses(self) -> int:
        """How many addresses a call has."""
        places = self.places
        return max((*places.x, *places.out, places.sin, *places.extra)) + 1


def taker(parts: Sequence[Prepared], plan: LaunchPlan) -> Callable[[tuple[Any, ...]], Any]:
    """Return what takes the argument block's items from the values of a launch.

    For each of the calls that it runs, these are its addresses, 0 for what is not there, and its
    first position; then come the plan's constants.
    """
    named, end = [], 0
    for part in parts:
        named.append(_places_of_items(part, end))
        end += part.num_addresses + 2
    constant = count(end)
    last = end + len(constants_of(plan))
    taken, computed = [], []
    for item, owner in zip(plan.packer.items, plan.packer.owners, strict=True):
        if isinstance(item, bytes):
            taken.append(next(constant))
            continue
        at = named[owner]
        if isinstance(item, Distance):
            computed.append((at[item.end], at[item.begin], 0, item.itemsize))
            taken.append(last + len(computed) - 1)
            continue
        place = at[item.name]
        shift = item.offset + (parts[owner].to_sin if item.name == "sin" else 0)
        if shift and place != at[ABSENT]:
            computed.append((place, at[ABSENT], shift, 1))
            place = last + len(computed) - 1
        taken.append(place)
    take = itemgetter(*taken)
    if not computed:
        return take
    shifted = [(i, shift) for i, _, shift, _ in computed if shift]
    if len(shifted) == len(computed):  # without distances, as most are
        return lambda values: take((*values, *[values[i] + shift for i, shift in shifted]))
    return lambda values: take(
        (*values, *[(values[i] - values[j] + shift) // size for i, j, shift, size in computed])
    )


def _places_of_items(part: Prepared, begin: int) -> dict[str, int]:
    """Return where a launch's values have what a call fills into the argument block, by names."""
    places = part.places
    absent = begin + part.num_addresses
    at = dict.fromkeys((*POINTER_OF.values(), ABSENT), absent)
    at |= {"cos": begin + places.cos, "sin": begin + places.sin, "position_offset": absent + 1}
    for i in range(MAX_TENSORS):  # a launch of fewer tensors repeats them
        at[f"x{i}"] = begin + places.x[min(i, len(places.x) - 1)]
        at[f"out{i}"] = begin + places.out[min(i, len(places.out) - 1)]
    at["k_out"] = begin + places.out[MAX_TENSORS] if len(places.out) > MAX_TENSORS else absent
    for name, place in zip(part.extra_names, places.extra, strict=True):
        at[POINTER_OF[name]] = begin + place
    return at


def constants_of(plan: LaunchPlan) -> tuple[bytes, ...]:
    """Return what is constant of a plan's argument block."""
    return tuple([item for item in plan.packer.items if isinstance(item, bytes)])


def check_apart(pairs: Sequence[Pair], at: Addresses) -> None:
    """Refuse outputs that share memory with other arrays."""
    for pair in pairs:
        here, there = at[pair.out], at[pair.other]
        distance = there - here
        if not pair.low < distance < pair.high or distance in pair.apart:
            continue
        if overlap(pair.specs[0], here, pair.specs[1], there + pair.shift):
            name, other = pair.names
            wanted = "" if name.endswith("_cache") else "be its input or "
            raise ValueError(
                f"{name} must {wanted}share no memory with {other}, got two arrays that overlap"
            )
        put(pair.apart, distance, None, MAX_APART)


def _located(
    call: Call, described: Described, places: Places, to_sin: int
) -> tuple[tuple[Located, ...], tuple[Located, ...], tuple[Located, ...]]:
    """Return the inputs, the outputs and all other arrays of a call."""
    table = described.table.specs[bool(call.options.interleaved)]

    def located(names: Any, arrays: tuple[Array, ...], places: Any) -> tuple[Located, ...]:
        triples = zip(names, arrays, places, strict=True)
        return tuple([located_at(name, array.spec, place, 0) for name, array, place in triples])

    others = located(call.extra_names, described.extra, places.extra)
    if described.table.arrays:
        of_table = (
            located_at("table", table.cos, places.cos, 0),
            located_at("table", table.sin, places.sin, to_sin),
        )
        others = of_table + others
    return (
        located(call.names, described.inputs, places.x),
        located(call.out_names, described.outputs, places.out),
        others,
    )


def located_at(name: str, spec: ArraySpec, place: int, shift: int) -> Located:
    """Return an array by the place at which its address stands."""
    return Located(name, spec, place, shift, *span(spec))


def _pairs(
    xs: tuple[Located, ...],
    outs: tuple[Located, ...],
    others: tuple[Located, ...],
    same: tuple[bool, ...],
) -> tuple[Pair, ...]:
    """Return which arrays may not overlap: an output with all others, but in place with its x."""
    pairs: dict[Any, Pair] = {}  # one for two places, though both may be written in place
    for i, out in enumerate(outs):
        inputs = [x for j, x in enumerate(xs) if not (same[i] and j == INPUT_OF[i])]
        for other in (*inputs, *outs[:i], *others):
            place, to, shift = out.place, other.place, other.shift
            key = (place, to, shift) if place < to else (to, place, shift)
            if key not in pairs:
                pairs[key] = pair_of(out, other)
    return (*pairs.values(),)


def pair_of(out: Located, other: Located) -> Pair:
    """Return an output and another array as what must share no byte."""
    low, high = out.begin - other.end - other.shift, out.end - other.begin - other.shift
    names, specs = (out.name, other.name), (out.spec, other.spec)
    return Pair(out.place, other.place, low, high, {}, names, specs, other.shift)


def _others(first: Library, described: tuple[Array, ...]) -> tuple[Library, ...]:
    """Return the other libraries of arrays, whose current streams may be others."""
    return (*{array.library: None for array in described if array.library is not first},)


def _in_order(
    launcher: Launcher, before: tuple[Library, ...], behind: tuple[Library, ...]
) -> Callable[[Any], None]:
    """Return a launch that waits for the streams of other libraries, and lets outputs' wait for it.

    Each library has a current stream of its own, and knows nothing of the others'.
    """
    device = launcher.device

    def launch(values: Any) -> None:
        stream = launcher.stream_of(device)
        for library in before:
            let_wait(device, stream, library.stream(device))
        launcher.launch(values)
        for library in behind:
            let_wait(device, library.stream(device), stream)

    return launch


def _marker(outputs: tuple[Library, ...]) -> Callable[[tuple[Any, ...]], None]:
    """Return what tells the libraries of outputs that these have been written."""
    if len({*outputs}) == 1:
        return outputs[0].mark_written

    def mark_written(outs: tuple[Any, ...]) -> None:
        for library, y in zip(outputs, outs, strict=True):
            library.mark_written((y,))

    return mark_written
