"""Inputs seen as (batch, tokens, heads, head_dim), and their outputs. Pure."""

from __future__ import annotations

from ..memory import FLOATS, ArraySpec
from ..options import DEFAULT_LAYOUTS, Options, Packed, names_of_axes
from .arrays import check_device, check_dtype, check_out, output_names
from .cache import cache_view
from .records import INPUT_OF, MAX_HEAD_DIM, MAX_ROWS, BSHDView, RotaryTensor, View


def check_inputs(names: tuple[str, ...], xs: tuple[ArraySpec, ...]) -> None:
    """Refuse inputs of several dtypes, devices or ranks: no output could be made for them."""
    first = xs[0]
    for name, x in zip(names, xs, strict=True):
        check_dtype(name, x, FLOATS)
        if x.dtype != first.dtype:
            raise TypeError(f"{name} must have {names[0]}'s dtype {first.dtype}, got {x.dtype}")
        check_device(name, x, names[0], first)
        if len(x.shape) != len(first.shape):
            raise ValueError(
                f"{name} must have {len(first.shape)} axes like {names[0]}, got shape {x.shape}"
            )


def bshd_view(name: str, x: ArraySpec, options: Options) -> BSHDView:
    """Return `x` seen as (batch, tokens, heads, head_dim); head_dim may split its last axis."""
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
    return BSHDView(
        tuple(shape[at[axis]] if axis in at else 1 for axis in "bshd"),  # type: ignore[arg-type]
        tuple(strides[at[axis]] if axis in at else 0 for axis in "bshd"),  # type: ignore[arg-type]
    )


def input_views(
    names: tuple[str, ...], xs: tuple[ArraySpec, ...], options: Options
) -> list[BSHDView]:
    """Return the views of the inputs; refuse any that differ on another axis than heads."""
    views = [bshd_view(name, x, options) for name, x in zip(names, xs, strict=True)]
    if options.layout is None and len(xs[0].shape) == 3:
        _check_split(names, xs, options.head_dim)
    shared = [(*view.shape[:2], view.shape[3]) for view in views]
    for name, shape in zip(names, shared, strict=True):
        if shape != shared[0]:
            remedy = _remedy(xs[0], xs[names.index(name)], options)
            raise ValueError(
                f"{name} must have {names[0]}'s shape on every axis but heads, (batch, tokens, "
                f"head_dim) = {shared[0]}, got {shape}{remedy}"
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


def _remedy(first: ArraySpec, x: ArraySpec, options: Options) -> str:
    """Return what to do where the axis that differs may hold heads, and was taken for another."""
    layout, rank = options.layout, len(x.shape)
    axes = names_of_axes(rank, layout, options.head_dim is not None)
    differing = [i for i in range(rank) if first.shape[i] != x.shape[i]]
    taken_for = "".join([axes[i] for i in differing])
    if taken_for == "d" and rank == len("bsd"):
        return ": if the last axis holds all heads, pass head_dim"
    if taken_for != "s":
        return ""
    where = f": if axis {differing[0]} is heads"
    if layout is not None or options.head_dim is not None:
        return f"{where}, layout must say so, got layout={layout!r}"
    wanted = "bhsd"[-rank:]
    return f"{where}, as in ({', '.join(wanted)}), pass layout={wanted!r}"


def _check_split(names: tuple[str, ...], xs: tuple[ArraySpec, ...], head_dim: int | None) -> None:
    """Refuse a head_dim that is the last of three axes: these may be tokens and heads already."""
    if all(x.shape[-1] == head_dim for x in xs):
        raise ValueError(
            f"head_dim must be None where the heads of {' and '.join(names)} are an axis already, "
            f"or layout='bshd' must say that there is one head, got head_dim={head_dim} for shape "
            f"{xs[0].shape}"
        )


def output_views(
    names: tuple[str, ...],
    xs: tuple[ArraySpec, ...],
    outs: tuple[ArraySpec, ...],
    views: list[BSHDView],
    options: Options,
) -> list[BSHDView]:
    """Check the outputs; return their views, as of their inputs or of caches."""
    if options.cache and views[2].shape != views[1].shape:
        raise ValueError(f"v must have k's shape {xs[1].shape}, got {xs[2].shape}")
    out_views = []
    of_outs = output_names(names, options, len(outs))
    for name, out, i in zip(of_outs, outs, INPUT_OF[: len(outs)], strict=True):
        x, view = xs[i], views[i]
        if options.cache and name.endswith("_cache"):
            out_views.append(cache_view(name, out, x, view, options.cache))
        else:
            check_out(name, out, x)
            out_views.append(bshd_view("out", out, options))
    return out_views


def tensors_of(
    name: str,
    inputs: tuple[tuple[ArraySpec, ...], list[BSHDView]],
    outputs: tuple[tuple[ArraySpec, ...], list[BSHDView]],
    in_place: bool,
    packed: Packed | None,
) -> tuple[RotaryTensor, ...]:
    """Return the tensors of all arrays, or the three that one packed array, `name`, holds."""
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
            for heads, start in parts[: 2 if in_place else 3]  # In place, nothing is done to v.
        ]
    return tuple(tensors)
