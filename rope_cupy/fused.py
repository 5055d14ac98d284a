"""The public functions that also normalise, rotate packed arrays or write caches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

from .call import Extra
from .checks import is_array
from .choices import CacheDtype, CacheLayout, Layout, NormKind, OutOfRange, Rounding, RoundNorm
from .dispatch import rotate
from .rotary import Array, apart, check_two, rotate_apart

Q_K_WEIGHTS = "q_weight", "k_weight"
Q_K_BIASES = "q_bias", "k_bias"


def apply_norm_rotary(
    x: Array,
    weight: Any,
    table: Any,
    *,
    eps: float = 1e-6,
    norm: NormKind = "head",
    weight_offset: float = 0.0,
    round_norm: RoundNorm = True,
    norm_after: bool = False,
    bias: Any = None,
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
    """Normalise the heads of one array x, then rotate them, in one launch.

    All arguments are as for `apply_qk_norm_rotary`; `weight` and `bias` are as `q_weight` and
    `q_bias`.

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
    parts = (norm, eps, weight_offset, round_norm, norm_after), None, None
    more, outs = _given(("weight",), (weight,)), None if out is None else (out,)
    if bias is not None:
        more = (*more[0], "bias"), (*more[1], bias)
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
    norm: NormKind = "head",
    weight_offset: float = 0.0,
    round_norm: RoundNorm = True,
    norm_after: bool = False,
    q_bias: Any = None,
    k_bias: Any = None,
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
    """Normalise the heads of q and k and rotate them, in one launch that moves the same bytes.

    RMSNorm is x / sqrt(mean(x^2) + eps) * (weight + weight_offset): Zhang and Sennrich, "Root Mean
    Square Layer Normalization" (2019), equation 4. The mean is taken over a whole head, even if
    only a slice of it is rotated, or over all heads of a token. LayerNorm of each head is
    (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias: Ba, Kiros and Hinton,
    "Layer Normalization" (2016), equation 3. The variance is taken around the mean and divided by
    head_dim.

    Args:
        q, k, and all arguments not named here: as for `apply_rotary_qk`, with heads of up to 512
            elements.
        q_weight, k_weight: None for 1, or arrays of shape (head_dim,), or with ``norm="heads"`` of
            shape (heads * head_dim,). They are float16, bfloat16, float32 or float64, and may
            differ from q in dtype.
        table: as for `apply_rotary_qk`, or None to normalise whole heads without rotating them.
            Without a table, positions, sections, `interleaved`, `rotary_offset` and `conjugate`
            must have their defaults, and `out_of_range` and `norm_after` have no effect.
        eps: the number that is added to the mean of the squares, or to the variance.
        norm: "head" for RMSNorm of each head (Qwen3, Flux, Qwen-Image, Z-Image, HunyuanVideo),
            "heads" for RMSNorm of all heads of a token together (Wan, LTX, OLMo 2), "layer" for
            LayerNorm of each head (CogVideoX, CogView 4, GLM-Image). With "heads" a block of 1,024
            threads must hold a token: 65,536 elements of 16 bits in dense arrays.
        weight_offset: the number that is added to weights that are given; 1.0 for Gemma.
        round_norm: True rounds the weighted norm to q's dtype before the rotation, as a model does
            whose norm is a module (Gemma, OLMo 2, `torch.nn.RMSNorm`). "before_weight" also rounds
            it before the weights, as Llama's norm in transformers does, and its copies (Qwen3,
            GLM-4-MoE, MiniMax-M2), and diffusers' RMSNorm with 16-bit weights. False rounds once,
            when the result is stored. With ``rounding="eager"`` the root is computed as PyTorch
            computes it. Results then have the bits of those modules, except for elements that
            depend on the order of a float32 sum. LayerNorm has the bits of
            `torch.nn.functional.layer_norm` with the same exception, and one more: a GPU rounds a
            product and its bias together, the CPU rounds each.
        norm_after: True rotates first and then normalises (HunYuan's language models). Between the
            two, numbers are rounded to q's dtype, as by two functions of a model, unless
            `round_norm` is False. After the norm they are rounded behind the weights, and with
            "before_weight" before them too. ``rounding="eager"`` rounds products and sums of the
            rotation in every case. The mean is taken over rotated numbers. All heads of a token
            out of range are NaN; "keep" normalises them unrotated.
        q_bias, k_bias: None for 0, or arrays of shape (head_dim,) with the weights' dtype, only for
            ``norm="layer"``.

    Returns:
        (q_out, k_out), as `apply_rotary_qk`.

    Errors are as for `apply_rotary_qk`. PyTorch records gradients of q, k, weights and biases for
    new arrays, and refuses a call that needs gradients and writes in place.

    >>> import numpy as np
    >>> q, k = np.ones((1, 6, 8, 64), np.float32), np.ones((1, 6, 2, 64), np.float32)
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> table = np.cos(angles), np.sin(angles)
    >>> weight = np.ones(64, np.float32)
    >>> q_out, k_out = apply_qk_norm_rotary(q, k, weight, weight, table)
    >>> q_out.shape, k_out.shape
    ((1, 6, 8, 64), (1, 6, 2, 64))
    """
    check_two(out)
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
    parts = (norm, eps, weight_offset, round_norm, norm_after), None, None
    if k_table is not None or k_positions is not None:
        tables, of_rows = apart(table, k_table, rows, k_positions)
        of_q = _given(("q_weight", "q_bias"), (q_weight, q_bias))
        of_k = _given(("weight", "bias"), (k_weight, k_bias))
        q_out, k_out = rotate_apart((q, k), tables, of_rows, options, out, (of_q, of_k), parts)
        return q_out, k_out
    more = norm_arrays(q_weight, k_weight, q_bias, k_bias)
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
    norm: NormKind | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_norm: RoundNorm = True,
    norm_after: bool = False,
    q_bias: Any = None,
    k_bias: Any = None,
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
    """Rotate q and k within a packed projection and leave v unchanged, in one launch.

    Args:
        qkv: an array that holds the `num_heads` heads of q, then the `num_kv_heads` heads of k,
            then the `num_kv_heads` heads of v: such as (b, s, num_heads + 2 num_kv_heads, d) or,
            with `head_dim`, (b, s, (num_heads + 2 num_kv_heads) * d).
        q_weight, k_weight, norm, eps, weight_offset, round_norm, norm_after, q_bias, k_bias: as for
            `apply_qk_norm_rotary`. Where `norm` is None, a weight means "head", and without a
            weight nothing is normalised. With a norm, `table` may be None.
        out: None for a new array, with v copied; or an array to write. With ``out=qkv`` v is
            neither read nor written.
        table, and all others: as for `apply_rotary_qk`.

    Returns an array like qkv. Errors are as for `apply_rotary_qk`.

    >>> import numpy as np
    >>> qkv = np.ones((6, 12, 64), np.float32)  # 8 heads of q, 2 of k and of v
    >>> angles = np.outer(np.arange(6), 10000.0 ** -np.linspace(0, 1, 32, endpoint=False))
    >>> table = np.cos(angles), np.sin(angles)
    >>> out = apply_rotary_qkv(qkv, table, num_heads=8, num_kv_heads=2, out=qkv)
    >>> out is qkv and bool((out[:, 10:] == 1).all())
    True
    """
    more = norm_arrays(q_weight, k_weight, q_bias, k_bias)
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
    of_norm = norm_of(norm, eps, weight_offset, round_norm, norm_after, more)
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
    cache_layout: CacheLayout = "NHD",
    cache_dtype: CacheDtype | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_out: Array | None = None,
    q_weight: Any = None,
    k_weight: Any = None,
    norm: NormKind | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    round_norm: RoundNorm = True,
    norm_after: bool = False,
    q_bias: Any = None,
    k_bias: Any = None,
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
    """Rotate q, write k rotated into its cache and v into its cache, in one launch.

    Args:
        q, k, v: as for `apply_rotary_qk`; v has k's shape, and is not written.
        k_cache, v_cache: arrays with any strides, of slots (slots, heads, d) or (slots, heads * d),
            or of blocks, also called pages, (blocks, block_size, heads, d). They have q's dtype, or
            float8_e4m3fn or float8_e5m2.
        slot_mapping: the slot of each token, an int32 or int64 array of shape (s,) or (b, s). Slot
            i is in block i // block_size, at i % block_size. A token whose slot is not in the
            cache, such as -1, is not stored. Two tokens must not share a slot. Of one batch the
            array may be shorter than the tokens: those behind, such as padding, are not stored.
        cache_layout: "NHD", or "HND" for caches (heads, slots, d) or (blocks, heads, block_size,
            d).
        cache_dtype: "float8_e4m3fn" or "float8_e5m2", the dtype of the bytes of a uint8 cache.
        k_scale, v_scale: the divisors of k and v before they are rounded to 8 bits: None for 1, a
            number, or an array of one element in one of the four dtypes. A quotient too large for 8
            bits becomes their largest number.
        k_out: None, or an array like k, such as k itself, that is written too: k rotated, of every
            token whatever its slot is, in k's dtype and not divided by `k_scale`. Attention over
            the tokens of a prefill reads it.
        q_weight, k_weight, norm, eps, weight_offset, round_norm, norm_after, q_bias, k_bias: as for
            `apply_qk_norm_rotary`. Where `norm` is None, a weight means "head", and without a
            weight nothing is normalised. With a norm, `table` may be None.
        out: None for a new q, or an array to write, such as q itself.
        table, and all others: as for `apply_rotary_qk`.

    Returns q rotated. Errors are as for `apply_rotary_qk`. A call that needs a gradient is refused,
    since none is recorded.

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
    weights = norm_arrays(q_weight, k_weight, q_bias, k_bias)
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
    of_norm = norm_of(norm, eps, weight_offset, round_norm, norm_after, weights)
    parts = of_norm, None, (cache_layout, cache_dtype, k_number, v_number)
    xs, outs = (q, k, v), (out, k_cache, v_cache, *([] if k_out is None else [k_out]))
    return rotate(("q", "k", "v"), xs, table, rows, options, outs, more, parts)[0]  # type: ignore[no-any-return]


def _given(names: tuple[str, ...], arrays: tuple[Any, ...]) -> Extra:
    """Return the names of the arrays that are not None, and these arrays."""
    there = [array is not None for array in arrays]
    if False not in there:
        return names, arrays
    return (*compress(names, there),), (*compress(arrays, there),)


def norm_arrays(q_weight: Any, k_weight: Any, q_bias: Any, k_bias: Any) -> Extra:
    """Return the names of the weights and biases that are given, and these arrays."""
    weights = _given(Q_K_WEIGHTS, (q_weight, k_weight))
    if q_bias is None and k_bias is None:
        return weights
    names, biases = _given(Q_K_BIASES, (q_bias, k_bias))
    return (*weights[0], *names), (*weights[1], *biases)


def _scales(k_scale: Any, v_scale: Any, more: Extra) -> tuple[Any, Any, Extra]:
    """Return the scales that are numbers, and `more` with the scales that are arrays."""
    k_number, v_number = [None if is_array(scale) else scale for scale in (k_scale, v_scale)]
    arrays = [scale if is_array(scale) else None for scale in (k_scale, v_scale)]
    names, scales = _given(("k_scale", "v_scale"), (*arrays,))
    return k_number, v_number, ((*more[0], *names), (*more[1], *scales))


def norm_of(
    norm: Any, eps: Any, weight_offset: Any, round_norm: Any, norm_after: Any, weights: Extra
) -> Any:
    """Return the fields of Norm, of which "head" is the kind where only a weight is given."""
    if norm is None and not weights[0]:
        if (eps, weight_offset, round_norm, norm_after) != (1e-6, 0.0, True, False):
            raise ValueError(
                "norm must be given, or a weight, with eps, weight_offset, round_norm or "
                "norm_after, got None"
            )
        return None
    return "head" if norm is None else norm, eps, weight_offset, round_norm, norm_after
