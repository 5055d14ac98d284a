"""The way of a call that JAX traces: under jax.jit, jax.grad, jax.vmap and what is built on them.

The program that JAX compiles calls `jax_ffi` when it runs. All but the values of arrays is checked
when it is traced.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from .. import arrays, eager
from ..arrays import Outline
from ..call import Call
from ..memory import array_spec
from ..options import axis_names
from ..problem import OF_WEIGHTS
from ..table_forms import TableSource, no_table
from . import weights_of, without_norm
from .jax_ffi import Program, Words, call_ffi, register
from .jax_norm import normalised


def rotate(call: Call) -> tuple[Any, ...]:
    """Rotate into new arrays of the program that JAX traces."""
    call = check(call)
    parts = [_operand("table", part) for part in call.table.arrays]
    extra = [_operand(*each) for each in call.extra]
    weights = {name: each for name, (each, _) in zip(call.extra_names, extra, strict=True)}
    others = {name: weights.pop(name) for name in call.extra_names if name not in OF_WEIGHTS}
    words = (*[None] * len(call.xs), *[words for _, words in (*parts, *extra)])
    program = Program(call.kind._replace(recent=None), call.position_offset, words)
    table = tuple([part for part, _ in parts])
    return _rotated(program, call.xs, weights, (table, others))


def check(call: Call) -> Call:
    """Check a call in a program of JAX; return it with positions that have an axis."""
    if call.options.cache:
        arrays.refuse_tracer(*_first_traced(call), arrays.NO_CACHES)
    reason = register()
    if reason is not None:
        because = f"as within jax.pure_callback, because this jaxlib is not known ({reason})"
        arrays.refuse_tracer(*_first_traced(call), because)
    for name, x in zip(call.names, call.xs, strict=True):
        if not isinstance(x, jax.Array):
            arrays.library_of(name, x)  # refuses what is not an array
            raise TypeError(
                f"{name} must be an array of JAX, which traces other arguments of the call, got "
                f"{type(x).__name__}"
            )
    call = _with_axes(call)
    for name, array in (*call.named, *[("table", part) for part in call.table.arrays]):
        arrays.check_gradient(name, array)
    outlined = [
        tuple([_outline(name, array, number) for number, (name, array) in enumerate(named, start)])
        for start, named in (
            (1, zip(call.names, call.xs, strict=True)),
            (10, [("table", part) for part in call.table.arrays]),
            (20, call.extra),
        )
    ]
    xs, parts, extra = outlined
    outs = None
    if call.out is not None:
        named_outs = zip(call.out_names, call.out, strict=True)
        outs = tuple([_outline(*each, 30 + i) for i, each in enumerate(named_outs)])
    table = TableSource(call.table.form, parts)
    eager.check(call._replace(xs=xs, table=table, extra_arrays=extra, out=outs))
    return call


def _first_traced(call: Call) -> tuple[str, Any]:
    outs = zip(call.out_names, call.out or (), strict=False)  # none where new ones are made
    named = (*outs, *call.named, *[("table", part) for part in call.table.arrays])
    return next((name, each) for name, each in named if arrays.is_traced_by_jax(each))


def _outline(name: str, array: Any, number: int) -> Outline:
    """Return the outline of an array of a program, which overlaps no other and cannot be written.

    An array of another library is only read here.
    """
    if not isinstance(array, jax.Array):
        spec = arrays.describe(name, array).spec
        shape, dtype = spec.shape, spec.dtype
    else:
        shape, dtype = array.shape, array.dtype.name
    if not all([isinstance(size, int) for size in shape]):
        raise TypeError(f"{name} must have a shape of ints, not of symbols, got {shape}")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    pointer = number << 64
    return Outline(array_spec((*shape,), (*strides,), dtype, "cpu", pointer, False), pointer)


def _with_axes(call: Call) -> Call:
    """Return a call in which arrays of JAX without an axis have become positions or offsets.

    JAX traces an int as such an array.
    """
    numbers = {name: each for name, each in call.position_arrays if _is_int(each)}
    if not numbers:
        return call
    x, axes = call.xs[0], axis_names(call.xs[0].ndim, call.options)
    sizes = dict(zip(axes, x.shape, strict=False))
    given = dict(call.extra)
    if "positions" in numbers:
        given["positions"] = numbers["positions"] + jnp.arange(sizes.get("s", 0))
    if "seqlen_offsets" in numbers:
        of_sequences = given.get("cu_seqlens")
        num = sizes.get("b", 1) if of_sequences is None else of_sequences.shape[0] - 1
        given["seqlen_offsets"] = jnp.broadcast_to(numbers["seqlen_offsets"], (num,))
    return call.with_extra((*given.items(),))


def _is_int(array: Any) -> bool:
    is_number = isinstance(array, jax.Array) and array.ndim == 0
    return is_number and jnp.issubdtype(array.dtype, jnp.integer)


def _operand(name: str, array: Any) -> tuple[Any, Words | None]:
    """Return an array of JAX that the program reads.

    An array of another library is copied into a constant. Where JAX would narrow its dtype, the
    constant holds words of 32 bits, and what they stand for is returned too.
    """
    if isinstance(array, jax.Array):
        return array, None
    described = arrays.describe(name, array)
    host = np.ascontiguousarray(described.library.download(array))
    if described.spec.dtype == "bfloat16":
        host = host.astype(ml_dtypes.bfloat16)
    host = host.reshape(described.spec.shape)
    if jax.dtypes.canonicalize_dtype(host.dtype) == host.dtype or name in OF_WEIGHTS:
        return jnp.array(host), None  # JAX computes the gradients of weights, and so narrows them
    return jnp.array(host.reshape(-1).view(np.uint32)), Words(host.dtype.name, host.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotated(
    program: Program, xs: tuple[Any, ...], weights: dict[str, Any], others: Any
) -> tuple[Any, ...]:
    """Rotate; the gradient is the conjugate rotation of the results' gradients.

    `others` are the arrays of the table and of positions, which have no gradient.
    """
    table, of_positions = others
    extra = of_positions | weights
    in_order = [extra[name] for name in program.kind.extra_names]
    return call_ffi(program, (*xs, *table, *in_order))


def _forward(program: Program, xs: Any, weights: Any, others: Any) -> tuple[Any, Any]:
    kept = None if program.kind.options.norm is None else (xs, weights)
    return _rotated(program, xs, weights, others), (kept, others)


def _backward(program: Program, kept: Any, grads: tuple[Any, ...]) -> tuple[Any, Any, None]:
    inputs, others = kept
    options, norm = program.kind.options, program.kind.options.norm
    if norm is None:
        return _without_norm(program, grads, others, conjugate=True), {}, None
    xs, weights = inputs
    if not norm.after:
        grads = _without_norm(program, grads, others, conjugate=True)
    else:
        xs = _without_norm(program, xs, others, conjugate=False)

    def all_normalised(xs: Any, weights: Any) -> tuple[Any, ...]:
        named = zip(program.kind.names, xs, strict=True)
        each = [normalised(x, weights_of(name, weights), options, norm) for name, x in named]
        return tuple(each)

    _, back = jax.vjp(all_normalised, xs, weights)
    of_xs, of_weights = back(grads)
    if norm.after:
        of_xs = _without_norm(program, of_xs, others, conjugate=True)
    return of_xs, of_weights, None


_rotated.defvjp(_forward, _backward)


def _without_norm(
    program: Program, xs: tuple[Any, ...], others: Any, conjugate: bool
) -> tuple[Any, ...]:
    """Rotate without the norm, or rotate back. Without a table nothing is rotated."""
    kind = program.kind
    if kind.form is no_table:
        return xs
    end = len(program.words) - len(kind.extra_names)
    words = dict(zip(kind.extra_names, program.words[end:], strict=True))
    names = tuple([name for name in kind.extra_names if name not in OF_WEIGHTS])
    plain = Program(
        kind._replace(
            names=tuple([f"{name}_grad" for name in kind.names]) if conjugate else kind.names,
            extra_names=names,
            options=without_norm(kind.options, conjugate),
        ),
        program.position_offset,
        (*program.words[:end], *[words[name] for name in names]),
    )
    return _rotated(plain, xs, {}, others)
