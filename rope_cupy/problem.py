"""RotaryProblem: one call in sizes, strides and flags, and every check of its arguments. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .memory import FLOATS, FLOATS_8, ITEMSIZE, ArraySpec, may_overlap_itself
from .options import DEFAULT_LAYOUTS, NUM_AXES, TOKEN_NORM, Cache, Norm, Options, Packed

MAX_ROWS = 2**31 - 2**10  # the last block may reach beyond them, and counts in 32 bits too
MAX_HEAD_DIM = 2**22  # its lanes fit a grid of 65,535 blocks
FREQUENCY = "frequency"  # the dtype of a table that angles are made of: see kernels/angles.cuh
ANY_POSITION = 2**63 - 1  # that is not negative: how many such a table holds

MAX_NORM_DIM = 512  # a head that is normalised lies in one block of threads
# How a table holds what a pair is rotated by: one angle for both elements, or two.
TABLE_FORMS = ONE_ANGLE, BY_ELEMENT, MATRICES = "one angle", "by element", "matrices"

Four = tuple[int, int, int, int]


class TableSpec(NamedTuple):
    """A table of cosines and sines: (p, r), (b, s, r) or (b, s, h, r), with r = rotary_dim / 2.

    Or of frequencies, the same at every position, and of one number that scales sines and cosines,
    which are where there are cosines and sines else.

    In a table by element both have 2 r for r. In one of matrices they are the rows of each, (...,
    r, 2): a cosine and a sine, and a sine and a cosine.
    """

    cos: ArraySpec
    sin: ArraySpec
    # Neighbouring elements that a pair owns: over 1 where cos and sin, or copies, alternate.
    step: int
    # Elements from a pair's cos to its sin where both lie in what the pair owns, else 0.
    sin_offset: int
    form: str = ONE_ANGLE  # of TABLE_FORMS

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape at half width: (..., r)."""
        if self.form == MATRICES:
            return self.cos.shape[:-1]
        *rows, width = self.cos.shape
        return (*rows, width // 2 if self.form == BY_ELEMENT else width)


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
    out: View  # in a cache over (block, place in it, head, element)
    start: int = 0  # the first of its heads in the array that it lies in


class NormProblem(NamedTuple):
    """RMSNorm of the first two tensors."""

    norm: Norm
    dtype: str  # of weights
    strides: tuple[int | None, int | None]  # of each tensor's weights; None for none
    alignments: tuple[int, int]


class CacheProblem(NamedTuple):
    """Where the second and third tensor go."""

    dtype: str
    slot_dtype: str
    slot_strides: tuple[int, int]  # over batch and token
    scale_dtype: str  # of scales in memory
    num_blocks: int
    block_size: int
    scales: tuple[float, float]


class RotaryProblem(NamedTuple):
    """One launch: rotate `tensors`, each (batch, num_tokens, num_heads, head_dim), by a table.

    A third one is copied.
    """

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
    table_form: str  # of TABLE_FORMS
    table_step: int
    sin_offset: int
    table_column: int  # elements from the first number of a matrix's row to the second
    num_positions: int
    cos_row: int  # elements from one position to the next, with explicit positions
    sin_row: int
    position_kind: str
    position_dtype: str | None  # of positions or seqlen_offsets
    cu_dtype: str | None  # of cu_seqlens
    position_strides: tuple[int, int]  # over batch and token
    position_axis: int  # elements from one of three axes, or of sequences, to the next
    section_ends: tuple[int, int]  # pairs: see kernels/positions.cuh
    num_sequences: int
    cu_stride: int  # of cu_seqlens
    interleaved: bool
    conjugate: bool
    keep: bool
    eager: bool
    norm: NormProblem | None
    cache: CacheProblem | None

    @property
    def is_double(self) -> bool:
        """Whether it is computed in float64, and not in float32, on a GPU."""
        return "float64" in (self.dtype, self.table_dtype)

    @property
    def num_rows(self) -> int:
        return sum(map(self.num_rows_of, self.tensors))

    def table_steps(self, part: View) -> tuple[int, int]:
        """Elements of cos or sin from one pair to the next, and from a first angle to a second."""
        step = part.strides[3]
        if self.table_form == MATRICES:
            return step, self.table_column
        if self.table_form == BY_ELEMENT:
            return (2 * step, step) if self.interleaved else (step, self.rotary_dim // 2 * step)
        return step, 0

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
    q_weight: int = 0
    k_weight: int = 0
    slots: int = 0
    k_scale: int = 0
    v_scale: int = 0
    first: int = 0

    def of_tensor(self, i: int) -> tuple[int, int]:
        """Return the addresses of the arrays that a problem's tensor and its output lie in."""
        return self.x[min(i, len(self.x) - 1)], self.out[min(i, len(self.out) - 1)]


# The fields of Pointers by the names of what is given besides the tensors and the table.
POINTER_OF = {
    "positions": "positions",
    "seqlen_offsets": "positions",
    "cu_seqlens": "cu_seqlens",
    "weight": "q_weight",
    "q_weight": "q_weight",
    "k_weight": "k_weight",
    "slot_mapping": "slots",
    "k_scale": "k_scale",
    "v_scale": "v_scale",
}
OF_POSITIONS = "positions", "seqlen_offsets", "cu_seqlens"
OF_WEIGHTS = "weight", "q_weight", "k_weight"
# What tells the positions of tokens, by the names of the arrays that are given.
IMPLICIT, GIVEN, OFFSET, PACKED = "implicit", "given", "offset", "packed"
COUNTED = "counted"  # as IMPLICIT, with a table of frequencies, where no row stands for a token
OF_AXES = SECTIONS, MIXED = "sections", "mixed"  # given for three axes


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
    out_views = _output_views(names, xs, outs, views, options)
    tensors = _tensors(names[0], (xs, views), (outs, out_views), in_place, options.packed)
    num_heads = tuple(tensor.num_heads for tensor in tensors)
    rotary_dim = _check_rotary_dim(table, head_dim, options.rotary_offset)
    if table.cos.device != first.device:
        raise ValueError(
            f"table must be on {names[0]}'s device {first.device}, got {table.cos.device}"
        )
    given = dict(rows)
    of_positions = {name: array for name, array in rows if name in OF_POSITIONS}
    _check_table(table.shape, batch, num_tokens, num_heads, of_positions)
    named = [*zip(names, xs, strict=True), *zip(output_names(names, options), outs, strict=True)]
    named += [("table", table.cos), ("table", table.sin), *rows]
    kind = _position_kind(of_positions, batch, num_tokens, rotary_dim // 2, options)
    if kind == IMPLICIT and table.cos.dtype == FREQUENCY:
        kind = COUNTED
    for name, array in rows:
        if array.device != first.device:
            raise ValueError(
                f"{name} must be on {names[0]}'s device {first.device}, got {array.device}"
            )
    norm = _norm_problem(given, num_heads, head_dim, options)
    cache = _cache_problem(given, first.dtype, (batch, num_tokens), outs, out_views, options)
    for name, array in named:
        _check_alignment(name, array)
    by_position = kind != IMPLICIT
    sin = table.cos if table.cos.dtype == FREQUENCY else table.sin
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
        cos=_table_view(table.cos, table.form, by_position),
        sin=_table_view(sin, table.form, by_position),
        table_form=table.form,
        table_step=table.step,
        sin_offset=table.sin_offset,
        table_column=table.cos.strides[-1] if table.form == MATRICES else 0,
        num_positions=table.cos.shape[0] if by_position else 1,
        cos_row=table.cos.strides[0] if by_position else 0,
        sin_row=sin.strides[0] if by_position else 0,
        position_kind=kind,
        position_dtype=positions.dtype if positions else None,
        cu_dtype=cu_seqlens.dtype if cu_seqlens else None,
        position_strides=_position_strides(kind, positions),
        position_axis=positions.strides[0] if kind in (PACKED, *OF_AXES) and positions else 0,
        section_ends=_section_ends(options),
        num_sequences=cu_seqlens.shape[0] - 1 if cu_seqlens else 0,
        cu_stride=cu_seqlens.strides[0] if cu_seqlens else 0,
        interleaved=bool(options.interleaved),
        conjugate=options.conjugate,
        keep=options.out_of_range == "keep",
        eager=options.rounding == "eager",
        norm=norm,
        cache=cache,
    )


def _output_views(
    names: tuple[str, ...],
    xs: tuple[ArraySpec, ...],
    outs: tuple[ArraySpec, ...],
    views: list[Canonical],
    options: Options,
) -> list[Canonical]:
    """Check the outputs; see them as their inputs are seen, or as caches."""
    if options.cache and views[2].shape != views[1].shape:
        raise ValueError(f"v must have k's shape {xs[1].shape}, got {xs[2].shape}")
    out_views = []
    for name, out, x, view in zip(output_names(names, options), outs, xs, views, strict=True):
        if options.cache and name != "q_out":
            out_views.append(_cache_view(name, out, x, view, options.cache))
        else:
            _check_out(name, out, x)
            out_views.append(_canonical("out", out, options))
    return out_views


def _tensors(
    name: str,
    inputs: tuple[tuple[ArraySpec, ...], list[Canonical]],
    outputs: tuple[tuple[ArraySpec, ...], list[Canonical]],
    in_place: bool,
    packed: Packed | None,
) -> tuple[RotaryTensor, ...]:
    """Return the tensors, of which one array, called `name`, may hold three."""
    tensors = [
        RotaryTensor(
            view.shape[2], View(view.strides, x.alignment), View(to.strides, out.alignment)
        )
        for x, view, out, to in zip(*inputs, *outputs, strict=True)
    ]
    if packed:
        (whole,), (num_heads, num_kv_heads) = tensors, packed
        if whole.num_heads != num_heads + 2 * num_kv_heads:
            raise ValueError(
                f"{name} must have num_heads + 2 num_kv_heads = {num_heads + 2 * num_kv_heads} "
                f"heads, got {whole.num_heads}"
            )
        parts = (num_heads, 0), (num_kv_heads, num_heads), (num_kv_heads, num_heads + num_kv_heads)
        tensors = [
            whole._replace(num_heads=heads, start=start)
            for heads, start in parts[: 2 if in_place else 3]  # v stays as it is
        ]
    return tuple(tensors)


def output_names(names: tuple[str, ...], options: Options) -> tuple[str, ...]:
    """Return what the outputs are called in messages."""
    return ("q_out", "k_cache", "v_cache") if options.cache else out_names(names)


def _norm_problem(
    given: dict[str, ArraySpec], num_heads: tuple[int, ...], head_dim: int, options: Options
) -> NormProblem | None:
    """Check the weights of a norm."""
    norm = options.norm
    if norm is None:
        return None
    if head_dim > MAX_NORM_DIM:
        raise ValueError(f"head_dim must be at most {MAX_NORM_DIM} with a norm, got {head_dim}")
    of_weights = {name: array for name, array in given.items() if name in OF_WEIGHTS}
    for name, array in of_weights.items():
        check_dtype(name, array, FLOATS)
        first = next(iter(of_weights))
        if array.dtype != of_weights[first].dtype:
            raise TypeError(
                f"{name} must have {first}'s dtype {of_weights[first].dtype}, got {array.dtype}"
            )
        heads = num_heads[name == "k_weight"] if norm.kind == TOKEN_NORM else 1
        if array.shape != (heads * head_dim,):
            raise ValueError(
                f"{name} must have the shape {(heads * head_dim,)} with norm={norm.kind!r}, got "
                f"{array.shape}"
            )
    weights = [
        of_weights.get("q_weight", of_weights.get("weight")),
        of_weights.get("k_weight"),
    ]
    return NormProblem(
        norm=norm,
        dtype=next((array.dtype for array in of_weights.values()), "float32"),
        strides=tuple(array.strides[0] if array else None for array in weights),  # type: ignore[arg-type]
        alignments=tuple(array.alignment if array else 16 for array in weights),  # type: ignore[arg-type]
    )


def _cache_view(
    name: str, cache: ArraySpec, x: ArraySpec, view: Canonical, how: Cache
) -> Canonical:
    """See a cache as (blocks, places in a block, heads, head_dim)."""
    *_, num_heads, head_dim = view.shape
    check_dtype(name, cache, ("uint8", how.dtype) if how.dtype else (x.dtype, *FLOATS_8))
    shape, strides = cache.shape, cache.strides
    if len(shape) == 2:  # (slots, heads * head_dim)
        if shape[1] != num_heads * head_dim:
            raise ValueError(
                f"{name} must have the shape (slots, {num_heads * head_dim}), got {shape}"
            )
        shape = shape[0], num_heads, head_dim
        strides = strides[0], head_dim * strides[1], strides[1]
    heads, place = (-3, -2) if how.layout == "HND" else (-2, -3)
    if len(shape) not in (3, 4) or (shape[heads], shape[-1]) != (num_heads, head_dim):
        wanted = "heads, slots, head_dim" if how.layout == "HND" else "slots, heads, head_dim"
        raise ValueError(
            f"{name} must have the shape ({wanted}) or (blocks, {wanted}), with {num_heads} heads "
            f"and head_dim {head_dim}, got {cache.shape}"
        )
    if cache.device != x.device:
        raise ValueError(f"{name} must be on its input's device {x.device}, got {cache.device}")
    if not cache.writable:
        raise ValueError(f"{name} must be writable, got an array that is read-only or does not say")
    if may_overlap_itself(cache):
        raise ValueError(
            f"{name} must not overlap itself, got strides {cache.strides} for shape {cache.shape}"
        )
    block = (shape[0], strides[0]) if len(shape) == 4 else (1, 0)
    return Canonical(
        (block[0], shape[place], num_heads, head_dim),
        (block[1], strides[place], strides[heads], strides[-1]),
    )


def _cache_problem(
    given: dict[str, ArraySpec],
    dtype: str,
    tokens: tuple[int, int],
    outs: tuple[ArraySpec, ...],
    out_views: list[Canonical],
    options: Options,
) -> CacheProblem | None:
    """Check the slots and scales of caches."""
    if options.cache is None:
        return None
    caches, of_each = outs[1:], [view.shape[:2] for view in out_views[1:]]
    if of_each[0] != of_each[1] or caches[0].dtype != caches[1].dtype:
        raise ValueError(
            f"v_cache must have k_cache's blocks, block size and dtype, {of_each[0]} of "
            f"{caches[0].dtype}, got {of_each[1]} of {caches[1].dtype}"
        )
    num_blocks, block_size = of_each[0]
    if num_blocks * block_size > MAX_ROWS:
        raise ValueError(
            f"k_cache must have at most {MAX_ROWS} slots, got {num_blocks * block_size}"
        )
    slots = given["slot_mapping"]
    check_dtype("slot_mapping", slots, ("int32", "int64"))
    if slots.shape not in (tokens, *([tokens[1:]] if tokens[0] == 1 else [])):
        raise ValueError(
            f"slot_mapping must have the shape {tokens}, one for each token, or {tokens[1:]} of "
            f"one batch, got {slots.shape}"
        )
    element = options.cache.dtype or caches[0].dtype
    of_scales = {name: given[name] for name in ("k_scale", "v_scale") if name in given}
    for name in ("k_scale", "v_scale"):
        if name in of_scales:
            first = next(iter(of_scales))
            check_dtype(name, given[name], FLOATS)
            if given[name].dtype != given[first].dtype:
                raise TypeError(
                    f"{name} must have {first}'s dtype {given[first].dtype}, got "
                    f"{given[name].dtype}"
                )
            if given[name].shape not in ((), (1,)):
                raise ValueError(f"{name} must be of one element, got shape {given[name].shape}")
        if element == dtype and (name in given or getattr(options.cache, name) != 1):
            raise ValueError(f"{name} must be None or 1 with a cache of {dtype}, got a scale")
    return CacheProblem(
        dtype=element,
        slot_dtype=slots.dtype,
        slot_strides=(slots.strides[0] if len(slots.shape) == 2 else 0, slots.strides[-1]),
        scale_dtype=next((array.dtype for array in of_scales.values()), "float32"),
        num_blocks=num_blocks,
        block_size=block_size,
        scales=(options.cache.k_scale, options.cache.v_scale),
    )


def out_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return what the outputs are called in messages."""
    return ("out",) if len(names) == 1 else tuple(f"{name}_out" for name in names)


def implicit_position(positions: int | None, table: TableSpec, num_tokens: int) -> int:
    """Return the position of the first token, or refuse positions that the table does not hold."""
    shape = table.shape
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
    if options.layout is None and len(xs[0].shape) == 3:
        _check_split(names, xs, options.head_dim)
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


def _check_split(names: tuple[str, ...], xs: tuple[ArraySpec, ...], head_dim: int | None) -> None:
    """Refuse a head_dim that splits nothing of three axes: they may be tokens and heads already."""
    if all(x.shape[-1] == head_dim for x in xs):
        raise ValueError(
            f"head_dim must be None where the heads of {' and '.join(names)} are an axis already, "
            f"or layout='bshd' must say that there is one head, got head_dim={head_dim} for shape "
            f"{xs[0].shape}"
        )


def _check_rotary_dim(table: TableSpec, head_dim: int, offset: int) -> int:
    """Return how many elements of a head turn, which with their offset must fit the head."""
    rotary_dim = 2 * table.shape[-1]
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
    rows: dict[str, ArraySpec],
) -> None:
    """Refuse a table by batch and token (and head) that does not match the tensors."""
    if len(shape) == 2:
        return
    for name, array in rows.items():
        raise ValueError(
            f"{name} must be None with a table by batch and token, {shape}, got an array of "
            f"shape {array.shape}"
        )
    if shape[0] not in (1, batch) or shape[1] != num_tokens:
        raise ValueError(
            f"table must have the shape ({batch} or 1, {num_tokens}, ...) of batch and tokens, "
            f"got {shape}: if its axes are others, name them, such as axes='sh' for tokens and "
            "heads"
        )
    if len(shape) == 4 and shape[2] != 1 and any(shape[2] != heads for heads in num_heads):
        raise ValueError(
            "table must have 1 head or as many as every tensor, "
            f"{' and '.join(map(str, num_heads))}, got {shape[2]} heads in shape {shape}"
        )


def _table_view(table: ArraySpec, form: str, by_position: bool) -> View:
    *rows, pair = table.strides[:-1] if form == MATRICES else table.strides
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
    given: dict[str, ArraySpec],
    batch: int,
    num_tokens: int,
    num_pairs: int,
    options: Options,
) -> str:
    """Check the arrays that tell the positions of tokens; return what they are."""
    for name, array in given.items():
        check_dtype(name, array, ("int32", "int64"))
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
        if options.mrope_interleaved:
            _check_interleaved(sections, num_pairs)
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


def _check_interleaved(sections: tuple[int, int, int], num_pairs: int) -> None:
    """Refuse sections of which not every pair finds a place among every third one of its axis."""
    for axis, most in ((1, (num_pairs + 1) // 3), (2, num_pairs // 3)):
        if sections[axis] > most:
            raise ValueError(
                f"mrope_section must have at most {most} pairs of axis {axis}, every third one of "
                f"{num_pairs}, with mrope_interleaved=True, got {sections}"
            )


def _check_positions(shape: tuple[int, ...], batch: int, num_tokens: int, of_axes: bool) -> None:
    axes = (NUM_AXES,) if of_axes else ()
    if of_axes and batch == NUM_AXES and shape == (NUM_AXES, num_tokens):
        raise ValueError(
            f"positions must have the shape {(NUM_AXES, 1, num_tokens)} of three axes or "
            f"{(NUM_AXES, batch, num_tokens)} of axes and batches where there are {batch} batches, "
            f"got {shape}, which could be either's"
        )
    if shape not in (
        (*axes, num_tokens),
        (*axes, 1, num_tokens),
        (*axes, batch, num_tokens),
    ):
        raise ValueError(
            f"positions must have the shape {(*axes, num_tokens)}, one for each token"
            f"{' and axis' if of_axes else ''}, or {(*axes, batch, num_tokens)}, got {shape}"
        )
