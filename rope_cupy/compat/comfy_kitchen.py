"""comfy-kitchen: write `rope_cupy.compat.comfy_kitchen` for `comfy_kitchen`, as ComfyUI imports it.

What differs: heads may have any even size; q and k may have any strides and take one launch;
functions that return new tensors have gradients; the fused norms compute in float32 if x has more
bits than the table.

As in comfy-kitchen, the arithmetic has the dtype of the table: x is rounded to it if the table has
fewer bits, and with a table of 16 bits every operation is rounded. A table with more rows on its
third axis than x has tokens is cut. Functions that write in place raise a RuntimeError for an x
that requires a gradient; scales may require one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import rope_cupy

from ._shared import broadcast_axes, cast, inference_only, view_of, with_leading_axes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "apply_rope",
    "apply_rope1",
    "apply_rope1_",
    "apply_rope_",
    "apply_rope_split_half",
    "apply_rope_split_half1",
    "apply_rope_split_half1_",
    "apply_rope_split_half_",
    "rms_rope",
    "rms_rope1",
    "rms_rope1_",
    "rms_rope_",
    "rms_rope_split_half",
    "rms_rope_split_half1",
    "rms_rope_split_half1_",
    "rms_rope_split_half_",
]


def apply_rope1(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Return x with every pair of neighbours multiplied by a 2 x 2 matrix of freqs_cis.

    freqs_cis is (..., dim / 2, 2, 2), and its first axes broadcast to those of x: such as (1, 1,
    tokens) or (1, tokens, 1) for four axes of x.
    """
    return _one(x, freqs_cis, True)


def apply_rope(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Return xq and xk rotated as `apply_rope1`."""
    return _two(xq, xk, freqs_cis, True)


def apply_rope1_(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate x as `apply_rope1`, in place, and return it."""
    return _one(x, freqs_cis, True, in_place=True)


def apply_rope_(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate xq and xk as `apply_rope`, in place, and return them."""
    return _two(xq, xk, freqs_cis, True, in_place=True)


def apply_rope_split_half1(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Return x rotated as by `apply_rope1`, with pairs of halves."""
    return _one(x, freqs_cis, False)


def apply_rope_split_half(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Return xq and xk rotated as by `apply_rope`, with pairs of halves."""
    return _two(xq, xk, freqs_cis, False)


def apply_rope_split_half1_(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate x as `apply_rope_split_half1`, in place, and return it."""
    return _one(x, freqs_cis, False, in_place=True)


def apply_rope_split_half_(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate xq and xk as `apply_rope_split_half`, in place, and return them."""
    return _two(xq, xk, freqs_cis, False, in_place=True)


def rms_rope1(x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Normalise the heads of x, multiply them by scale (dim,), and return them rotated."""
    return _one(x, freqs_cis, True, (scale,), epsilon)


def rms_rope(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return `rms_rope1` of q and of k; without a k_scale, k takes q_scale."""
    return _two(q, k, freqs_cis, True, _both(q_scale, k_scale), epsilon)


@inference_only
def rms_rope1_(x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Normalise and rotate x as `rms_rope1`, in place, and return it."""
    return _one(x, freqs_cis, True, (scale,), epsilon, in_place=True)


@inference_only
def rms_rope_(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k as `rms_rope`, in place, and return them."""
    return _two(q, k, freqs_cis, True, _both(q_scale, k_scale), epsilon, in_place=True)


def rms_rope_split_half1(
    x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6
) -> Tensor:
    """Return x normalised and rotated as by `rms_rope1`, with pairs of halves."""
    return _one(x, freqs_cis, False, (scale,), epsilon)


def rms_rope_split_half(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
    rot_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return `rms_rope_split_half1` of q and of k, which rotates rot_dim elements of each head."""
    _check_rot_dim(freqs_cis, rot_dim)
    return _two(q, k, freqs_cis, False, _both(q_scale, k_scale), epsilon)


@inference_only
def rms_rope_split_half1_(
    x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6
) -> Tensor:
    """Normalise and rotate x as `rms_rope_split_half1`, in place, and return it."""
    return _one(x, freqs_cis, False, (scale,), epsilon, in_place=True)


@inference_only
def rms_rope_split_half_(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
    rot_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate q and k as `rms_rope_split_half`, in place, and return them."""
    _check_rot_dim(freqs_cis, rot_dim)
    return _two(q, k, freqs_cis, False, _both(q_scale, k_scale), epsilon, in_place=True)


_FUNCTIONS: dict[tuple[int, bool], Any] = {  # by the number of arrays, and whether it normalises
    (1, False): rope_cupy.apply_rotary,
    (2, False): rope_cupy.apply_rotary_qk,
    (1, True): rope_cupy.apply_norm_rotary,
    (2, True): rope_cupy.apply_qk_norm_rotary,
}


class _Plan(NamedTuple):
    """What follows from freqs_cis and from the shape and the dtype of x."""

    rotate: Callable[..., Any]  # with its table and its options, but `out`
    layout: str
    dtype: Any  # in which x is rotated
    is_cast: bool  # x has another dtype
    is_plain: bool  # x is rotated as it is given


def _both(q_scale: Any, k_scale: Any) -> tuple[Any, Any]:
    return q_scale, q_scale if k_scale is None else k_scale


def _one(
    x: Any,
    freqs: Any,
    interleaved: bool,
    scales: tuple[Any, ...] = (),
    eps: float | None = None,
    in_place: bool = False,
) -> Tensor:
    if in_place:
        _check_no_gradient(x, freqs)
    plan = view_of(_plan, freqs, None, (1, interleaved, eps, x.shape, x.dtype))
    if plan.is_plain:
        return plan.rotate(x, *scales, out=x if in_place else None)  # type: ignore[no-any-return]
    return _rotated((x,), plan, scales, in_place)[0]  # type: ignore[no-any-return]


def _two(
    q: Any,
    k: Any,
    freqs: Any,
    interleaved: bool,
    scales: tuple[Any, ...] = (),
    eps: float | None = None,
    in_place: bool = False,
) -> tuple[Any, Any]:
    """Rotate q and k, in one launch where nothing but the number of heads tells them apart."""
    if in_place:
        _check_no_gradient(q, k, freqs)
    plans = view_of(_plans, freqs, None, (interleaved, eps, q.shape, k.shape, q.dtype, k.dtype))
    if len(plans) == 2:
        (q_out,) = _rotated((q,), plans[0], scales[:1], in_place)
        (k_out,) = _rotated((k,), plans[1], scales[1:], in_place)
        return q_out, k_out
    plan = plans[0]
    if plan.is_plain:
        return plan.rotate(q, k, *scales, out=(q, k) if in_place else None)  # type: ignore[no-any-return]
    return _rotated((q, k), plan, scales, in_place)


def _rotated(
    xs: tuple[Any, ...], plan: _Plan, scales: tuple[Any, ...], in_place: bool
) -> tuple[Any, ...]:
    """Rotate one array or two of any number of axes and any dtype: new arrays, or themselves."""
    given = tuple([with_leading_axes(cast(x, plan.dtype), 4) for x in xs])
    if in_place and not plan.is_cast:
        plan.rotate(*given, *scales, out=given if len(xs) == 2 else given[0])
        return xs
    results = plan.rotate(*given, *scales)
    results = results if len(xs) == 2 else (results,)
    pairs = zip(xs, results, strict=True)
    results = tuple([cast(y.reshape(x.shape), x.dtype) for x, y in pairs])
    if not in_place:
        return results
    for x, y in zip(xs, results, strict=True):
        x[...] = y
    return xs


def _plans(
    freqs: Any, interleaved: bool, eps: Any, q_shape: Any, k_shape: Any, q_dtype: Any, k_dtype: Any
) -> tuple[_Plan, ...]:
    """Return a plan for q and k if they differ in the number of heads alone, else one for each."""
    how = interleaved, eps
    both = _plan(freqs, 2, *how, q_shape, q_dtype)
    heads = len(q_shape) - (2 if both.layout == "bshd" else 3)
    of_q, of_k = (
        [size for i, size in enumerate(shape) if i != heads] for shape in (q_shape, k_shape)
    )
    if of_q == of_k and q_dtype == k_dtype:
        return (both,)
    return _plan(freqs, 1, *how, q_shape, q_dtype), _plan(freqs, 1, *how, k_shape, k_dtype)


def _plan(
    freqs: Any, count: int, interleaved: bool, eps: float | None, shape: Any, dtype: Any
) -> _Plan:
    """Return the plan for one x or two, with a table that is cut to their tokens."""
    ndim = len(shape)
    if ndim > 4:
        raise ValueError(f"x must have at most 4 axes, got shape {tuple(shape)}")
    if ndim > 2 and freqs.ndim > 2 and shape[2] != 1 and freqs.shape[2] > shape[2]:
        freqs = freqs[:, :, : shape[2]]
    whole = (1,) * (4 - ndim) + tuple(shape)
    layout, (freqs,) = broadcast_axes(whole, with_leading_axes(freqs, 6))
    options: dict[str, Any] = {} if eps is None else {"eps": eps}
    if freqs.dtype.itemsize == 2:
        options["rounding"] = "eager"
    rotate = partial(
        _FUNCTIONS[count, eps is not None],
        table=rope_cupy.RotaryTable.from_matrices(freqs),
        layout=layout,
        interleaved=interleaved,
        **options,
    )
    fits = freqs.dtype.itemsize <= min(dtype.itemsize, 4)
    is_cast = eps is None and fits and freqs.dtype != dtype
    of_x = freqs.dtype if is_cast else dtype
    return _Plan(rotate, layout, of_x, is_cast, ndim == 4 and not is_cast)


def _check_no_gradient(*arrays: Any) -> None:
    for array in arrays:
        if getattr(array, "requires_grad", False):
            raise RuntimeError(
                "in-place functions are inference-only: x and freqs_cis must not require a gradient"
            )


def _check_rot_dim(freqs: Any, rot_dim: int) -> None:
    if rot_dim and rot_dim != (width := 2 * freqs.shape[-3]):
        raise ValueError(f"rot_dim must be 0 or freqs_cis's {width}, got {rot_dim}")
