"""What a method calls in place of its rotary function: one call of rope_cupy, or the function.

What does not change from call to call is decided by functions of what a graph is traced for, which
torch.compile calls once and does not trace: a graph that is traced of these calls checks little
more before it runs than that of the model itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.compiler import is_compiling

from rope_cupy import apply_norm_rotary, apply_qk_norm_rotary
from rope_cupy.private_torch import is_traced_by_jit

from ._transformers_forms import Probed, as_given, fused, options_of, rotary_dim, table_of
from ._transformers_norms import (
    TENSORS,
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
MAX_SIGNATURES = (
    256  # of calls whose options are remembered: finding them takes as long as a launch
)


def stand_in(probed: Probed, rounding: str) -> Callable[..., Any]:
    """Return what takes the arguments of a rotary function and gives its results by one call.

    Arguments for which that is not known go to the function itself: others than it was probed with,
    of other axes or dtypes, tensor subclasses, cosines that want a gradient, or what rope_cupy
    refuses (forward-mode derivatives, transforms of torch.func), which has then written nothing.
    So does a step of one token, by the shape of its cosines, in a graph that is compiled: there the
    compiler makes norms, rotation and what writes the cache a few kernels of a microsecond each,
    and an operator would cost the host more than it saves.
    """

    original, (cosines, *_) = probed.original, probed.parameters.angles
    known = constant((probed, rounding, probed.parameters.names.index(cosines), cosines))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def layout_for(*described: Any) -> tuple[str, str] | None:
        return _layout_for(probed, *described)

    @lru_cache(MAX_SIGNATURES)
    def options_for(
        _: tuple[Any, ...], named: tuple[Any, ...], tensors: Any, shapes: Any
    ) -> dict[str, Any] | None:
        return options_of_call(probed, rounding, _layout_for(probed, *named, *tensors), shapes)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        form, rounding, place, name = known()
        angles = args[place] if len(args) > place else kwargs.get(name)
        rows: Any = getattr(angles, "shape", ())
        # This is asked first, and without a function: a graph checks before every run what it read.
        if not (is_compiling() and len(rows) > 1 and rows[-2] == 1):
            given = dict(zip(form.parameters.names, args, strict=False), **kwargs)
            named, tensors, shapes = _described(form, given)
            if is_compiling():
                options = options_of_call(form, rounding, layout_for(*named, *tensors), shapes)
            else:
                find = options_for if _is_remembered(tensors) else options_for.__wrapped__
                options = find(_context(tensors), named, tensors, shapes)
            reason: object = "its arguments are not those that were probed"
            if options is not None:
                try:
                    return rotate_known(form, rounding, options, given)
                except (TypeError, ValueError) as refusal:
                    reason = refusal
            if not is_compiling():
                logger.debug("left to %s: %s", getattr(original, "__name__", original), reason)
        plain = [value(each) for each in args]
        return original(*plain, **{key: value(each) for key, each in kwargs.items()})

    return rotate


def _described(probed: Probed, given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return what decides how arguments are rotated: their names, what About holds, their shapes.

    Of tensors they are those that are rotated, and then cosines and sines. Before the names stands
    where the cosines get an axis of heads.
    """
    parameters = probed.parameters
    dim = given.get("unsqueeze_dim", parameters.unsqueeze_dim)
    arrays = [_plain(given.get(name)) for name in (*parameters.arrays, *parameters.angles)]
    shapes = tuple([getattr(each, "shape", ()) for each in arrays])
    return (dim, *given), tuple([about(each) for each in arrays]), shapes


def _is_remembered(tensors: tuple[Any, ...]) -> bool:
    """Return whether the sizes of tensors are ints, which they are not where a trace is made."""
    return all([each[0] in TENSORS for each in tensors]) and not is_traced_by_jit()


def _context(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what decides beside the arguments: whether gradients are recorded, and autocast."""
    kind = getattr(About(*tensors[0]).device, "type", "cpu")
    is_cast = kind in DEVICES and torch.is_autocast_enabled(kind)  # which refuses "meta"
    return torch.is_grad_enabled(), is_cast and torch.get_autocast_dtype(kind)


def rotate_known(
    probed: Probed, rounding: str, options: dict[str, Any], given: dict[str, Any]
) -> Any:
    """Rotate arguments with these options, with their norms where all of them were deferred."""
    names = probed.parameters.arrays
    deferred = [isinstance(given[name], Deferred) for name in names]
    if all(deferred):
        norm = fused_options(tuple([given[name] for name in names]))
        if norm is not None and _has_rows(options["layout"], norm[1]["norm"], given, names):
            return rotate_normed(probed, rounding, options, given, *norm)
    if any(deferred):
        given = {**given, **{name: value(given[name]) for name in names}}
    return fused(probed, rounding, options, given)


def _has_rows(layout: str, norm: str, given: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Return whether all heads of a token are the rows that a norm was given, and no others."""
    if norm == "head":
        return True
    xs, heads = [given[name].x for name in names], layout.index("h")
    return all([x.stride(heads) == x.shape[-1] * x.stride(-1) for x in xs])


def rotate_normed(
    probed: Probed,
    rounding: str,
    options: dict[str, Any],
    given: dict[str, Any],
    weights: list[Any],
    norm: dict[str, Any],
) -> Any:
    """Normalise and rotate what was deferred, in one call."""
    form, xs = probed.form, [given[name].x for name in probed.parameters.arrays]
    table = table_of(probed, rounding, given)
    if len(xs) == 1:
        return as_given(form, apply_norm_rotary(xs[0], weights[0], table, **options, **norm))
    q, k = apply_qk_norm_rotary(xs[0], xs[1], weights[0], weights[1], table, **options, **norm)
    return as_given(form, q), as_given(form, k)


def options_of_call(
    probed: Probed, rounding: str, found: tuple[str, str] | None, shapes: tuple[Any, ...]
) -> dict[str, Any] | None:
    """Return the options for arguments of these shapes, None where a form was not found for them.

    Found were their layout and the axes of their cosines, by all but sizes.
    """
    if found is None:
        return None
    (layout, axes), count = found, len(probed.parameters.arrays)
    shape, rows = shapes[0], shapes[count]
    if rows[-2] != shape[layout.index("s")] or (axes == "bs" and rows[0] not in (1, shape[0])):
        return None
    if any([each != rows for each in shapes[count:]]):
        return None
    if count == 2:
        wanted, heads = list(shape), layout.index("h")
        wanted[heads] = shapes[1][heads]
        if wanted != list(shapes[1]):
            return None
    rotated = rotary_dim(probed.form, rows[-1])
    if rotated == shape[-1] or (probed.takes_parts and rotated < shape[-1]):
        return options_of(probed.form, rounding, layout, shape[-1], rotated)
    return None


def _plain(x: Any) -> Any:
    return x.x if isinstance(x, Deferred) else x


def _layout_for(probed: Probed, dim: Any, *given: Any) -> tuple[str, str] | None:
    """Return the layout of arguments and the axes of cosines, by all but their sizes.

    Given is what `_described` returns but for shapes.
    """
    parameters = probed.parameters
    names = [each for each in given if isinstance(each, str)]
    tensors = [About(*each) for each in given if not isinstance(each, str)]
    if not parameters.known.issuperset(names) or is_traced_by_jit():
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
