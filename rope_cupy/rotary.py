"""The public functions that only rotate: arrays and options in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .checks import described
from .choices import Layout, OutOfRange, Rounding
from .dispatch import rotate, rotate_each

Array = TypeVar("Array")  # an array of any library; the results are of the same kind


def apply_rotary(
    x: Array,
    table: Any,
    *,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: Layout | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: OutOfRange = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: Rounding = "once",
) -> Array:
    """Rotate the heads of one array x, such as (b, s, h, d), and return an array of the same kind.

    Shapes, dtypes, options and errors are as for `apply_rotary_qk`. `out` is None or one array.

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
        rounding,
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
    k_table: Any = None,
    k_positions: Any = None,
    interleaved: bool | None = None,
    layout: Layout | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Array, Array] | None = None,
    out_of_range: OutOfRange = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: Rounding = "once",
) -> tuple[Array, Array]:
    """Rotate the heads of q and k by the angles of their tokens' positions, in one launch.

    A pair (a, b) of elements with the angle t becomes (a cos t - b sin t, b cos t + a sin t): Su et
    al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.

    Args:
        q, k: float16, bfloat16, float32 or float64 arrays of CuPy, PyTorch, NumPy or any DLPack
            producer, with any strides. They share dtype, device and every axis but heads.
        table: a `RotaryTable` on the device of q, or a tuple (cos, sin) that stands for
            ``RotaryTable(cos, sin)``. Such a tuple has half width. The tables of Hugging Face
            transformers have full width: pass ``RotaryTable.from_full_width(cos, sin)``. No call
            reads a table to see whether it has the form that it claims; `RotaryTable.check` does.
        positions: the table row of each token. None takes the token's index along the token axis.
            An int is added to that index; a sum beyond the table is an error. An int32 or int64
            array has the shape (s,) or (b, s), or with `mrope_section` the shape (3, s), (3, 1, s)
            or (3, b, s). With 3 batches (3, s) is refused, since it could also mean (b, s).
        seqlen_offsets: a number that is added to a token's index, such as the number of tokens in a
            cache: an int, or an int32 or int64 array of shape (b,), or of shape (sequences,) with
            `cu_seqlens`. A sum that does not fit 64 bits is out of range.
        cu_seqlens: an int32 or int64 array of shape (sequences + 1,), for packed sequences ("thd"):
            sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1, and its first token
            has the index 0. A token of no sequence is out of range. The array must not decrease.
        k_table, k_positions: the table and the positions of k; None takes those of q. With either
            of them, q and k may differ in their number of tokens, as in cross-attention. Where they
            differ in their number of heads, each may then have a table by head. `k_positions`
            replaces `positions`, `seqlen_offsets` and `cu_seqlens` for k.
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + rotary_dim / 2).
            None takes the pairing of the table: neighbours for complex numbers and matrices, halves
            for all others.
        layout: the names of the axes: b for batches, s (or t) for tokens, h for heads, and d last.
            The default is "shd" for 3 axes and "bshd" for 4.
        head_dim: the size of a head, where the last axis holds all heads: (t, h * d) or (b, s,
            h * d). Where arrays of three axes have one head only, ``layout="bshd"`` must say that
            they are (b, s, d) and not (t, h, d).
        rotary_offset: the index in a head of the first of the rotary_dim elements that are rotated.
            All other elements are copied.
        conjugate: True rotates the other way. This is the inverse, and the gradient. For a table
            with two angles a pair it is the transpose, which is the gradient but not the inverse.
        out: None for new arrays, or a tuple of two arrays to write, such as q and k themselves.
        out_of_range: what happens to a token whose position is in an array and not in the table:
            "nan" fills its rotated slice with NaN, "keep" leaves it unrotated.
        mrope_section: how many pairs are rotated by the first, second and third axis of `positions`
            (time, height, width): M-RoPE, Wang et al., "Qwen2-VL" (2024), section 2.1. The three
            add up to rotary_dim / 2. A token is out of range if any of its positions is.
        mrope_interleaved: False puts the pairs of the three axes one after another (Qwen2-VL). True
            interleaves them (Qwen3-VL): pairs 1, 4, 7, ... follow the second axis and pairs 2, 5,
            8, ... the third, as many as their sections say, and all other pairs follow the first.
            Sections that do not fit this order are refused.
        rounding: "once" rounds when the result is stored. "eager" rounds every product and every
            sum, as PyTorch's operations do one by one. So it gives, bit by bit, the results that
            models were trained with: those of `apply_rotary_pos_emb` of Hugging Face transformers
            with its table in q's dtype, and of diffusers' functions with a float32 table. The table
            decides: with cosines and sines in q's dtype, products are rounded to it, and otherwise
            to float32 or float64.

    Returns:
        (q_out, k_out): new dense arrays, each of the library of its input, whose axes lie in memory
        in the same order as its input's; or `out`.

    Raises:
        TypeError, ValueError: the message says what was wanted and what came. Nothing was written.
        RuntimeError: the call is the first that needs its kernel, and its stream is being captured.

    PyTorch records first and second gradients of q and k, also where arrays are written in place,
    and compiles a call as one operator. A table has no gradient.

    On a GPU the arithmetic is float32, or float64 where q or the table is 64-bit, and the result is
    rounded once, to q's dtype. On the CPU it is float64 throughout. The kernel runs on the current
    stream of the library that owns the output (q's), and the host does not wait for it. The kernel
    waits for the current streams of the libraries of all other arrays. Keep these arrays, and do
    not change them, until it has run.

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
        rounding,
    )
    check_two(out)
    if k_table is not None or k_positions is not None:
        tables, of_rows = apart(table, k_table, rows, k_positions)
        q_out, k_out = rotate_apart((q, k), tables, of_rows, options, out)
        return q_out, k_out
    q_out, k_out = rotate(("q", "k"), (q, k), table, rows, options, out)
    return q_out, k_out


def check_two(out: object) -> None:
    """Refuse an `out` that is not a tuple of two."""
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be None or a tuple of two arrays, got {described(out)}")


def apart(table: Any, k_table: Any, rows: Any, k_positions: Any) -> tuple[Any, Any]:
    """Return the tables of q and of k, and the arguments that give the positions of each."""
    of_k = rows if k_positions is None else (k_positions, None, None)
    return (table, table if k_table is None else k_table), (rows, of_k)


def rotate_apart(
    xs: Any, tables: Any, rows: Any, options: Any, out: Any, extra: Any = None, parts: Any = None
) -> Any:
    """Rotate q and k, each by its own table."""
    calls = []
    for i, name in enumerate("qk"):
        of_norm = () if extra is None else (extra[i], parts)
        outs = None if out is None else (out[i],)
        calls.append(((name,), (xs[i],), tables[i], rows[i], options, outs, *of_norm))
    (q_out,), (k_out,) = rotate_each(*calls)
    return q_out, k_out
