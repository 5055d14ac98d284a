"""Call: what one call of a public function is given, parsed and checked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .arrays import is_kind_of_array
from .checks import described, index
from .options import NO_PARTS, Options, check_options, check_parts, known_options
from .problem import OF_POSITIONS, OF_WEIGHTS, output_names
from .table_forms import OF_NEIGHBOURS, TableSource
from .tables import source_of

AN_INT_OR_ARRAY = "None, an int or an int32 or int64 array"  # positions are
SECTION = Options._fields.index("mrope_section")
Named = tuple[tuple[str, Any], ...]  # arrays by their names


class Call(NamedTuple):
    """What a call is given.

    `extra_arrays` are those that tell the positions of tokens, the weights of a norm, and what the
    writing of caches needs. The first of `out` may not be None: `dispatch` makes a new one.
    """

    names: tuple[str, ...]  # of the xs, in messages
    xs: tuple[Any, ...]
    table: TableSource
    extra_names: tuple[str, ...]
    extra_arrays: tuple[Any, ...]
    position_offset: int | None  # what is added to the positions that tokens have by their index
    options: Options
    out: tuple[Any, ...] | None

    @property
    def extra(self) -> Named:
        """The extra arrays by their names."""
        return tuple(zip(self.extra_names, self.extra_arrays, strict=True))

    @property
    def position_arrays(self) -> Named:
        """Those that tell the positions of tokens."""
        return tuple((name, array) for name, array in self.extra if name in OF_POSITIONS)

    @property
    def weights(self) -> Named:
        """Those that are weights of a norm."""
        return tuple((name, array) for name, array in self.extra if name in OF_WEIGHTS)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All arrays, an output that is its input too."""
        return (*self.xs, *self.table.arrays, *self.extra_arrays, *(self.out or ()))

    @property
    def out_names(self) -> tuple[str, ...]:
        """What the outputs are called in messages."""
        return output_names(self.names, self.options)

    @property
    def named(self) -> Named:
        """All arrays by their names, but those of the table."""
        outs = zip(self.out_names, self.out or (), strict=self.out is not None)
        return (*zip(self.names, self.xs, strict=True), *self.extra, *outs)

    def with_extra(self, extra: Named) -> Call:
        """Return the call with other extra arrays."""
        names, arrays = zip(*extra, strict=True) if extra else ((), ())
        return self._replace(extra_names=names, extra_arrays=arrays)


def parse(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    extra: Named = (),
    parts: tuple[Any, Any, Any] = NO_PARTS,
) -> Call:
    """Return the record of a call, whose options and ints have been checked.

    `positions` are positions, seqlen_offsets and cu_seqlens as a public function has been given
    them; `options` and `parts` are the fields of Options, the parts as tuples of theirs.
    """
    source = source_of(table)
    checked = checked_options(options, parts, source.form in OF_NEIGHBOURS)
    extra_names: tuple[str, ...] = ()
    extra_arrays: tuple[Any, ...] = ()
    offset = None
    given, seqlen_offsets, cu_seqlens = positions
    if seqlen_offsets is not None or cu_seqlens is not None:
        extra_names, extra_arrays, offset = _counted(given, seqlen_offsets, cu_seqlens)
    elif given is None:
        pass
    elif is_kind_of_array(type(given)):  # type: ignore[arg-type]
        extra_names, extra_arrays = ("positions",), (given,)
    else:
        offset = index("positions", given, AN_INT_OR_ARRAY)
    if extra:
        more_names, more_arrays = zip(*extra, strict=True)
        extra_names, extra_arrays = extra_names + more_names, extra_arrays + more_arrays
    return Call(names, xs, source, extra_names, extra_arrays, offset, checked, out)


def checked_options(
    options: tuple[Any, ...], parts: tuple[Any, Any, Any], of_neighbours: bool
) -> Options:
    """Check the fields of Options; `of_neighbours` is what a table's elements are paired by."""
    if parts is not NO_PARTS:
        parts = check_parts(*parts)
    section = options[SECTION]
    try:
        if section is None:
            return known_options(of_neighbours, parts, *options)
        return known_options(of_neighbours, parts, *options, *map(type, section))
    except TypeError:  # one of a wrong type, or a list of sections, which cannot be hashed
        paired = of_neighbours if options[0] is None else options[0]
        return check_options(paired, *options[1:], parts=parts)


def _counted(
    positions: Any, seqlen_offsets: Any, cu_seqlens: Any
) -> tuple[tuple[str, ...], tuple[Any, ...], int]:
    """Return what is known of tokens whose positions are counted: names, arrays, and an int."""

    def is_array(value: Any) -> bool:
        return is_kind_of_array(type(value))  # type: ignore[arg-type]

    check_counted(positions, seqlen_offsets, cu_seqlens, is_array)
    arrays = {"seqlen_offsets": seqlen_offsets, "cu_seqlens": cu_seqlens}
    offset = 0 if positions is None else index("positions", positions, AN_INT_OR_ARRAY)
    if seqlen_offsets is not None and not is_array(seqlen_offsets):
        offset += index("seqlen_offsets", arrays.pop("seqlen_offsets"), AN_INT_OR_ARRAY)
    there = {name: array for name, array in arrays.items() if array is not None}
    check_position_offset(offset, bool(there))
    return (*there,), (*there.values(),), offset


def check_position_offset(offset: int, is_added: bool) -> None:
    """Refuse an int that no position is counted from; `is_added`: to what arrays hold."""
    if offset >= 2**63 or offset < (-(2**63) if is_added else 0):
        wanted = "fit 64 bits" if is_added else "be 0 or more"
        raise ValueError(f"positions must {wanted} with seqlen_offsets added, got {offset}")


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
