"""RotaryProblem: one call in sizes, strides and flags, and every check of its arguments. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .checks import index
from .memory import FLOATS, ITEMSIZE, ArraySpec, may_overlap_itself

MAX_ROWS = 2**31 - 2**10  # the last block may reach beyond them, and counts in 32 bits too
MAX_HEAD_DIM = 2**22  # its lanes fit a grid of 65,535 blocks
DEFAULT_LAYOUTS = {3: "shd", 4: "bshd"}

Four = tuple[int, int, int, int]


class TableSpec(NamedTuple):
    """A table of cosines and sines: (p, r), (b, s, r) or (b, s, h, r), with r = rotary_dim / 2."""

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
    position_dtype: str | None
    position_strides: tuple[int, int]
    interleaved: bool
    conjugate: bool
    keep: bool

    @property
    def num_rows(self) -> int:
        return sum(map(self.num_rows_of, self.tensors))

    def num_rows_of(self, tensor: RotaryTensor) -> int:
        return self.batch * self.num_tokens * tensor.num_heads


class Pointers(NamedTuple):
    """The addresses of a problem's arrays: x and out of each tensor, first cos, first sin."""

    x: tuple[int, ...]
    out: tuple[int, ...]
    cos: int
    sin: int
    positions: int


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
    positions: ArraySpec | None,
    options: Options,
) -> RotaryProblem:
    """Check that arrays which pass `check_inputs` fit the rest; return the problem they pose.

    `names` are what the caller calls the xs. `positions` is None when they are implicit.
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
    _check_table(table.cos.shape, batch, num_tokens, num_heads, positions)
    named = [*zip(names, xs, strict=True), *zip(out_names(names), outs, strict=True)]
    named += [("table", table.cos), ("table", table.sin)]
    if positions:
        _check_positions(positions, batch, num_tokens, first.device, names[0])
        named.append(("positions", positions))
    for name, array in named:
        _check_alignment(name, array)
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
        cos=_table_view(table.cos, positions),
        sin=_table_view(table.sin, positions),
        table_step=table.step,
        sin_offset=table.sin_offset,
        num_positions=table.cos.shape[0] if positions else 1,
        cos_row=table.cos.strides[0] if positions else 0,
        sin_row=table.sin.strides[0] if positions else 0,
        position_dtype=positions.dtype if positions else None,
        position_strides=_position_strides(positions),
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
    return Options(interleaved, layout, head_dim, offset, conjugate, out_of_range)


known_options = lru_cache(maxsize=256, typed=True)(check_options)


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
    positions: ArraySpec | None,
) -> None:
    """Refuse a table by batch and token (and head) that does not match the tensors."""
    if len(shape) == 2:
        return
    if positions:
        raise ValueError(
            f"positions must be None with a table by batch and token, {shape}, got an array of "
            f"shape {positions.shape}"
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


def _table_view(table: ArraySpec, positions: ArraySpec | None) -> View:
    *rows, pair = table.strides
    strides = (0, 0 if positions else rows[0], 0) if len(rows) == 1 else (*rows, 0)[:3]
    return View((*strides, pair), table.alignment)  # type: ignore[arg-type]


def _position_strides(positions: ArraySpec | None) -> tuple[int, int]:
    batch, token = (0, 0, *positions.strides)[-2:] if positions else (0, 0)
    return batch, token


def _check_positions(
    positions: ArraySpec, batch: int, num_tokens: int, device: str, x_name: str
) -> None:
    check_dtype("positions", positions, ("int32", "int64"))
    if positions.shape not in ((num_tokens,), (1, num_tokens), (batch, num_tokens)):
        raise ValueError(
            f"positions must have the shape {(num_tokens,)}, one for each token, or "
            f"{(batch, num_tokens)}, got {positions.shape}"
        )
    if positions.device != device:
        raise ValueError(f"positions must be on {x_name}'s device {device}, got {positions.device}")
