"""Shared by the peers' modules: calls without a gradient, views that are kept, and tables."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

import rope_cupy

P = ParamSpec("P")
R = TypeVar("R")
MAX_VIEWS = 256  # that are kept
_views: dict[Any, tuple[Any, ...]] = {}  # with the places of what they view
_counts: dict[Any, Any] = {}  # by device and number of bits


def inference_only(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that records no gradient, like the peer's kernel.

    So weights may be an `nn.Parameter`, and leaves may be written in place, in any grad mode of
    PyTorch.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        torch = sys.modules.get("torch")
        if torch is None or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        for array in (*args, *kwargs.values()) if kwargs else args:
            if getattr(array, "requires_grad", False):
                with torch.no_grad():
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def view_of(make: Callable[..., R], x: Any, y: Any = None, about: tuple[Any, ...] = ()) -> R:
    """Return make(x, y, *about), or make(x, *about): a table, which only views the arrays.

    What is made of PyTorch's tensors is kept as long as they live and keep their place in memory:
    a model passes the tables of a step to each of its layers. Views see values that change. A
    tensor must be contiguous, since a reshape of others could copy.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():
        return make(x, *about) if y is None else make(x, y, *about)
    kept = _views.get((make, about, id(x), id(y)))
    if kept:
        view, place, place_of_y, _ = kept
        if place == _place(x) and (y is None or place_of_y == _place(y)):
            return view  # type: ignore[no-any-return]
    return _kept_view(make, x, y, about)


def _place(x: Any) -> Any:
    """Return what of a tensor may change, such as by an assignment to `.data`."""
    return x.data_ptr(), x.shape, x.is_contiguous(), x.requires_grad


def _kept_view(make: Callable[..., R], x: Any, y: Any, about: tuple[Any, ...]) -> R:
    """Return the view of `view_of`, which is kept if it may be."""
    import torch

    arrays = (x,) if y is None else (x, y)
    try:
        places = [_place(array) for array in arrays if type(array) is torch.Tensor]
    except RuntimeError:  # of tensors without memory, which the call refuses by their names
        places = []
    if len(places) < len(arrays) or not all(place[2:] == (True, False) for place in places):
        return make(*arrays, *about)
    key = make, about, id(x), id(y)

    def forget(_: object) -> None:
        _views.pop(key, None)

    view = make(*[array.detach() for array in arrays], *about)  # which do not keep the tensors
    refs = [weakref.ref(array, forget) for array in arrays]
    put(_views, key, (view, places[0], places[-1], refs), MAX_VIEWS)
    return view


def put(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put a value into a dict of at most `most` values; the oldest make room."""
    while len(kept) >= most:
        with suppress(StopIteration, RuntimeError):  # other threads make room too
            kept.pop(next(iter(kept)), None)
    kept[key] = value


def cache_table(cos_sin_cache: Any) -> rope_cupy.RotaryTable:
    """Return the table of a cache, each row of which has cosines, then sines."""
    return view_of(_of_cache, cos_sin_cache)


_of_cache = rope_cupy.RotaryTable.from_cache


def with_leading_axes(x: Any, ndim: int) -> Any:
    """Return x with axes of size 1 added in front, up to `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + tuple(x.shape)) if x.ndim < ndim else x


def broadcast_axes(shape: tuple[int, ...], *parts: Any) -> tuple[str, tuple[Any, ...]]:
    """Return the layout of x (a, b, c, d), and a table's parts with batch, tokens and heads first.

    The parts broadcast against the axes a, b and c, so each of their first three sizes is 1 or the
    same. The tokens are axis b if the parts have one row for all of c, and else axis c.
    """
    rows = tuple(parts[0].shape)
    if any(size not in (1, whole) for size, whole in zip(rows[:3], shape, strict=False)):
        raise ValueError(f"the table must broadcast against x of shape {tuple(shape)}, got {rows}")
    if rows[2] == 1:
        layout, tokens, own = "bshd", shape[1], rows[1]
    else:
        layout, tokens, own = "bhsd", shape[2], rows[2]
        parts = tuple([part.swapaxes(1, 2) for part in parts])
    if own != tokens:
        parts = tuple([_repeated(part, tokens) for part in parts])
    return layout, parts


def _repeated(part: Any, tokens: int) -> Any:
    """Return a table of one token as a view of many."""
    shape = (part.shape[0], tokens, *part.shape[2:])
    return part.expand(shape) if hasattr(part, "expand") else np.broadcast_to(part, shape)


def half_width(cos: Any, sin: Any) -> rope_cupy.RotaryTable:
    """Return the table of full-width cosines and sines, without the last column of an odd width."""
    width = cos.shape[-1]
    if width % 2:
        cos, sin = cos[..., : width - 1], sin[..., : width - 1]
    return rope_cupy.RotaryTable.from_full_width(cos, sin)


def cast(x: Any, dtype: Any) -> Any:
    """Return x in a dtype of its own library, itself if it has that."""
    if x.dtype == dtype:
        return x
    return x.to(dtype=dtype) if hasattr(x, "to") else x.astype(dtype)


def sections_within(pairs: int, first: int, second: int) -> tuple[int, int, int]:
    """Return how many pairs three axes have one after another; the third has all others."""
    first = min(first, pairs)
    second = min(second, pairs - first)
    return first, second, pairs - first - second


def empty_like(x: Any) -> Any:
    """Return a new contiguous tensor of PyTorch."""
    torch = sys.modules["torch"]
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def itself_or_new(x: Any) -> Any:
    """Return x, to be written in place, or a new array like it if its rows are not contiguous."""
    if hasattr(x, "stride"):
        return x if x.stride(-1) == 1 else x.new_empty(x.shape)
    if x.strides[-1] == x.itemsize:
        return x
    return sys.modules[type(x).__module__.partition(".")[0]].empty(x.shape, x.dtype)


def by_token_of_three_axes(
    cos: Any, sin: Any, width: int | None = None
) -> tuple[tuple[Any, Any], Any]:
    """Return tables (3, tokens..., r) as rows of one table, and the row of each axis and token.

    With `width` the rows have the first columns alone.
    """
    axes = tuple(cos.shape[:-1])
    count, cos, sin = math.prod(axes), cos[..., :width], sin[..., :width]
    return (cos.reshape(count, -1), sin.reshape(count, -1)), _count(count, cos).reshape(axes)


def _count(count: int, like: Any) -> Any:
    """Return 0 .. count - 1 where `like` lies, of PyTorch's a part of numbers that are kept."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(like, torch.Tensor):
        return sys.modules[type(like).__module__.partition(".")[0]].arange(count)
    if torch.compiler.is_compiling():
        return torch.arange(count, device=like.device)
    about = like.device, count.bit_length()
    if about not in _counts:
        with torch.inference_mode(False):  # else a backward pass could not keep them
            # The host waits for the copy, so calls on every stream may read it.
            numbers = torch.arange(2 ** count.bit_length(), device="cpu")
            _counts[about] = numbers.to(like.device)
    return _counts[about][:count]
