"""The public functions: options and arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, TypeVar

from .call import Extra
from .checks import described, is_array
from .dispatch import rotate

Array = TypeVar("Array")  # of any library, whose kind the results have too
Q_K_WEIGHTS = "q_weight", "k_weight"


def apply_rotary(
    x: Array,
    table: Any,
    *,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
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
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Array, Array] | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
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
    _check_two(out)
    q_out, k_out = rotate(("q", "k"), (q, k), table, rows, options, out)
    return q_out, k_out


def apply_norm_rotary(
    x: Array,
    weight: Any,
    table: Any,
    *,
    eps: float = 1e-6,
    norm: str = "head",
    weight_offset: float = 0.0,
    round_norm: bool | str = True,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
) -> Array:
    """Normalise the heads of one array x, then rotate them: see `apply_qk_norm_rotary`.

    >>> import numpy as np
    >>> quarter_turn = np.array([[0.0]]), np.array([[1.0]])  # cos, sin
    >>> apply_norm_rotary(np.array([[[3.0, 3.0]]]), None, quarter_turn, eps=0.0)
    array([[[-1.,  1.]]])
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
    parts = (norm, eps, weight_offset, round_norm), None, None
    more, outs = _given(("weight",), (weight,)), None if out is None else (out,)
    (result,) = rotate(("x",), (x,), table, rows, options, outs, more, parts)
    return result  # type: ignore[no-any-return]


def apply_qk_norm_rotary(
    q: Array,
    k: Array,
    q_weight: Any,
    k_weight: Any,
    table: Any,
    *,
    eps: float = 1e-6,
    norm: str = "head",
    weight_offset: float = 0.0,
    round_norm: bool | str = True,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: tuple[Array, Array] | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
) -> tuple[Array, Array]:
    """Normalise the heads of q and k, then rotate them, in one launch that moves the same bytes.

    RMSNorm, Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4:
    x / sqrt(mean(x^2) + eps) * (weight + weight_offset). The mean is that of a whole head, also
    where only a slice of it turns, or of all heads of a token.

    Args:
        q, k, table, and what is not named here: as for `apply_rotary_qk`, with heads of up to 512
            elements.
        q_weight, k_weight: None for 1, or arrays of shape (head_dim,), with ``norm="heads"`` of
            shape (heads * head_dim,), of one of the dtypes float16, bfloat16, float32 and float64,
            which need not be q's.
        eps: is added to the mean of the squares.
        norm: "head" for each head (Qwen3, Flux, Qwen-Image, Z-Image, HunyuanVideo), "heads" for all
            heads of a token together (Wan, LTX, OLMo 2). Of these a block of 1,024 threads must
            hold a token: with dense arrays that is 65,536 elements of 16 bits.
        weight_offset: is added to weights; 1.0 for Gemma.
        round_norm: True rounds what is normalised and weighed to q's dtype before it is rotated, as
            models do whose norm is a module of its own (Gemma, OLMo 2, `torch.nn.RMSNorm`);
            "before_weight" rounds before the weights too, as Llama's norm does in transformers and
            in the models that took it over (Qwen3, GLM-4-MoE, MiniMax-M2), and diffusers' RMSNorm
            with weights of 16 bits; False rounds once, at the store. With ``rounding="eager"`` the
            root is computed as PyTorch does it too, and results have the bits of those modules, but
            for elements that the order of a float32 sum decides.

    Returns:
        (q_out, k_out), as `apply_rotary_qk`.

    Raises as `apply_rotary_qk`. PyTorch records gradients of q, k and both weights where new arrays
    are returned, and refuses to where arrays are written in place.

    >>> import numpy as np
    >>> q, k = np.ones((1, 6, 8, 64), np.float32), np.ones((1, 6, 2, 64), np.float32)
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> table = np.cos(angles), np.sin(angles)
    >>> weight = np.ones(64, np.float32)
    >>> q_out, k_out = apply_qk_norm_rotary(q, k, weight, weight, table)
    >>> q_out.shape, k_out.shape
    ((1, 6, 8, 64), (1, 6, 2, 64))
    """
    _check_two(out)
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
    parts = (norm, eps, weight_offset, round_norm), None, None
    more = _given(Q_K_WEIGHTS, (q_weight, k_weight))
    q_out, k_out = rotate(("q", "k"), (q, k), table, rows, options, out, more, parts)
    return q_out, k_out


def apply_rotary_qkv(
    qkv: Array,
    table: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Any = None,
    k_weight: Any = None,
    norm: str | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_norm: bool | str = True,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
) -> Array:
    """Rotate q and k within a packed projection, and leave v as it is, in one launch.

    Args:
        qkv: an array whose heads are the `num_heads` of q, then the `num_kv_heads` of k, then as
            many of v: such as (b, s, num_heads + 2 num_kv_heads, d) or, with `head_dim`, (b, s,
            (num_heads + 2 num_kv_heads) * d).
        q_weight, k_weight, norm, eps, weight_offset, round_norm: as for `apply_qk_norm_rotary`;
            where `norm` is None there is none, but "head" where a weight is given.
        out: None for a new array, v included, or an array to write, such as qkv itself, of which v
            is then neither read nor written.
        table, and all others: as for `apply_rotary_qk`.

    Returns an array like qkv; raises as `apply_rotary_qk`.

    >>> import numpy as np
    >>> qkv = np.ones((6, 12, 64), np.float32)  # 8 heads of q, 2 of k and of v
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> table = np.cos(angles), np.sin(angles)
    >>> out = apply_rotary_qkv(qkv, table, num_heads=8, num_kv_heads=2, out=qkv)
    >>> out is qkv and bool((out[:, 10:] == 1).all())
    True
    """
    more = _given(Q_K_WEIGHTS, (q_weight, k_weight))
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
    of_norm = _norm(norm, eps, weight_offset, round_norm, more)
    parts = of_norm, (num_heads, num_kv_heads), None
    outs = None if out is None else (out,)
    (result,) = rotate(("qkv",), (qkv,), table, rows, options, outs, more, parts)
    return result  # type: ignore[no-any-return]


def apply_rotary_kv_cache(
    q: Array,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    table: Any,
    *,
    slot_mapping: Any,
    cache_layout: str = "NHD",
    cache_dtype: str | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    q_weight: Any = None,
    k_weight: Any = None,
    norm: str | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_norm: bool | str = True,
    positions: Any = None,
    seqlen_offsets: Any = None,
    cu_seqlens: Any = None,
    interleaved: bool | None = None,
    layout: str | None = None,
    head_dim: int | None = None,
    rotary_offset: int = 0,
    conjugate: bool = False,
    out: Array | None = None,
    out_of_range: str = "nan",
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    rounding: str = "once",
) -> Array:
    """Rotate q, rotate k straight into its cache and copy v into its own, in one launch.

    Args:
        q, k, v: as for `apply_rotary_qk`; v has k's shape. Neither k nor v is written.
        k_cache, v_cache: arrays with any strides, of slots (slots, heads, d) or (slots, heads * d),
            or of blocks, which are pages, of slots (blocks, block_size, heads, d). They have q's
            dtype, or float8_e4m3fn or float8_e5m2.
        slot_mapping: the slot of each token, an int32 or int64 array of shape (s,) or (b, s): slot
            i is in block i // block_size, at i % block_size. A token whose slot the cache does not
            hold, such as -1, is left out; two tokens must not share a slot.
        cache_layout: "NHD", or "HND" for caches (heads, slots, d) or (blocks, heads, block_size,
            d).
        cache_dtype: "float8_e4m3fn" or "float8_e5m2" for what the elements of uint8 caches are.
        k_scale, v_scale: what is divided by before it is rounded to 8 bits: None for 1, a number,
            or an array of one element, of one of the four dtypes. What is too large becomes the
            largest number.
        q_weight, k_weight, norm, eps, weight_offset, round_norm: as for `apply_qk_norm_rotary`;
            where `norm` is None there is none, but "head" where a weight is given.
        out: None for a new q, or an array to write, such as q itself.
        table, and all others: as for `apply_rotary_qk`.

    Returns q rotated. Raises as `apply_rotary_qk`, and where a gradient is wanted, which is not
    recorded.

    >>> import numpy as np
    >>> q, k, v = (np.ones((6, heads, 64), np.float32) for heads in (8, 2, 2))
    >>> k_cache, v_cache = np.zeros((2, 4, 16, 2, 64), np.float32)  # 4 blocks of 16 slots
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> slots = np.array([16, 17, 18, 48, 49, -1])
    >>> q_out = apply_rotary_kv_cache(
    ...     q, k, v, k_cache, v_cache, (np.cos(angles), np.sin(angles)), slot_mapping=slots
    ... )
    >>> q_out.shape, v_cache[:, :, 0, 0].sum(axis=1)
    ((6, 8, 64), array([0., 3., 0., 2.], dtype=float32))
    """
    weights = _given(Q_K_WEIGHTS, (q_weight, k_weight))
    more = (*weights[0], "slot_mapping"), (*weights[1], slot_mapping)
    k_number, v_number = k_scale, v_scale
    if k_scale is not None or v_scale is not None:
        k_number, v_number, more = _scales(k_scale, v_scale, more)
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
    of_norm = _norm(norm, eps, weight_offset, round_norm, weights)
    parts = of_norm, None, (cache_layout, cache_dtype, k_number, v_number)
    xs, outs = (q, k, v), (out, k_cache, v_cache)
    return rotate(("q", "k", "v"), xs, table, rows, options, outs, more, parts)[0]  # type: ignore[no-any-return]


def _check_two(out: object) -> None:
    if out is not None and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"out must be None or a tuple of two arrays, got {described(out)}")


def _given(names: tuple[str, ...], arrays: tuple[Any, ...]) -> Extra:
    """Return the arrays that are not None, and their names."""
    there = [array is not None for array in arrays]
    if False not in there:
        return names, arrays
    return (*compress(names, there),), (*compress(arrays, there),)


def _scales(k_scale: Any, v_scale: Any, more: Extra) -> tuple[Any, Any, Extra]:
    """Return the scales that are numbers, and more arrays with those that are arrays."""
    k_number, v_number = [None if is_array(scale) else scale for scale in (k_scale, v_scale)]
    arrays = [scale if is_array(scale) else None for scale in (k_scale, v_scale)]
    names, scales = _given(("k_scale", "v_scale"), (*arrays,))
    return k_number, v_number, ((*more[0], *names), (*more[1], *scales))


def _norm(norm: Any, eps: Any, weight_offset: Any, round_norm: Any, weights: Extra) -> Any:
    """Return what is normalised: heads, where weights alone are given."""
    if norm is None and not weights[0]:
        if (eps, weight_offset, round_norm) != (1e-6, 0.0, True):
            raise ValueError(
                "norm must be given, or a weight, with eps, weight_offset or round_norm, got None"
            )
        return None
    return "head" if norm is None else norm, eps, weight_offset, round_norm
