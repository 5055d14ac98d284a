"""The public functions that rotate alone: options and arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from .checks import described
from .choices import Layout, OutOfRange, Rounding
from .dispatch import rotate, rotate_each

Array = TypeVar("Array")  # of any library, whose kind the results have too


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
            ``RotaryTable(cos, sin)``: half width, so not the tables of Hugging Face transformers,
            which `RotaryTable.from_full_width` takes. No value of a table is read to see whether it
            is what it is said to be: `RotaryTable.check` does that.
        positions: the table row of each token: None for its index along the token axis, an int for
            that index plus an offset (an error where the table is too short), or an int32 or int64
            array of shape (s,) or (b, s), with `mrope_section` (3, s), (3, 1, s) or (3, b, s): of 3
            batches not (3, s), which could be meant for each batch.
        seqlen_offsets: an int, or an int32 or int64 array of shape (b,), or (sequences,) with
            `cu_seqlens`: what is added to a token's index, such as how many tokens a cache holds. A
            sum that does not fit 64 bits is out of range.
        cu_seqlens: an int32 or int64 array of shape (sequences + 1,), for packed sequences ("thd"):
            sequence i has the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1, and its first one has
            the index 0. Tokens of none are out of range. It must not decrease.
        k_table, k_positions: a table and positions of k's own, each None for those of q. With one
            of them q and k may have other numbers of tokens, as in cross-attention, and a table by
            head may be given where they have other numbers of heads. `k_positions` stands in the
            place of all three that tell q's positions.
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + rotary_dim / 2).
            None takes the table's own pairing: neighbours where it is of complex numbers or
            matrices, which stand for them, and halves for all others.
        layout: the names of the axes: b, s (or t) for tokens, h for heads, and d last. By default
            "shd" for 3 axes and "bshd" for 4.
        head_dim: first splits the last axis into heads of this size: (t, h * d) or (b, s, h * d).
            Where that splits nothing of three axes, because all tensors have one head,
            ``layout="bshd"`` must say that they are not (t, h, d).
        rotary_offset: where in a head the rotary_dim elements that are rotated begin; the others
            pass through.
        conjugate: rotate the other way: the inverse, and the gradient. Of a table with two angles a
            pair it is the transpose, which is the gradient alone.
        out: None for new arrays, or a tuple of two arrays to write, such as q and k themselves.
        out_of_range: what becomes of a token whose position, in an array of them, the table does
            not hold: "nan" fills its rotated slice with NaN, "keep" leaves it as it is.
        mrope_section: the pairs that turn by the first, second and third axis of `positions` (time,
            height, width): M-RoPE, Wang et al., "Qwen2-VL" (2024), section 2.1. They add up to
            rotary_dim / 2. A token is out of range where one of its positions is.
        mrope_interleaved: False for sections one behind the other (Qwen2-VL), True for every third
            pair by the second axis and by the third until they have theirs, and all others by the
            first (Qwen3-VL). Sections that do not fit in this way are refused.
        rounding: "once", at the store; or "eager", which rounds every product and every sum as
            PyTorch's operations do one by one, and so gives bit by bit what models were trained
            with: `apply_rotary_pos_emb` of Hugging Face transformers, by its table in q's dtype,
            and diffusers' functions, by a float32 one. The table decides: where cosines and sines
            are of q's dtype, products are rounded to it, else to float32 or float64.

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
    library that owns the output (q's), and the host does not wait for it. It waits for the
    current streams of the libraries of all other arrays; keep these arrays, as they are, until it
    has run.

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
    """Refuse outputs that are not two."""
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be None or a tuple of two arrays, got {described(out)}")


def apart(table: Any, k_table: Any, rows: Any, k_positions: Any) -> tuple[Any, Any]:
    """Return the tables of q and of k, and what tells the positions of each."""
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
