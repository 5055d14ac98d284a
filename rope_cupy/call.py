"""Call: what one call of a public function is given, parsed and checked once."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from .arrays import is_kind_of_array
from .checks import described, index
from .options import (
    NO_PARTS,
    Options,
    Parts,
    check_options,
    check_parts,
    check_without_table,
)
from .problem import OF_POSITIONS, OF_WEIGHTS, output_names
from .table_forms import FORMS, OF_NEIGHBOURS, TableSource, no_table
from .tables import source_of

AN_INT_OR_ARRAY = "None, an int or an int32 or int64 array"  # positions are
SECTION = Options._fields.index("mrope_section")
MAX_KINDS = 256  # of calls that are known: names, forms of tables, options
Named = tuple[tuple[str, Any], ...]  # arrays by their names
Extra = tuple[tuple[str, ...], tuple[Any, ...]]  # names, and arrays that have them
NO_EXTRA: Extra = ((), ())
_new_tuple: Any = tuple.__new__


class Kind(NamedTuple):
    """What calls of a kind share: all but their arrays and an int."""

    names: tuple[str, ...]  # of the xs, in messages
    form: Callable[..., Any]  # of the table
    extra_names: tuple[str, ...]
    options: Options
    recent: dict[Any, Any] | None = None  # what `eager` keeps with kinds that last: see `kind_of`


class Call(NamedTuple):
    """What a call is given.

    `extra_arrays` are those that tell the positions of tokens, the weights of a norm, and what the
    writing of caches needs. The first of `out` may not be None: `dispatch` makes a new one.
    """

    kind: Kind
    xs: tuple[Any, ...]
    table: TableSource
    extra_arrays: tuple[Any, ...]
    position_offset: int | None  # what is added to the positions that tokens have by their index
    out: tuple[Any, ...] | None

    @property
    def names(self) -> tuple[str, ...]:
        """What the xs are called in messages."""
        return self.kind.names

    @property
    def extra_names(self) -> tuple[str, ...]:
        """What the extra arrays are called."""
        return self.kind.extra_names

    @property
    def options(self) -> Options:
        """The options, checked."""
        return self.kind.options

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
        """Those that are weights or biases of a norm."""
        return tuple((name, array) for name, array in self.extra if name in OF_WEIGHTS)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """All arrays, an output that is its input too."""
        return (*self.xs, *self.table.arrays, *self.extra_arrays, *(self.out or ()))

    @property
    def out_names(self) -> tuple[str, ...]:
        """What the outputs are called in messages."""
        return output_names(self.names, self.options, len(self.out or ()))

    @property
    def named(self) -> Named:
        """All arrays by their names, but those of the table."""
        outs = zip(self.out_names, self.out or (), strict=self.out is not None)
        return (*zip(self.names, self.xs, strict=True), *self.extra, *outs)

    def with_extra(self, extra: Named) -> Call:
        """Return the call with other extra arrays."""
        names, arrays = zip(*extra, strict=True) if extra else NO_EXTRA
        return self.of_kind(extra_names=names)._replace(extra_arrays=arrays)

    def of_kind(self, **fields: Any) -> Call:
        """Return the call as one of a kind with other fields."""
        return self._replace(kind=self.kind._replace(recent=None, **fields))


def parse(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    extra: Extra = NO_EXTRA,
    parts: tuple[Any, Any, Any] = NO_PARTS,
) -> Call:
    """Return the record of a call, whose options and ints have been checked.

    `positions` are positions, seqlen_offsets and cu_seqlens as a public function has been given
    them; `options` and `parts` are the fields of Options, the parts as tuples of theirs.
    """
    source = source_of(table)
    extra_names, extra_arrays = extra
    offset = None
    given, seqlen_offsets, cu_seqlens = positions
    if seqlen_offsets is not None or cu_seqlens is not None:
        of_positions, counted, offset = _counted(given, seqlen_offsets, cu_seqlens)
        extra_names, extra_arrays = of_positions + extra_names, counted + extra_arrays
    elif given is None:
        pass
    elif is_kind_of_array(type(given)):  # type: ignore[arg-type]
        extra_names, extra_arrays = ("positions", *extra_names), (given, *extra_arrays)
    else:
        offset = _int("positions", given)
    if parts is not NO_PARTS:
        parts = check_parts(*parts)
    section = options[SECTION]
    try:
        types = () if section is None else map(type, section)
        kind = _known_kind(names, source.form, extra_names, parts, *options, *types)
    except (
        TypeError
    ):  # an option of a wrong type, or sections that cannot be hashed, such as a list
        kind = _kind(names, source.form, extra_names, parts, *options)
    # What Call(...) does too, by a function of Python.
    call: Call = _new_tuple(Call, (kind, xs, source, extra_arrays, offset, out))
    return call


@lru_cache(maxsize=MAX_KINDS)
def kind_of(
    names: tuple[str, ...],
    form: Callable[..., Any],
    extra_names: tuple[str, ...],
    options: Options,
) -> Kind:
    """Return the kind of a call, one for all that are equal, whose options have been checked."""
    return Kind(names, form, extra_names, options, {})


def text_of(kind: Kind) -> str:
    """Return a kind as a text, by which a stored graph has it in another process too."""
    *plain, norm, packed, cache = kind.options
    parts = [part and tuple(part) for part in (norm, packed, cache)]
    return repr((kind.names, kind.form.__name__, kind.extra_names, *plain, *parts))


@lru_cache(maxsize=MAX_KINDS)
def kind_of_text(text: str) -> tuple[Kind, bool]:
    """Return the kind that a text stands for, and whether arrays tell positions.

    Options are checked again, for whoever wrote the text.
    """
    names, form, extra_names, *plain, norm, packed, cache = literal_eval(text)
    options = check_options(*plain, parts=check_parts(norm, packed, cache))
    has_positions = any([name in OF_POSITIONS for name in extra_names])
    return kind_of(names, FORMS[form], extra_names, options), has_positions


def _kind(
    names: tuple[str, ...],
    form: Callable[..., Any],
    extra_names: tuple[str, ...],
    parts: Parts,
    interleaved: Any,
    *others_and_types: Any,
) -> Kind:
    """Return the kind of a call once its options are checked, but for the parts, which have been.

    Types of what mrope_section holds may stand behind the options.
    """
    paired = form in OF_NEIGHBOURS if interleaved is None else interleaved
    others = others_and_types[: len(Options._fields) - len(parts) - 1]
    options = check_options(paired, *others, parts=parts)
    if form is no_table:
        check_without_table(names, interleaved, options)
    return kind_of(names, form, extra_names, options)


_known_kind = lru_cache(maxsize=MAX_KINDS, typed=True)(_kind)


def _int(name: str, value: Any) -> int:
    """Return an int, which changes from run to run where torch.export traces a size as a SymInt."""
    kind = type(value)
    if kind is int or (kind.__name__, kind.__module__) == ("SymInt", "torch"):
        return value  # type: ignore[no-any-return]
    return index(name, value, AN_INT_OR_ARRAY)


def _counted(
    positions: Any, seqlen_offsets: Any, cu_seqlens: Any
) -> tuple[tuple[str, ...], tuple[Any, ...], int]:
    """Return what is known of tokens whose positions are counted: names, arrays, and an int."""

    def is_array(value: Any) -> bool:
        return is_kind_of_array(type(value))  # type: ignore[arg-type]

    check_counted(positions, seqlen_offsets, cu_seqlens, is_array)
    arrays = {"seqlen_offsets": seqlen_offsets, "cu_seqlens": cu_seqlens}
    offset = 0 if positions is None else _int("positions", positions)
    if seqlen_offsets is not None and not is_array(seqlen_offsets):
        offset += _int("seqlen_offsets", arrays.pop("seqlen_offsets"))
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
