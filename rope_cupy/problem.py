"""RotaryProblem: one call in sizes, strides and flags, and every check of its arguments. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from .checks import described, index
from .memory import FLOATS, ITEMSIZE, ArraySpec, may_overlap_itself

MAX_ROWS = 2**31 - 2**10  # the last block may reach beyond them, and counts in 32 bits too
MAX_HEAD_DIM = 2**22  # its lanes fit a grid of 65,535 blocks
FREQUENCY = "frequency"  # the dtype of a table that angles are made of: see kernels/angles.cuh
ANY_POSITION = 2**63 - 1  # that is not negative: how many such a table holds
DEFAULT_LAYOUTS = {3: "shd", 4: "bshd"}

Four = tuple[int, int, int, int]


class TableSpec(NamedTuple):
    """A table of cosines and sines: (p, r), (b, s, r) or (b, s, h, r), with r = rotary_dim / 2.

    Or of frequencies, the same at every position, and of one number that scales sines and cosines,
    which are where there are cosines and sines else.
    """

    cos: ArraySpec
    sin: ArraySpec
    # Neighbouring elements that a pair owns: over 1 where cos and sin, or copies, alternate.
    step: int
    # Elements from a pair's cos to its sin where both lie in what the pair owns, else 0.
    sin_offset: int


class Options(NamedTuple):
    """The keyword arguments of a call that are not arrays."""

    interleaved: bool
    layout: str | None
    head_dim: int | None
    rotary_offset: int
    conjugate: bool
    out_of_range: str
    mrope_section: tuple[int, int, int] | None
    mrope_interleaved: bool


class Canonical(NamedTuple):
    """An array seen as (batch, tokens, heads, head_dim)."""

    shape: Four
    strides: Four


class View(NamedTuple):
    """Where an array lies: strides over (batch, token, head, element or pair), in elements."""

    strides: Four
    alignment: int


class RotaryTensor(NamedTuple):
    num_heads: int
    x: View
    out: View


class RotaryProblem(NamedTuple):
    """One launch: rotate `tensors`, each (batch, num_tokens, num_heads, head_dim), by a table."""

    dtype: str
    batch: int
    num_tokens: int
    head_dim: int
    rotary_dim: int
    rotary_offset: int
    tensors: tuple[RotaryTensor, ...]
    in_place: bool
    table_dtype: str
    cos: View
    sin: View
    table_step: int
    sin_offset: int
    num_positions: int
    cos_row: int  # elements from one position to the next, with explicit positions
    sin_row: int
    position_kind: str
    position_dtype: str | None
    position_strides: tuple[int, int]  # over batch and token
    position_axis: int  # elements from one of three axes, or of sequences, to the next
    section_ends: tuple[int, int]  # pairs: see kernels/positions.cuh
    num_sequences: int
    cu_stride: int  # of cu_seqlens
    interleaved: bool
    conjugate: bool
    keep: bool

    @property
    def num_rows(self) -> int:
        return sum(map(self.num_rows_of, self.tensors))

    def num_rows_of(self, tensor: RotaryTensor) -> int:
        return self.batch * self.num_tokens * tensor.num_heads


class Pointers(NamedTuple):
    """The addresses of a problem's arrays: x and out of each tensor, first cos, first sin.

    And the first token's number, which is added to positions that are counted.
    """

    x: tuple[int, ...]
    out: tuple[int, ...]
    cos: int
    sin: int
    positions: int = 0  # or of seqlen_offsets
    cu_seqlens: int = 0
    first: int = 0


# What tells the positions of tokens, by the names of the arrays that are given.
IMPLICIT, GIVEN, OFFSET, PACKED = "implicit", "given", "offset", "packed"
COUNTED = "counted"  # as IMPLICIT, with a table of frequencies, where no row stands for a token
OF_AXES = SECTIONS, MIXED = "sections", "mixed"  # given for three axes
NUM_AXES = 3


def check_inputs(names: tuple[str, ...], xs: tuple[ArraySpec, ...]) -> None:
    """Refuse inputs that no output can be made for: they share dtype, device and rank."""
    first = xs[0]
    for name, x in zip(names, xs, strict=True):
        check_dtype(name, x, FLOATS)
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have {names[0]}'s dtype {first.dtype}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"{name} must be on {names[0]}'s device {first.device}, got {x.device}"
            )
        if len(x.shape) != len(first.shape):
            raise ValueError(
                f"{name} must have {len(first.shape)} axes like {names[0]}, got shape {x.shape}"
            )


def check_dtype(name: str, x: ArraySpec, dtypes: tuple[str, ...]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(dtypes)}, got {x.dtype}")


@lru_cache(maxsize=4096)
def rotary_problem(
    names: tuple[str, ...],
    xs: tuple[ArraySpec, ...],
    outs: tuple[ArraySpec, ...],
    in_place: bool,
    table: TableSpec,
    rows: tuple[tuple[str, ArraySpec], ...],
    options: Options,
) -> RotaryProblem:
    """Check that arrays which pass `check_inputs` fit the rest; return the problem they pose.

    `names` are what the caller calls the xs, `rows` are the arrays that tell which rows of the
    table tokens have, by their names.
    """
    first = xs[0]
    views = _canonical_inputs(names, xs, options)
    batch, num_tokens, _, head_dim = views[0].shape
    num_heads = tuple(view.shape[2] for view in views)
    for name, out, x in zip(out_names(names), outs, xs, strict=True):
        _check_out(name, out, x)
    tensors = tuple(
        RotaryTensor(
            num_heads=view.shape[2],
            x=View(view.strides, x.alignment),
            out=View(_canonical("out", out, options).strides, out.alignment),
        )
        for view, x, out in zip(views, xs, outs, strict=True)
    )
    rotary_dim = _check_rotary_dim(table, head_dim, options.rotary_offset)
    if table.cos.device != first.device:
        raise ValueError(
            f"table must be on {names[0]}'s device {first.device}, got {table.cos.device}"
        )
    _check_table(table.cos.shape, batch, num_tokens, num_heads, rows)
    named = [*zip(names, xs, strict=True), *zip(out_names(names), outs, strict=True)]
    named += [("table", table.cos), ("table", table.sin), *rows]
    kind = _position_kind(rows, batch, num_tokens, rotary_dim // 2, options)
    if kind == IMPLICIT and table.cos.dtype == FREQUENCY:
        kind = COUNTED
    for name, array in rows:
        if array.device != first.device:
            raise ValueError(
                f"{name} must be on {names[0]}'s device {first.device}, got {array.device}"
            )
    for name, array in named:
        _check_alignment(name, array)
    by_position = kind != IMPLICIT
    sin = table.cos if table.cos.dtype == FREQUENCY else table.sin
    given = dict(rows)
    positions = given.get("positions", given.get("seqlen_offsets"))
    cu_seqlens = given.get("cu_seqlens")
    return RotaryProblem(
        dtype=first.dtype,
        batch=batch,
        num_tokens=num_tokens,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rotary_offset=options.rotary_offset,
        tensors=tensors,
        in_place=in_place,
        table_dtype=table.cos.dtype,
        cos=_table_view(table.cos, by_position),
        sin=_table_view(sin, by_position),
        table_step=table.step,
        sin_offset=table.sin_offset,
        num_positions=table.cos.shape[0] if by_position else 1,
        cos_row=table.cos.strides[0] if by_position else 0,
        sin_row=sin.strides[0] if by_position else 0,
        position_kind=kind,
        position_dtype=rows[0][1].dtype if rows else None,
        position_strides=_position_strides(kind, positions),
        position_axis=positions.strides[0] if kind in (PACKED, *OF_AXES) and positions else 0,
        section_ends=_section_ends(options),
        num_sequences=cu_seqlens.shape[0] - 1 if cu_seqlens else 0,
        cu_stride=cu_seqlens.strides[0] if cu_seqlens else 0,
        interleaved=options.interleaved,
        conjugate=options.conjugate,
        keep=options.out_of_range == "keep",
    )


def out_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the outputs are called in messages."""
    return ("out",) if len(names) == 1 else tuple(f"{name}_out" for name in names)


def check_options(
    interleaved: object,
    layout: object,
    head_dim: object,
    rotary_offset: object,
    conjugate: object,
    out_of_range: object,
    mrope_section: object,
    mrope_interleaved: object,
) -> Options:
    """Check what needs no array of the fields of Options, which are given one by one."""
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved must be True or False, got {interleaved!r}")
    if not isinstance(conjugate, bool):
        raise TypeError(f"conjugate must be True or False, got {conjugate!r}")
    if not isinstance(layout, str | None):
        raise TypeError(f"layout must be a string of axis names or None, got {layout!r}")
    if layout is not None and not (
        layout[-1:] == "d" and _axes(layout) in (["h", "s"], ["b", "h", "s"])
    ):
        raise ValueError(
            "layout must name the axes b (optional), s or t, and h in any order, then d, such as "
            f"'bshd', 'bhsd', 'sbhd', 'shd' or 'thd', got {layout!r}"
        )
    head_dim = None if head_dim is None else index("head_dim", head_dim)
    if head_dim is not None and head_dim <= 0:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    if head_dim is not None and layout is not None and layout[-2:] != "hd":
        raise ValueError(
            f"layout must end in 'hd' where head_dim splits the last axis, got {layout!r}"
        )
    if not isinstance(out_of_range, str):
        raise TypeError(f"out_of_range must be 'nan' or 'keep', got {out_of_range!r}")
    if out_of_range not in ("nan", "keep"):
        raise ValueError(f"out_of_range must be 'nan' or 'keep', got {out_of_range!r}")
    offset = index("rotary_offset", rotary_offset)
    if not isinstance(mrope_interleaved, bool):
        raise TypeError(f"mrope_interleaved must be True or False, got {mrope_interleaved!r}")
    sections = _checked_sections(mrope_section)
    if mrope_interleaved and sections is None:
        raise ValueError("mrope_section must be given with mrope_interleaved=True, got None")
    return Options(
        interleaved,
        layout,
        head_dim,
        offset,
        conjugate,
        out_of_range,
        sections,
        mrope_interleaved,
    )


def _checked_sections(mrope_section: object) -> tuple[int, int, int] | None:
    if mrope_section is None:
        return None
    if not isinstance(mrope_section, tuple | list) or len(mrope_section) != NUM_AXES:
        raise TypeError(f"mrope_section must be None or three ints, got {described(mrope_section)}")
    first, second, third = (index("mrope_section", each, "three ints") for each in mrope_section)
    if min(first, second, third) < 0:
        raise ValueError(f"mrope_section must be of 0 or more pairs, got {mrope_section}")
    return first, second, third


@lru_cache(maxsize=256, typed=True)
def known_options(*options_and_types: Any) -> Options:
    """Check options that can be hashed, with the types of what mrope_section holds behind them."""
    return check_options(*options_and_types[: len(Options._fields)])


def implicit_position(positions: int | None, table: TableSpec, num_tokens: int) -> int:
    """Return the position of the first token, or refuse positions that the table does not hold."""
    shape = table.cos.shape
    if len(shape) > 2:
        if positions is not None:
            raise ValueError(
                f"positions must be None with a table by batch and token, {shape}, got {positions}"
            )
        return 0
    first = positions or 0
    if first < 0:
        raise ValueError(f"positions must be 0 or more where they are an int, got {first}")
    if num_tokens and first + num_tokens > shape[0]:
        raise ValueError(
            f"table must hold the positions {first} to {first + num_tokens - 1} of the "
            f"{num_tokens} tokens, got {shape[0]} positions"
        )
    return first


def axis_names(rank: int, options: Options) -> str:
    """Return the names of an array's axes, "h" for a last one that head_dim splits, t as s."""
    split = options.head_dim is not None
    layout = options.layout or DEFAULT_LAYOUTS.get(rank + split, "")
    return layout.replace("t", "s")[: -1 if split else None]


def _axes(layout: str) -> list[str]:
    return sorted(layout[:-1].replace("t", "s"))


def _canonical(name: str, x: ArraySpec, options: Options) -> Canonical:
    """See `x` as (batch, tokens, heads, head_dim), once head_dim has split its last axis."""
    shape, strides = x.shape, x.strides
    if options.head_dim is not None and shape:
        num_heads, rest = divmod(shape[-1], options.head_dim)
        if rest:
            raise ValueError(
                f"{name} must have a last axis that head_dim={options.head_dim} divides, got "
                f"shape {x.shape}"
            )
        shape = (*shape[:-1], num_heads, options.head_dim)
        strides = (*strides[:-1], strides[-1] * options.head_dim, strides[-1])
    layout = options.layout or DEFAULT_LAYOUTS.get(len(shape))
    if layout is None or len(layout) != len(shape):
        split = 0 if options.head_dim is None else 1
        wanted = " or ".join(
            str(rank - split) for rank in ((len(layout),) if layout else DEFAULT_LAYOUTS)
        )
        given = f"layout={options.layout!r}, head_dim={options.head_dim}"
        raise ValueError(f"{name} must have {wanted} axes with {given}, got shape {x.shape}")
    at = {axis: i for i, axis in enumerate(layout.replace("t", "s"))}
    return Canonical(
        tuple(shape[at[axis]] if axis in at else 1 for axis in "bshd"),  # type: ignore[arg-type]
        tuple(strides[at[axis]] if axis in at else 0 for axis in "bshd"),  # type: ignore[arg-type]
    )


def _canonical_inputs(
    names: tuple[str, ...], xs: tuple[ArraySpec, ...], options: Options
) -> list[Canonical]:
    """See the inputs alike, and refuse any that differ on another axis than heads."""
    views = [_canonical(name, x, options) for name, x in zip(names, xs, strict=True)]
    shared = [(*view.shape[:2], view.shape[3]) for view in views]
    for name, shape in zip(names, shared, strict=True):
        if shape != shared[0]:
            raise ValueError(
                f"{name} must have {names[0]}'s shape on every axis but heads, (batch, tokens, "
                f"head_dim) = {shared[0]}, got {shape}"
            )
    if shared[0][2] > MAX_HEAD_DIM:
        raise ValueError(
            f"{names[0]} must have a head_dim of at most {MAX_HEAD_DIM}, got {shared[0][2]}"
        )
    rows = shared[0][0] * shared[0][1] * sum(view.shape[2] for view in views)
    if rows > MAX_ROWS:
        raise ValueError(
            f"{' and '.join(names)} must have at most {MAX_ROWS} heads of tokens, got {rows}"
        )
    return views


def _check_rotary_dim(table: TableSpec, head_dim: int, offset: int) -> int:
    """Return how many elements of a head turn, which with their offset must fit the head."""
    rotary_dim = 2 * table.cos.shape[-1]
    if not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"table must have a rotary_dim in (0, head_dim={head_dim}], got {rotary_dim}: if it "
            "holds every angle twice, take RotaryTable.from_full_width"
        )
    if not 0 <= offset <= head_dim - rotary_dim:
        raise ValueError(
            f"rotary_offset must be in [0, head_dim - rotary_dim = {head_dim - rotary_dim}], got "
            f"{offset}"
        )
    return rotary_dim


def _check_alignment(name: str, array: ArraySpec) -> None:
    itemsize = ITEMSIZE[array.dtype]
    if array.device != "cpu" and array.alignment < itemsize:
        raise ValueError(
            f"{name} must begin at a multiple of its {itemsize} bytes an element on a GPU, got one "
            f"of {array.alignment}"
        )


def _check_out(name: str, out: ArraySpec, x: ArraySpec) -> None:
    if out.dtype != x.dtype:
        raise TypeError(f"{name} must have its input's dtype {x.dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"{name} must have its input's shape {x.shape}, got {out.shape}")
    if out.device != x.device:
        raise ValueError(f"{name} must be on its input's device {x.device}, got {out.device}")
    if not out.writable:
        raise ValueError(f"{name} must be writable, got an array that is read-only or does not say")
    if may_overlap_itself(out):
        raise ValueError(
            f"{name} must not overlap itself, got strides {out.strides} for shape {out.shape}"
        )


def _check_table(
    shape: tuple[int, ...],
    batch: int,
    num_tokens: int,
    num_heads: tuple[int, ...],
    rows: tuple[tuple[str, ArraySpec], ...],
) -> None:
    """Refuse a table by batch and token (and head) that does not match the tensors."""
    if len(shape) == 2:
        return
    for name, array in rows:
        raise ValueError(
            f"{name} must be None with a table by batch and token, {shape}, got an array of "
            f"shape {array.shape}"
        )
    if shape[0] not in (1, batch) or shape[1] != num_tokens:
        raise ValueError(
            f"table must have the shape ({batch} or 1, {num_tokens}, ...) of batch and tokens, "
            f"got {shape}"
        )
    if len(shape) == 4 and shape[2] != 1 and any(shape[2] != heads for heads in num_heads):
        raise ValueError(
            "table must have 1 head or as many as every tensor, "
            f"{' and '.join(map(str, num_heads))}, got {shape[2]} heads in shape {shape}"
        )


def _table_view(table: ArraySpec, by_position: bool) -> View:
    *rows, pair = table.strides
    strides = (0, 0 if by_position else rows[0], 0) if len(rows) == 1 else (*rows, 0)[:3]
    return View((*strides, pair), table.alignment)  # type: ignore[arg-type]


def _position_strides(kind: str, positions: ArraySpec | None) -> tuple[int, int]:
    if positions is None or kind == PACKED:
        return 0, 0
    if kind == OFFSET:
        return positions.strides[0], 0
    by_batch = len(positions.shape) > (1 if kind == GIVEN else 2)
    return positions.strides[-2] if by_batch else 0, positions.strides[-1]


def _section_ends(options: Options) -> tuple[int, int]:
    """Return the pairs where sections end, or those below which a second and a third axis turn."""
    if options.mrope_section is None:
        return 0, 0
    first, second, third = options.mrope_section
    if options.mrope_interleaved:
        return NUM_AXES * second, NUM_AXES * third
    return first, first + second


def _position_kind(
    rows: tuple[tuple[str, ArraySpec], ...],
    batch: int,
    num_tokens: int,
    num_pairs: int,
    options: Options,
) -> str:
    """Check the arrays that tell the positions of tokens; return what they are."""
    given = dict(rows)
    for name, array in rows:
        check_dtype(name, array, ("int32", "int64"))
        if array.dtype != rows[0][1].dtype:
            raise TypeError(f"{name} must have {rows[0][0]}'s dtype, got {array.dtype}")
    sections = options.mrope_section
    if sections is not None:
        if "positions" not in given:
            raise ValueError(
                f"positions must be an array for three axes with mrope_section={sections}, got none"
            )
        if sum(sections) != num_pairs:
            raise ValueError(
                f"mrope_section must add up to the {num_pairs} pairs of the table, got {sections}"
            )
    if "positions" in given:
        _check_positions(given["positions"].shape, batch, num_tokens, sections is not None)
        if sections is None:
            return GIVEN
        return MIXED if options.mrope_interleaved else SECTIONS
    offsets = given.get("seqlen_offsets")
    if "cu_seqlens" not in given:
        if offsets is None:
            return IMPLICIT
        if offsets.shape != (batch,):
            raise ValueError(
                f"seqlen_offsets must have the shape {(batch,)}, one for each batch, got "
                f"{offsets.shape}"
            )
        return OFFSET
    shape = given["cu_seqlens"].shape
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"cu_seqlens must have the shape (sequences + 1,), got {shape}")
    if shape[0] > MAX_ROWS:
        raise ValueError(f"cu_seqlens must be of at most {MAX_ROWS - 1} sequences, got {shape}")
    if batch != 1:
        raise ValueError(f"cu_seqlens must be None with a batch of {batch}, got an array")
    if offsets is not None and offsets.shape != (shape[0] - 1,):
        raise ValueError(
            f"seqlen_offsets must have the shape {(shape[0] - 1,)}, one for each sequence, got "
            f"{offsets.shape}"
        )
    return PACKED


def _check_positions(shape: tuple[int, ...], batch: int, num_tokens: int, of_axes: bool) -> None:
    axes = (NUM_AXES,) if of_axes else ()
    if shape not in (
        (*axes, num_tokens),
        (*axes, 1, num_tokens),
        (*axes, batch, num_tokens),
    ):
        raise ValueError(
            f"positions must have the shape {(*axes, num_tokens)}, one for each token"
            f"{' and axis' if of_axes else ''}, or {(*axes, batch, num_tokens)}, got {shape}"
        )
