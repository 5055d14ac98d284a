"""Shared by the peers' modules: calls without a gradient, and tables that broadcast."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

import rope_cupy

P = ParamSpec("P")
R = TypeVar("R")


def inference_only(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that records no gradient, like the peer's kernel.

    So weights may be an `nn.Parameter`, and leaves may be written in place, in any grad mode of
    PyTorch.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for array in (*args, *kwargs.values()) if kwargs else args:
            if getattr(array, "requires_grad", False):
                with sys.modules["torch"].no_grad():
                    return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


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


def itself_or_new(x: Any) -> Any:
    """Return x, to be written in place, or a new array like it if its rows are not contiguous."""
    if hasattr(x, "stride"):
        return x if x.stride(-1) == 1 else x.new_empty(x.shape)
    if x.strides[-1] == x.itemsize:
        return x
    return sys.modules[type(x).__module__.partition(".")[0]].empty(x.shape, x.dtype)


def by_token_of_three_axes(cos: Any, sin: Any) -> tuple[tuple[Any, Any], Any]:
    """Return tables (3, tokens..., r) as rows of one table, and the row of each axis and token."""
    axes = tuple(cos.shape[:-1])
    count, torch = math.prod(axes), sys.modules.get("torch")
    if torch is not None and isinstance(cos, torch.Tensor):
        rows = torch.arange(count, device=cos.device)
    else:
        rows = sys.modules[type(cos).__module__.partition(".")[0]].arange(count)
    return (cos.reshape(count, -1), sin.reshape(count, -1)), rows.reshape(axes)
