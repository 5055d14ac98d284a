"""The public functions: options and arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .calls import rotate
from .checks import described

Array = TypeVar("Array")  # of any library, whose kind the results have too


def apply_rotary(
    x: Array,
    table: Any,
    *,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool = False,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> Array:
    """Rotate the heads of one array x, such as (b, s, h, d), and return an array of its kind.

    Shapes, dtypes, options and errors are those of `apply_rotary_qk`; `out` is one array.

    >>> import numpy as np
    >>> quarter_turn = np.array([[0.0]]), np.array([[1.0]])  # cos, sin
    >>> apply_rotary(np.array([[[3.0, 4.0]]]), quarter_turn)
    array([[[-4.,  3.]]])
    """
    rows = positions, seqlen_offsets, cu_seqlens
    options = (
        interleaved,
        layout,
        head_dim,
        rotary_offset,
        conjugate,
        out_of_range,
        mrope_section,
        mrope_interleaved,
    )
    (result,) = rotate(("x",), (x,), table, rows, options, None if out is None else (out,))
    return result  # type: ignore[no-any-return]


def apply_rotary_qk(
    q: Array,
    k: Array,
    table: Any,
    *,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool = False,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Array, Array] | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
) -> tuple[Array, Array]:
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
            array of shape (s,) or (b, s), (3, s) or (3, b, s) with `mrope_section`.
        seqlen_offsets: an int, or an int32 or int64 array of shape (b,), or (sequences,) with
            `cu_seqlens`: what is added to a token's index, such as how many tokens a cache holds.
        cu_seqlens: an int32 or int64 array of shape (sequences + 1,), for packed sequences ("thd"):
            sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1, and its first one has
            the index 0. Tokens of none are out of range. It must not decrease.
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
        mrope_section: the pairs that turn by the first, second and third axis of `positions` (time,
            height, width): M-RoPE, Wang et al., "Qwen2-VL" (2024), section 2.1. They add up to
            rotary_dim / 2. A token is out of range where one of its positions is.
        mrope_interleaved: False for sections one behind the other (Qwen2-VL), True for pairs in
            turn, the first axis once the others have theirs (Qwen3-VL).

    Returns:
        (q_out, k_out): new arrays of the caller's library, dense, with the axes in memory in the
        order of the input's; or `out`.

    Raises:
        TypeError, ValueError: say what was wanted and what came; nothing has been written then.
        RuntimeError: the first call that needs a kernel is made while its stream is captured.

    PyTorch records gradients of q and k, first and second, in place too, and compiles a call as one
    operator; a table has none.

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
    rows = positions, seqlen_offsets, cu_seqlens
    options = (
        interleaved,
        layout,
        head_dim,
        rotary_offset,
        conjugate,
        out_of_range,
        mrope_section,
        mrope_interleaved,
    )
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be None or a tuple of two arrays, got {described(out)}")
    q_out, k_out = rotate(("q", "k"), (q, k), table, rows, options, out)
    return q_out, k_out
