"""What a method calls in place of its rotary function: one call of rope_cupy, or the function.

What does not change from call to call is decided by functions of what a graph is traced for, which
torch.compile calls once and does not trace: a graph that is traced of these calls checks little
more before it runs than that of the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.compiler import is_compiling

from rope_cupy import apply_norm_rotary, apply_qk_norm_rotary

from ._transformers_forms import Probed, as_given, fused, options_of, rotary_dim, table_of
from ._transformers_norms import (
    About,
    Deferred,
    about,
    constant,
    fused_options,
    is_plain,
    promotes,
    value,
)

logger = logging.getLogger(__name__)

FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
COMPLEX = torch.complex64, torch.complex128
DEVICES = "cpu", "cuda"


def stand_in(probed: Probed, rounding: str) -> Callable[..., Any]:
    """Return what takes the arguments of a rotary function and gives its results by one call.

    Arguments for which that is not known go to the function itself: others than it was probed with,
    of other axes or dtypes, tensor subclasses, cosines that want a gradient, or what rope_cupy
    refuses (forward-mode derivatives, transforms of torch.func), which has then written nothing.
    So does a step of one token in a graph that is compiled.
    """

    original, known = probed.original, constant((probed, rounding))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def layout_for(*given: Any) -> tuple[str, str] | None:
        return _layout_for(probed, *given)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        form, rounding = known()
        reason: object = "its arguments are not those that were probed"
        if not (is_compiling() and _is_step(form, args, kwargs)):
            given = dict(zip(form.parameters.names, args, strict=False))
            given.update(kwargs)
            layout = layout_of(form, given, layout_for)
            if layout is not None:
                try:
                    return rotate_known(form, rounding, layout, given)
                except (TypeError, ValueError) as refusal:
                    reason = refusal
        if not is_compiling():
            logger.debug("left to %s: %s", original.__name__, reason)
        plain = [value(each) for each in args]
        return original(*plain, **{name: value(each) for name, each in kwargs.items()})

    return rotate


def _is_step(probed: Probed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether arguments are those of one token, by the first of cosines or numbers.

    In a graph the compiler makes norms, rotation and what writes the cache a few kernels of a
    microsecond each. An operator would cost the host more than it saves.
    """
    place, name = len(probed.parameters.arrays), probed.parameters.angles[0]
    cos: Any = args[place] if place < len(args) else kwargs.get(name)
    return getattr(cos, "ndim", 0) > 1 and bool(cos.shape[-2] == 1)


def rotate_known(probed: Probed, rounding: str, layout: str, given: dict[str, Any]) -> Any:
    """Rotate arguments that fit a layout, with their norms where all of them were deferred."""
    names = probed.parameters.arrays
    deferred = [isinstance(given[name], Deferred) for name in names]
    if all(deferred):
        options = fused_options(tuple([given[name] for name in names]))
        if options is not None:
            return rotate_normed(probed, rounding, layout, given, *options)
    if any(deferred):
        given = {**given, **{name: value(given[name]) for name in names}}
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


def layout_of(
    probed: Probed, given: dict[str, Any], layout_for: Callable[..., tuple[str, str] | None]
) -> str | None:
    """Return the layout of arguments that a form was found for, None of others.

    `layout_for` is what decides of all but sizes.
    """
    parameters = probed.parameters
    xs: list[Any] = [_plain(given.get(name)) for name in parameters.arrays]
    angles: list[Any] = [given.get(name) for name in parameters.angles]
    dim = given.get("unsqueeze_dim", parameters.unsqueeze_dim)
    found = layout_for(dim, *given, *[about(each) for each in (*xs, *angles)])
    if found is None:
        return None
    (layout, axes), shape, rows = found, xs[0].shape, angles[0].shape
    if rows[-2] != shape[layout.index("s")] or (axes == "bs" and rows[0] not in (1, shape[0])):
        return None
    if len(angles) == 2 and angles[1].shape != rows:
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


def _layout_for(probed: Probed, dim: Any, *given: Any) -> tuple[str, str] | None:
    """Return the layout of arguments and the axes of cosines, by all but their sizes.

    Given are the names of arguments, and then what About holds of tensors: those that are rotated,
    and cosines and sines.
    """
    parameters, jit = probed.parameters, cast(Any, torch.jit)
    names = [each for each in given if isinstance(each, str)]
    tensors = [About(*each) for each in given if not isinstance(each, str)]
    if not parameters.known.issuperset(names) or jit.is_tracing():
        return None
    if not all([is_plain(each.type) for each in tensors]):
        return None
    xs, angles = tensors[: len(parameters.arrays)], tensors[len(parameters.arrays) :]
    x, cos = xs[0], angles[0]
    if dim is not None and dim < 0:
        dim += cos.ndim + 1
    found = probed.layouts.get((x.ndim, cos.ndim, dim))
    return found[:2] if found is not None and _is_known(probed, xs, angles) else None


def _is_known(probed: Probed, xs: list[About], angles: list[About]) -> bool:
    """Return whether dtypes and devices are those of a call of rope_cupy, and the function's."""
    x, cos = xs[0], angles[0]
    if x.device.type not in DEVICES or x.dtype not in FLOATS:
        return False
    if any([each[1:4] != x[1:4] for each in xs]):
        return False
    if cos.dtype not in (COMPLEX if probed.form.angles == "complex" else FLOATS):
        return False
    if any([each[1:3] != cos[1:3] or each.device != x.device for each in angles]):
        return False
    if torch.is_grad_enabled() and any([each.requires_grad for each in angles]):
        return False
    return probed.keeps_dtype or cos.dtype == x.dtype or not promotes(x, cos)
