"""The public functions: from arrays to a problem, from that to a launch, and back to arrays."""

from __future__ import annotations

from typing import Any

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
from .tables import as_table


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


def _rotate(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: Any,
    options: Options,
    out: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    # A given output says on which stream the inputs must be ready.
    given = _describe_all(out_names(names), out or ())
    stream = tensor.stream_of(given[0]) if given else None
    inputs = _describe_all(names, xs, stream)
    check_inputs(names, tuple(array.spec for array in inputs))
    looked_up = as_table(table).view(stream)
    gather = None
    if tensor.is_array(positions):
        gather = tensor.describe("positions", positions, stream)
    new = tuple(
        array.library.empty_like(x) for array, x in zip(inputs, () if out else xs, strict=False)
    )
    outputs = given or _describe_all(out_names(names), new)
    spec = looked_up.specs[options.interleaved]
    problem = rotary_problem(
        names,
        tuple(array.spec for array in inputs),
        tuple(array.spec for array in outputs),
        all(_same(x, y) for x, y in zip(inputs, outputs, strict=True)),
        spec,
        gather.spec if gather else None,
        options,
    )
    cos, sin = looked_up.pointers
    if gather is None:
        first = implicit_position(_int_or_none(positions), spec, problem.num_tokens)
        cos += first * spec.cos.strides[0] * ITEMSIZE[spec.cos.dtype]
        sin += first * spec.sin.strides[0] * ITEMSIZE[spec.sin.dtype]
    for name, array in zip(names + out_names(names), inputs + outputs, strict=True):
        tensor.check_gradient(name, array.requires_grad)
    tensor.check_gradient("table", looked_up.requires_grad)
    if out is not None:
        _check_aliasing(names, inputs, outputs, looked_up.pointers, spec, gather)
    if problem.num_rows:
        pointers = Pointers(
            x=tuple(array.pointer for array in inputs),
            out=tuple(array.pointer for array in outputs),
            cos=cos,
            sin=sin,
            positions=gather.pointer if gather else 0,
        )
        stream = tensor.stream_of(outputs[0])
        if stream is None:
            cpu.rotate(problem, pointers)
        else:
            device = cuda_index(inputs[0].spec.device)
            jit.launch(launch_plan(problem), pointers, device, stream)
    if out is not None:
        for array, y in zip(outputs, out, strict=True):
            array.library.wrote(y)
        return out
    return tuple(array.library.result(y, x) for array, y, x in zip(inputs, new, xs, strict=True))


def _describe_all(
    names: tuple[str, ...], arrays: tuple[Any, ...], stream: int | None = None
) -> tuple[tensor.Array, ...]:
    pairs = zip(names, arrays, strict=False)
    return tuple(tensor.describe(name, array, stream) for name, array in pairs)


def _int_or_none(positions: Any) -> int | None:
    if positions is not None and not hasattr(positions, "__index__"):
        raise TypeError(
            "positions must be None, an int or an int32 or int64 array, got "
            f"{type(positions).__name__}"
        )
    return None if positions is None else index("positions", positions)


def _same(x: tensor.Array, y: tensor.Array) -> bool:
    """Return whether y is x: the same elements at the same addresses."""
    return x.pointer == y.pointer and x.spec[:4] == y.spec[:4]


def _check_aliasing(
    names: tuple[str, ...],
    inputs: tuple[tensor.Array, ...],
    outputs: tuple[tensor.Array, ...],
    table_pointers: tuple[int, int],
    spec: TableSpec,
    gather: tensor.Array | None,
) -> None:
    """Refuse an output that shares memory with another or with what is read, unless in place."""
    read = [(name, array.spec, array.pointer) for name, array in zip(names, inputs, strict=True)]
    read += [("table", spec.cos, table_pointers[0]), ("table", spec.sin, table_pointers[1])]
    if gather:
        read.append(("positions", gather.spec, gather.pointer))
    written = [
        (name, array.spec, array.pointer)
        for name, array in zip(out_names(names), outputs, strict=True)
    ]
    for i, (name, y, pointer) in enumerate(written):
        for j, (other, x, other_pointer) in enumerate(read + written[:i]):
            if i == j and _same(inputs[i], outputs[i]):
                continue
            if overlap(y, pointer, x, other_pointer):
                raise ValueError(
                    f"{name} must not share memory with {other}"
                    f"{', unless it is the same array' if i == j else ''}, got two arrays that "
                    "overlap"
                )
