"""The kernel's one argument: the struct `Arguments` of kernels/rotary.cu, and its packing. Pure.

A record of this module is a struct of the kernels, with the same fields in the same order, and its
values are what a plan packs. There is no other description of the block: the tests compare this one
with the offsets that the compiler gives to the fields.

Every field takes 8 bytes and is aligned to them, so nothing lies between two fields, and a struct
within another begins where the last field ended. A float is the one field that is smaller than its
place, whose second half is padding.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from .problem import Pointers

FIELD_BYTES = 8  # the size and the alignment of a field


class CType(NamedTuple):
    """A type of the kernels, and the format by which `struct` packs it into 8 bytes."""

    name: str
    format: str


INTEGER, ADDRESS = CType("long long", "q"), CType("const void*", "Q")


class Patched(NamedTuple):
    """A field that every call fills: an address, or an integer."""

    name: str
    offset: int = 0  # bytes that are added to an address which is not null
    type: CType = ADDRESS


class Distance(NamedTuple):
    """A field that every call fills: how many elements lie between two addresses."""

    begin: str
    end: str
    itemsize: int
    type: CType = INTEGER

    def between(self, begin: int, end: int) -> int:
        """Return the number of elements."""
        return (end - begin) // self.itemsize


PATCHED = Patched, Distance


class Single(float):
    """A float in the place of an integer."""


class Double(float):
    """A double in the place of an integer."""


C_TYPES = {int: INTEGER, Single: CType("Word<float>", "f4x"), Double: CType("Word<double>", "d")}


class Divisor(NamedTuple):
    """What divides numbers below 2^31: n // value == (2 n * multiplier >> 32) >> shift."""

    value: int
    multiplier: int
    shift: int


class View(NamedTuple):
    """The strides of an array over three axes of rows and over elements, and its access width."""

    outer: int
    middle: int
    inner: int
    element: int
    width: int


class Tensor(NamedTuple):
    """Where the rows of x and out lie, and which blocks have them."""

    blocks: int
    num_row_groups: int
    inner: Divisor
    middle: Divisor
    x: View
    x_step: int | Distance
    out: View
    out_step: int | Distance


class PositionArguments(NamedTuple):
    """What positions need besides their address."""

    axis: int
    section_ends: tuple[int, int]
    num_sequences: int
    cu_stride: int
    cu_seqlens: Patched = Patched("cu_seqlens")
    position_offset: Patched = Patched("position_offset", type=INTEGER)


class TensorsAndTable(NamedTuple):
    """What every launch has."""

    x: tuple[Patched, ...]
    out: tuple[Patched, ...]
    cos_data: Patched
    sin_data: Patched
    positions: Patched
    period: Divisor
    num_lanes: int
    num_pairs: int
    cos: View
    position: View
    num_positions: int
    cos_row: int
    tensors: tuple[Tensor, ...]
    sin: View
    sin_row: int
    keep_out_of_range: int
    rotary_offset: int
    num_pair_lanes: int
    token: View
    position_arguments: PositionArguments
    head_axis: int
    table_heads: tuple[Divisor, ...]


class Weights(NamedTuple):
    """Where the weights, or the biases, of a tensor's norm lie."""

    head: int
    step: int | Distance
    element: int
    width: int


class RmsNormArguments(NamedTuple):
    """What RMSNorm needs."""

    layout: tuple[Weights, Weights]
    inverse_count: tuple[float, float]
    eps: float
    weight_offset: float
    weights: tuple[Patched, Patched]


class BiasArguments(NamedTuple):
    """What LayerNorm needs beside what RMSNorm needs."""

    bias_layout: tuple[Weights, Weights]
    biases: tuple[Patched, Patched]


class SlotsArguments(NamedTuple):
    """What the writing of caches needs."""

    slot: View
    num_slots: int
    end_of_slots: int
    block_size: Divisor
    block: tuple[int, int]
    place: tuple[int, int]
    scale: tuple[Single, Single]
    slots: Patched = Patched("slots")
    scales: tuple[Patched, Patched] = (Patched("k_scale"), Patched("v_scale"))


class KArguments(NamedTuple):
    """What the writing of k beside its cache needs."""

    k_out: View
    k_step: int
    k_data: Patched


class MatricesArguments(NamedTuple):
    """What a table of matrices needs whose numbers lie apart."""

    column: int


class Arguments(NamedTuple):
    """The whole struct: its bases and theirs, in order. One that is missing takes no place."""

    tensors_and_table: TensorsAndTable
    norm: RmsNormArguments | None
    biases: BiasArguments | None
    slots: SlotsArguments | None
    k: KArguments | None
    form: MatricesArguments | None


class Joint(NamedTuple):
    """What several launches are given that are run as one."""

    members: tuple[Arguments, ...]
    first_blocks: tuple[int, ...]  # of each, among the blocks of all
    rotates: tuple[int, ...]  # whether each has a table


class Field(NamedTuple):
    """A field of the argument block."""

    name: str  # in C++, such as tensors[0].x.outer
    offset: int  # bytes from the block's begin
    type: CType
    is_patched: bool


class Constants(NamedTuple):
    """Neighbouring fields that are constant for a plan."""

    fields: slice
    packed: struct.Struct


class Layout(NamedTuple):
    """What all blocks have in common whose structs have the same bases."""

    fields: tuple[Field, ...]
    block: struct.Struct  # of the patched fields and, for constants between them, bytes
    constants: tuple[Constants, ...]


class ArgumentPacker(NamedTuple):
    """What packs the argument blocks of a plan: all of a block is constant but what is patched."""

    fields: tuple[Field, ...]
    size: int  # of the block, in bytes
    items: tuple[Patched | Distance | bytes, ...]  # what a call fills, and what lies between
    owners: tuple[int, ...]  # of which of the launches that are run as one an item is
    pack_into: Callable[..., None]  # (buffer, offset, *items), each patched one by its value

    def pack(self, *pointers: Pointers) -> bytes:
        """Return the block for the addresses of each launch that it is for."""
        block, named = bytearray(self.size), [each.by_name() for each in pointers]
        items = [
            item if isinstance(item, bytes) else self._value(item, named[owner])
            for item, owner in zip(self.items, self.owners, strict=True)
        ]
        self.pack_into(block, 0, *items)
        return bytes(block)

    @staticmethod
    def _value(item: Patched | Distance, named: dict[str, int]) -> int:
        if isinstance(item, Distance):
            return item.between(named[item.begin], named[item.end])
        return named[item.name] and named[item.name] + item.offset


def divisor(value: int) -> Divisor:
    """Return the divisor of numbers below 2^31.

    Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication" (1994).
    """
    shift = (value - 1).bit_length()
    return Divisor(value, multiplier=(1 << 31 + shift) // value + 1, shift=shift)


def argument_packer(arguments: Arguments | Joint) -> ArgumentPacker:
    """Return what packs blocks of these arguments; the constants are packed here."""
    leaves: list[Any] = []
    owners: list[int] = []
    for i, member in enumerate(_members(arguments)):
        _collect(member, leaves)
        owners += [i] * (len(leaves) - len(owners))
    if isinstance(arguments, Joint):
        _collect(arguments[1:], leaves)
        owners += [owners[-1]] * (len(leaves) - len(owners))
    layout = _layout(arguments)
    items, of_items, done = [], [], 0
    for fields, packed in layout.constants:
        items += leaves[done : fields.start]
        items.append(packed.pack(*leaves[fields]))
        of_items += owners[done : fields.start + 1]
        done = fields.stop
    items += leaves[done:]
    of_items += owners[done:]
    packer = layout.fields, layout.block.size, (*items,), (*of_items,), layout.block.pack_into
    return ArgumentPacker(*packer)


def _members(arguments: Arguments | Joint) -> tuple[Arguments, ...]:
    return arguments.members if isinstance(arguments, Joint) else (arguments,)


def _collect(value: Any, leaves: list[Any]) -> None:
    """Add the values of the fields that are no structs and no arrays, in their order."""
    for each in value:
        if type(each) in PATCHED or type(each) in C_TYPES:
            leaves.append(each)
        elif each is not None:
            _collect(each, leaves)


_layouts: dict[tuple[object, ...], Layout] = {}  # there are 120 of them


def _layout(arguments: Arguments | Joint) -> Layout:
    """Return the layout of the struct, which depends on its bases and on the type of its reals.

    All launches that are run as one have the same of these.
    """
    members = _members(arguments)
    tensors, norm = members[0].tensors_and_table.tensors, members[0].norm
    of_norm = (type(norm.eps), type(norm.layout[0].step)) if norm else ()
    missing = [base is None for base in members[0]]
    key = len(members), len(tensors), type(tensors[0].x_step), *of_norm, *missing
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = _describe(arguments)
    return layout


def _describe(arguments: Arguments | Joint) -> Layout:
    named = [*_named("", arguments)]
    fields = tuple(
        Field(name, FIELD_BYTES * i, type, is_patched)
        for i, (name, type, is_patched) in enumerate(named)
    )
    formats = ["<"]  # of little-endian numbers, between which nothing is added
    constants, first = [], 0
    for is_patched, group in groupby(fields, lambda field: field.is_patched):
        run = [field.type.format for field in group]
        if is_patched:
            formats += run
        else:
            packed = struct.Struct("<" + "".join(run))
            constants.append(Constants(slice(first, first + len(run)), packed))
            formats.append(f"{packed.size}s")
        first += len(run)
    return Layout(fields, struct.Struct("".join(formats)), tuple(constants))


def _named(name: str, value: Any) -> Iterator[tuple[str, CType, bool]]:
    """Yield the name and the type of every field that is no struct and no array."""
    if isinstance(value, PATCHED):
        yield name, value.type, True
    elif type(value) in C_TYPES:
        yield name, C_TYPES[type(value)], False
    elif isinstance(value, Arguments):  # whose parts are bases
        for base in value:
            yield from _named(name, base or ())
    elif hasattr(value, "_fields"):
        for part, each in zip(value._fields, value, strict=True):
            yield from _named(f"{name}.{part}" if name else part, each)
    else:
        for i, each in enumerate(value):
            yield from _named(f"{name}[{i}]", each)
