"""The public functions: from arrays to a problem, from that to a launch, and back to arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import cpu, jit, tensor
from .checks import described, index
from .memory import ITEMSIZE, cuda_index, overlap
from .plan import launch_plan
from .problem import (
    Options,
    Pointers,
    TableSpec,
    check_inputs,
    implicit_position,
    out_names,
    rotary_options,
    rotary_problem,
)
from .tables import TableView, view_of


def apply_rotary(
    x: Any,
    table: Any,
    *,
    positions: Any = None,
    interleaved: bool = False,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Any = None,
    out_of_range: str = "nan",
) -> Any:
    """Rotate the heads of one array x, such as (b, s, h, d), and return an array of its kind.

    Shapes, dtypes, options and errors are those of `apply_rotary_qk`; `out` is one array.

    >>> import numpy as np
    >>> quarter_turn = np.array([[0.0]]), np.array([[1.0]])  # cos, sin
    >>> apply_rotary(np.array([[[3.0, 4.0]]]), quarter_turn)
    array([[[-4.,  3.]]])
    """
    options = rotary_options(interleaved, layout, head_dim, rotary_offset, conjugate, out_of_range)
    (result,) = _rotate(("x",), (x,), table, positions, options, None if out is None else (out,))
    return result


def apply_rotary_qk(
    q: Any,
    k: Any,
    table: Any,
    *,
    positions: Any = None,
    interleaved: bool = False,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Any, Any] | None = None,
    out_of_range: str = "nan",
) -> tuple[Any, Any]:
    """Rotate the heads of q and k by the angles of their tokens' positions, in one launch.

    A pair (a, b) of elements with the angle t becomes (a cos t - b sin t, b cos t + a sin t): Su et
    al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.

    Args:
        q, k: float16, bfloat16, float32 or float64 arrays of CuPy, PyTorch, NumPy or any DLPack
            producer, with any strides. They share dtype, device and every axis but heads.
        table: a `RotaryTable` on the device of q, or a tuple (cos, sin) that stands for
            ``RotaryTable(cos, sin)``: half width, so not the tables of Hugging Face transformers,
            which `RotaryTable.from_full_width` takes.
        positions: the table row of each token: None for its index along the token axis, an int for
            that index plus an offset (an error where the table is too short), or an int32 or int64
            array of shape (s,) or (b, s).
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + rotary_dim / 2).
        layout: the names of the axes: b, s (or t) for tokens, h for heads, and d last. By default
            "shd" for 3 axes and "bshd" for 4.
        head_dim: first splits the last axis into heads of this size: (t, h * d) or (b, s, h * d).
        rotary_offset: where in a head the rotary_dim elements that turn begin; the others pass
            through.
        conjugate: turn the other way: the inverse, and the gradient.
        out: None for new arrays, or a tuple of two arrays to write, such as q and k themselves.
        out_of_range: what becomes of a token whose position, in an array of them, the table does
            not hold: "nan" fills its rotated slice with NaN, "keep" leaves it as it is.

    Returns:
        (q_out, k_out): new arrays of the caller's library, dense, with the axes in memory in the
        order of the input's; or `out`.

    Raises:
        TypeError, ValueError: say what was wanted and what came; nothing has been written then.

    On a GPU the arithmetic is float32, or float64 when q or the table is 64-bit, with one rounding,
    to q's dtype; on the CPU it is float64 throughout. The kernel runs on the current stream of the
    library that owns the output (q's), and nothing waits for it: with `out` given, keep inputs of
    other libraries until it has run.

    >>> import numpy as np
    >>> q, k = np.ones((1, 6, 8, 64), np.float32), np.ones((1, 6, 2, 64), np.float32)
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> q_out, k_out = apply_rotary_qk(q, k, (np.cos(angles), np.sin(angles)))
    >>> q_out.shape, k_out.shape
    ((1, 6, 8, 64), (1, 6, 2, 64))
    """
    options = rotary_options(interleaved, layout, head_dim, rotary_offset, conjugate, out_of_range)
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be None or a tuple of two arrays, got {described(out)}")
    q_out, k_out = _rotate(("q", "k"), (q, k), table, positions, options, out)
    return q_out, k_out


class _Call(NamedTuple):
    """The arrays of a call as rope_cupy sees them."""

    names: tuple[str, ...]  # of the inputs
    inputs: tuple[tensor.Array, ...]
    outputs: tuple[tensor.Array, ...]
    given: bool  # the outputs are the caller's, so that they may overlap anything
    table: TableView
    gather: tensor.Array | None  # positions, where they are an array
    first: int | None  # the first of them, where they are an int


def _rotate(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: Any,
    options: Options,
    out: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    # A given output says on which stream the inputs must be ready.
    given = _describe(out_names(names), out or ())
    stream = tensor.stream_of(given[0]) if given else None
    inputs = _describe(names, xs, stream)
    check_inputs(names, tuple(array.spec for array in inputs))
    view = view_of(table, stream)
    gather = first = None
    if tensor.is_array(positions):
        gather = tensor.describe("positions", positions, stream)
    elif positions is not None:
        first = index("positions", positions, "None, an int or an int32 or int64 array")

    if out is not None:
        _solve(_Call(names, inputs, given, True, view, gather, first), options)
        for array, y in zip(given, out, strict=True):
            array.library.wrote(y)
        return out
    new = tuple(array.library.empty_like(x) for array, x in zip(inputs, xs, strict=True))
    outputs = _describe(out_names(names), new)
    _solve(_Call(names, inputs, outputs, False, view, gather, first), options)
    return tuple(array.library.result(y, x) for array, y, x in zip(inputs, new, xs, strict=True))


def _describe(
    names: tuple[str, ...], arrays: tuple[Any, ...], stream: int | None = None
) -> tuple[tensor.Array, ...]:
    pairs = zip(names, arrays, strict=False)  # no arrays where none are given
    return tuple(tensor.describe(name, array, stream) for name, array in pairs)


def _solve(call: _Call, options: Options) -> None:
    """Check all that is left to check, then write the outputs."""
    spec = call.table.specs[options.interleaved]
    gather = call.gather
    problem = rotary_problem(
        call.names,
        tuple(array.spec for array in call.inputs),
        tuple(array.spec for array in call.outputs),
        all(map(_same, call.inputs, call.outputs)),
        spec,
        gather.spec if gather else None,
        options,
    )
    cos, sin = call.table.pointers
    if gather is None:
        first = implicit_position(call.first, spec, problem.num_tokens)
        cos += first * spec.cos.strides[0] * ITEMSIZE[spec.cos.dtype]
        sin += first * spec.sin.strides[0] * ITEMSIZE[spec.sin.dtype]
    for name, array in zip(
        call.names + out_names(call.names), call.inputs + call.outputs, strict=True
    ):
        tensor.check_gradient(name, array.requires_grad)
    tensor.check_gradient("table", call.table.requires_grad)
    if call.given:
        _check_aliasing(call, spec)
    if not problem.num_rows:
        return
    pointers = Pointers(
        x=tuple(array.pointer for array in call.inputs),
        out=tuple(array.pointer for array in call.outputs),
        cos=cos,
        sin=sin,
        positions=gather.pointer if gather else 0,
    )
    stream = tensor.stream_of(call.outputs[0])
    if stream is None:
        cpu.rotate(problem, pointers)
    else:
        device = cuda_index(call.outputs[0].spec.device)
        jit.launch(launch_plan(problem), pointers, device, stream)


def _same(x: tensor.Array, y: tensor.Array) -> bool:
    """Return whether y is x: the same elements at the same addresses."""
    return x.pointer == y.pointer and x.spec[:4] == y.spec[:4]


def _check_aliasing(call: _Call, spec: TableSpec) -> None:
    """Refuse an output that shares memory with another or with what is read, unless in place."""
    read = [(name, x.spec, x.pointer) for name, x in zip(call.names, call.inputs, strict=True)]
    cos, sin = call.table.pointers
    read += [("table", spec.cos, cos), ("table", spec.sin, sin)]
    if call.gather:
        read.append(("positions", call.gather.spec, call.gather.pointer))
    names = out_names(call.names)
    for i, (name, x, y) in enumerate(zip(names, call.inputs, call.outputs, strict=True)):
        others = read + [
            (other, earlier.spec, earlier.pointer)
            for other, earlier in zip(names[:i], call.outputs[:i], strict=True)
        ]
        if _same(x, y):
            others.pop(i)  # in place
        for other, other_spec, pointer in others:
            if overlap(y.spec, y.pointer, other_spec, pointer):
                raise ValueError(
                    f"{name} must be its input or share no memory with {other}, got two arrays "
                    "that overlap"
                )
