"""The joint arrays that several calls write behind one another: their sizes, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from . import arrays
from .call import Call
from .options import QKV, names_of_axes

MAX_SHAPES = 1024  # of streams that are known


def labels(num: int) -> list[str]:
    """Return what messages call streams."""
    return [f"streams[{i}]" for i in range(num)]


def labelled(label: str, function: Callable[..., Any], *given: Any) -> Any:
    """Return what a function makes of one of several calls, whose refusals tell which it is."""
    try:
        return function(*given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from error


def tokens(calls: Sequence[Call]) -> tuple[int, tuple[int, ...]]:
    """Return the axis of tokens, and how many each call has; refuse arrays that do not match."""
    _check_dtypes(calls)
    return _known_tokens(*_shapes(calls))


def traced_tokens(calls: Sequence[Call]) -> tuple[int, tuple[int, ...]]:
    """Return what `tokens` does in a graph that is traced, where sizes may change."""
    _check_dtypes(calls)
    return _tokens(*_shapes(calls))


def _check_dtypes(calls: Sequence[Call]) -> None:
    """Refuse arrays of one library that differ in dtype or device, whichever way the calls go."""
    first = calls[0].xs[0]
    for i, call in enumerate(calls):
        for name, x in zip(QKV, call.xs, strict=True):
            check_alike(f"streams[{i}].{name}", x, "streams[0].q", first)


def check_alike(name: str, x: Any, other_name: str, other: Any) -> None:
    """Refuse an array that differs in dtype or device from another one of its library."""
    if type(x) is not type(other):
        return
    for what in ("dtype", "device"):
        own, wanted = getattr(x, what, None), getattr(other, what, None)
        if own != wanted:
            kind = TypeError if what == "dtype" else ValueError
            raise kind(f"{name} must have the {what} of {other_name}, {wanted}, got {own}")


def check_k(q: Any, k: Any, layout: str | None, splits: bool) -> None:
    """Refuse a k that differs from q in more than heads and tokens, where it has its own table."""
    check_alike("k", k, "q", q)
    shape, wanted = arrays.shape_of("k", k), arrays.shape_of("q", q)
    axes = names_of_axes(len(wanted), layout, splits)
    if len(shape) != len(wanted):
        raise ValueError(f"k must have {len(wanted)} axes like q, got shape {shape}")
    for axis, own, other in zip(axes, shape, wanted, strict=False):
        if axis in "bd" and own != other:
            raise ValueError(
                f"k must have q's shape {wanted} on every axis but heads and tokens, got {shape}"
            )


def _shapes(calls: Sequence[Call]) -> tuple[Any, str | None, bool]:
    """Return the shapes of each call's q, k and v, and what names their axes."""
    shapes = []
    for call in calls:
        q, k, v = call.xs
        shapes.append((arrays.shape_of("q", q), arrays.shape_of("k", k), arrays.shape_of("v", v)))
    options = calls[0].options
    return (*shapes,), options.layout, options.head_dim is not None


def _tokens(shapes: Any, layout: str | None, splits: bool) -> tuple[int, tuple[int, ...]]:
    for name, shape in zip(QKV, shapes[0], strict=True):
        axes = names_of_axes(len(shape), layout, splits)
        if len(axes) != len(shape) or not axes:
            raise ValueError(f"streams[0].{name} must have the axes of layout, got shape {shape}")
    axis, heads = axes.index("s"), axes.index("h")
    for i, of_call in enumerate(shapes):
        own = arrays.resized(of_call[0], heads, 0)
        for name, shape in zip(QKV, of_call, strict=True):
            if len(shape) != len(own) or arrays.resized(shape, heads, 0) != own:
                raise ValueError(
                    f"streams[{i}]: {name} must have q's shape on every axis but heads, "
                    f"{of_call[0]}, got {shape}"
                )
        for name, shape, wanted in zip(QKV, of_call, shapes[0], strict=True):
            if arrays.resized(shape, axis, 0) != arrays.resized(wanted, axis, 0):
                raise ValueError(
                    f"streams[{i}].{name} must have the shape of streams[0].{name}, {wanted}, but "
                    f"for its tokens, got {shape}"
                )
    return axis, tuple([of_call[0][axis] for of_call in shapes])


_known_tokens = lru_cache(maxsize=MAX_SHAPES)(_tokens)


def outputs(
    calls: Sequence[Call], out: tuple[Any, ...] | None, axis: int, sizes: Sequence[int]
) -> tuple[Any, ...]:
    """Return the joint arrays: new ones, or those that are given, whose shapes are checked."""
    total = sum(sizes)
    if out is not None:
        check_outputs(calls, out, axis, total)
        return out
    named = zip(QKV, calls[0].xs, strict=True)
    return tuple([arrays.library_of(name, x).empty_sized(x, axis, total) for name, x in named])


def check_outputs(calls: Sequence[Call], out: tuple[Any, ...], axis: int, total: int) -> None:
    """Refuse joint arrays that are not of all tokens."""
    for name, x, y in zip(QKV, calls[0].xs, out, strict=True):
        wanted = arrays.resized(arrays.shape_of(name, x), axis, total)
        shape = arrays.shape_of(f"{name}_out", y)
        if shape != wanted:
            raise ValueError(f"{name}_out must have the shape {wanted} of all tokens, got {shape}")


def parts(
    calls: Sequence[Call], outs: Sequence[Any], axis: int, sizes: Sequence[int]
) -> list[Call]:
    """Return calls that write their parts of the joint arrays."""
    written = []
    for call, (start, stop) in zip(calls, pairwise(accumulate(sizes, initial=0)), strict=True):
        views = [
            arrays.library_of(f"{name}_out", y).part(y, axis, start, stop)
            for name, y in zip(QKV, outs, strict=True)
        ]
        written.append(call._replace(out=tuple(views)))
    return written


def results(
    calls: Sequence[Call], out: tuple[Any, ...] | None, outs: Sequence[Any]
) -> tuple[Any, ...]:
    """Tell that joint arrays are written, and return what the caller gets for them."""
    if out is not None:
        for name, y in zip(QKV, out, strict=True):
            arrays.library_of(name, y).mark_written((y,))
        return out
    three = zip(QKV, outs, calls[0].xs, strict=True)
    return tuple([arrays.library_of(name, x).result(y, x) for name, y, x in three])
