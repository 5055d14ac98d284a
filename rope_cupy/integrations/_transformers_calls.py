"""What a method calls in place of its rotary function: one call of rope_cupy, or the function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch

from rope_cupy import apply_norm_rotary, apply_qk_norm_rotary

from ._transformers_forms import Probed, as_given, fused, options_of, rotary_dim, table_of
from ._transformers_norms import Deferred, fused_options, is_plain, value

logger = logging.getLogger(__name__)

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
COMPLEX = torch.complex64, torch.complex128
DEVICES = "cpu", "cuda"


def stand_in(probed: Probed, rounding: str) -> Callable[..., Any]:
    """Return what takes the arguments of a rotary function and gives its results by one call.

    Arguments for which that is not known go to the function itself: others than it was probed with,
    of other axes or dtypes, tensor subclasses, cosines that want a gradient, or what rope_cupy
    refuses (forward-mode derivatives, transforms of torch.func), which has then written nothing.
    """
    original, names = probed.original, probed.parameters.names

    def rotate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        layout = layout_of(probed, given)
        reason: object = "its arguments are not those that were probed"
        if layout is not None:
            try:
                return rotate_known(probed, rounding, layout, given)
            except (TypeError, ValueError) as refusal:
                reason = refusal
        if not torch.compiler.is_compiling():
            logger.debug("left to %s: %s", original.__name__, reason)
        plain = [value(each) for each in args]
        return original(*plain, **{name: value(each) for name, each in kwargs.items()})

    return rotate


def rotate_known(probed: Probed, rounding: str, layout: str, given: dict[str, Any]) -> Any:
    """Rotate arguments that fit a layout, with their norms where all of them were deferred."""
    arrays = [given[name] for name in probed.parameters.arrays]
    deferred = [isinstance(each, Deferred) for each in arrays]
    if all(deferred):
        options = fused_options(tuple(arrays), promotes)
        if options is not None:
            return rotate_normed(probed, rounding, layout, given, *options)
    if any(deferred):
        values = zip(probed.parameters.arrays, map(value, arrays), strict=True)
        given = {**given, **dict(values)}
    return fused(probed, rounding, layout, given)


def rotate_normed(
    probed: Probed,
    rounding: str,
    layout: str,
    given: dict[str, Any],
    weights: list[Any],
    norm: dict[str, Any],
) -> Any:
    """Normalise and rotate what was deferred, in one call."""
    form, xs = probed.form, [given[name].x for name in probed.parameters.arrays]
    table = table_of(probed, rounding, given)
    options = {**options_of(probed, rounding, layout, given), **norm}
    if len(xs) == 1:
        return as_given(form, apply_norm_rotary(xs[0], weights[0], table, **options))
    q, k = apply_qk_norm_rotary(xs[0], xs[1], weights[0], weights[1], table, **options)
    return as_given(form, q), as_given(form, k)


def layout_of(probed: Probed, given: dict[str, Any]) -> str | None:
    """Return the layout of arguments that a form was found for, None of others."""
    parameters, jit = probed.parameters, cast(Any, torch.jit)
    if not given.keys() <= parameters.known or jit.is_tracing():
        return None
    xs: list[Any] = [_plain(given.get(name)) for name in parameters.arrays]
    angles: list[Any] = [given.get(name) for name in parameters.angles]
    for each in (*xs, *angles):
        if not is_plain(each):
            return None
    x, cos = xs[0], angles[0]
    dim = given.get("unsqueeze_dim", parameters.unsqueeze_dim)
    if dim is not None and dim < 0:
        dim += cos.ndim + 1
    found = probed.layouts.get((x.ndim, cos.ndim, dim))
    if found is None or not _is_known(probed, xs, angles):
        return None
    layout, axes = found[:2]
    shape, rows = x.shape, cos.shape
    if rows[-2] != shape[layout.index("s")] or (axes == "bs" and rows[0] not in (1, shape[0])):
        return None
    if len(xs) == 2:
        wanted, heads = list(shape), layout.index("h")
        wanted[heads] = xs[1].shape[heads]
        if wanted != list(xs[1].shape):
            return None
    rotated = rotary_dim(probed.form, given, parameters.angles)
    if rotated == shape[-1] or (probed.takes_parts and rotated < shape[-1]):
        return layout
    return None


def _plain(x: Any) -> Any:
    return x.x if isinstance(x, Deferred) else x


def _is_known(probed: Probed, xs: list[Any], angles: list[Any]) -> bool:
    """Whether dtypes and devices are those of a call of rope_cupy, and the function's own."""
    x, cos = xs[0], angles[0]
    dtype, device, table_dtype = x.dtype, x.device, cos.dtype
    if device.type not in DEVICES or dtype not in FLOATS:
        return False
    if len(xs) == 2 and (xs[1].dtype != dtype or xs[1].device != device):
        return False
    if table_dtype not in (COMPLEX if probed.form.angles == "complex" else FLOATS):
        return False
    for each in angles:
        if each.dtype != table_dtype or each.shape != cos.shape or each.device != device:
            return False
        if each.requires_grad and torch.is_grad_enabled():
            return False
    return probed.keeps_dtype or table_dtype == dtype or not promotes(x, cos)


def promotes(x: Any, other: Any) -> bool:
    """Whether an operation of two tensors gives another dtype than that of x, which matters.

    Within autocast it does not: what takes the result makes it of autocast's dtype again.
    """
    if torch.promote_types(x.dtype, other.dtype) == x.dtype:
        return False
    device_type = x.device.type
    return not (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == x.dtype
    )
