"""SGLang: write `rope_cupy.compat.sglang` for `sgl_kernel` (the functions of its pull request
14302), and for `sglang.kernels.ops` or `sglang.jit_kernel` (all others);
`apply_rotary_embedding_triton` is the `apply_rotary_embedding` of SGLang's Triton file, and
`apply_rope_with_cos_sin_cache_inplace_by_head_size` is the `apply_rope_with_cos_sin_cache_inplace`
of `sgl_kernel` and of SGLang up to 0.5.9, since other functions here have those names.

What differs: any head size, rotary size, strides, and dtypes of tables and positions are taken; a
position that is not in a cache gives NaN, where SGLang reads past the cache.

As in SGLang, pull request 14302 has one flag with two names, `interleaved` and `is_neox`. True, the
default, means pairs of neighbours if cosines and sines are given, and pairs of halves if positions
are.

`apply_rope_inplace_with_kvcache` refuses values that share memory with k, which it writes.

Not covered: `fused_qknorm_rope_pack_kv`, which also copies k and v after a prefix, because
rope_cupy writes whole arrays.

As in SGLang, no gradient is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import rope_cupy

from ._shared import cache_table, inference_only, view_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FusedSetKVBufferArg",
    "apply_rope_inplace",
    "apply_rope_inplace_with_kvcache",
    "apply_rope_with_cos_sin_cache_inplace",
    "apply_rope_with_cos_sin_cache_inplace_by_head_size",
    "apply_rotary_embedding",
    "apply_rotary_embedding_triton",
    "can_use_rotary_embedding_cos_sin",
    "fused_inplace_qknorm_rope",
    "fused_qknorm_rope_out_of_place",
    "rotary_embedding",
    "rotary_embedding_cos_sin",
]

Mode: TypeAlias = Literal["cos_sin", "positions"]


def can_use_rotary_embedding_cos_sin(rot_dim: int) -> bool:
    """Return whether `rotary_embedding_cos_sin` takes this rotary size: it takes every even one."""
    return rot_dim > 0 and rot_dim % 2 == 0


@inference_only
def rotary_embedding_cos_sin(
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    key: Tensor | None = None,
    head_size: int = 0,
    interleaved: bool | None = None,
    positions: Tensor | None = None,
    *,
    is_neox: bool | None = None,
) -> None:
    """Rotate query, and key if there is one, in place, by a row of cos and sin for each token.

    query and key are (tokens, heads * head_size), (tokens, heads, head_size) or (batch, seq_len,
    heads, head_size). If the flag is True, pairs are neighbours, and cos and sin are (tokens, rot /
    2), or (tokens, head_size), of which the even columns of cos and the odd ones of sin are read.
    Else pairs are halves, and cos and sin are (tokens, rot), in which each half of a head has its
    own columns. With `positions` (tokens,), the row of a token is that of its position.
    """
    of_neighbours, shape = _flag(interleaved, is_neox), query.shape
    batches = shape[:2] if len(shape) == 4 else None
    if positions is not None and batches is not None:
        positions, batches = positions.reshape(batches), None
    table = view_of(_rows, cos, sin, (of_neighbours, head_size or shape[-1], batches))
    _in_place(query, key, table, head_size, positions, of_neighbours)


@inference_only
def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None = None,
    head_size: int = 0,
    interleaved: bool | Tensor | None = None,
    is_neox: bool | None = None,
    *,
    cos_sin_cache: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotate query, and key if there is one, in place, by rows of a cache (max_position, rot).

    If the flag is True, pairs are halves. The fifth argument may be the cache, as in SGLang's
    releases, whose function returns query and key as well.
    """
    if cos_sin_cache is None and not isinstance(interleaved, bool):
        cos_sin_cache, interleaved = interleaved, None
    if cos_sin_cache is None:
        raise ValueError("cos_sin_cache must be a tensor, got None")
    if query.ndim == 4:
        positions = positions.reshape(query.shape[:2])
    of_neighbours = not _flag(cast("bool | None", interleaved), is_neox)
    _in_place(query, key, cache_table(cos_sin_cache), head_size, positions, of_neighbours)
    return query, key


def apply_rotary_embedding(
    *,
    mode: Mode = "cos_sin",
    query: Tensor,
    key: Tensor | None = None,
    head_size: int = 0,
    interleaved: bool | None = None,
    is_neox: bool | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
) -> None:
    """Call `rotary_embedding_cos_sin`, or with mode "positions" `rotary_embedding`."""
    flag = _flag(interleaved, is_neox)
    if mode == "cos_sin":
        if cos is None or sin is None:
            raise ValueError("cos and sin must be given with mode='cos_sin', got None")
        rotary_embedding_cos_sin(cos, sin, query, key, head_size, flag)
    elif mode == "positions":
        if positions is None or cos_sin_cache is None:
            raise ValueError(
                "positions and cos_sin_cache must be given with mode='positions', got None"
            )
        rotary_embedding(positions, query, key, head_size, flag, cos_sin_cache=cos_sin_cache)
    else:
        raise ValueError(f"mode must be 'cos_sin' or 'positions', got {mode!r}")


@inference_only
def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotate q and k (tokens, heads, head_dim) in place by a cache (max_position, rope_dim)."""
    _check_rope_dim(cos_sin_cache, rope_dim)
    table = cache_table(cos_sin_cache)
    rope_cupy.apply_rotary_qk(q, k, table, positions=positions, interleaved=not is_neox, out=(q, k))


@inference_only
def apply_rope_inplace_with_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    out_loc: Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotate q and k in place, and write k and v to rows out_loc of caches (size, heads * dim)."""
    _check_rope_dim(cos_sin_cache, rope_dim)
    table = cache_table(cos_sin_cache)
    v = v if v.shape == k.shape else v.reshape(k.shape)
    rope_cupy.apply_rotary_kv_cache(
        *(q, k, v, k_cache, v_cache, table),
        slot_mapping=out_loc,
        positions=positions,
        interleaved=not is_neox,
        out=q,
        k_out=k,
    )


@dataclass
class FusedSetKVBufferArg:
    """The values, the caches and the slots of `apply_rope_with_cos_sin_cache_inplace`.

    The scales, which older versions of SGLang have, must be None, as there.
    """

    value: Tensor
    k_buffer: Tensor
    v_buffer: Tensor
    cache_loc: Tensor
    k_scale: float | None = None
    v_scale: float | None = None


def apply_rope_with_cos_sin_cache_inplace(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
    fused_args: FusedSetKVBufferArg | None = None,
) -> None:
    """Call `apply_rope_inplace`, or with `fused_args` `apply_rope_inplace_with_kvcache`."""
    how: dict[str, Any] = {"is_neox": is_neox, "rope_dim": rope_dim}
    if fused_args is None:
        apply_rope_inplace(q, k, cos_sin_cache, positions, **how)
        return
    v, k_cache, v_cache, slots = _of_fused(fused_args)
    apply_rope_inplace_with_kvcache(
        q, k, v, k_cache, v_cache, cos_sin_cache, positions, slots, **how
    )


@inference_only
def apply_rope_with_cos_sin_cache_inplace_by_head_size(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
    fused_set_kv_buffer_arg: FusedSetKVBufferArg | None = None,
    enable_pdl: bool | None = None,
) -> None:
    """Rotate query and key (tokens, heads * head_size) or (tokens, heads, head_size) in place, and
    with `fused_set_kv_buffer_arg` write the rotated key and its values to the caches.
    """
    if fused_set_kv_buffer_arg is None:
        _in_place(query, key, cache_table(cos_sin_cache), head_size, positions, not is_neox)
        return
    q, k = (_by_head(x, head_size) for x in (query, key))
    v, k_cache, v_cache, slots = _of_fused(fused_set_kv_buffer_arg)
    apply_rope_inplace_with_kvcache(
        q, k, v, k_cache, v_cache, cos_sin_cache, positions, slots, is_neox=is_neox
    )


def fused_inplace_qknorm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
) -> None:
    """Normalise the heads of q and k (tokens, heads, head_dim), then rotate them, in place.

    Results are rounded once, or with `round_norm_before_rope` as by separate operations. A cache of
    full width has each angle twice: in halves if `is_neox`, else beside its copy.
    """
    fused_qknorm_rope_out_of_place(
        *(q, k, q, k, q_weight, k_weight, cos_sin_cache, positions),
        is_neox=is_neox,
        eps=eps,
        rope_dim=rope_dim,
        round_norm_before_rope=round_norm_before_rope,
        cache_has_full_width=cache_has_full_width,
    )


@inference_only
def fused_qknorm_rope_out_of_place(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool,
    eps: float = 1e-6,
    head_dim: int = 0,
    rope_dim: int = 0,
    round_norm_before_rope: bool = False,
    cache_has_full_width: bool = False,
) -> None:
    """Normalise and rotate as `fused_inplace_qknorm_rope`, from q and k to q_out and k_out."""
    rope_cupy.apply_qk_norm_rotary(
        q,
        k,
        q_weight,
        k_weight,
        _cache_table(cos_sin_cache, cache_has_full_width, rope_dim),
        eps=eps,
        positions=positions,
        interleaved=not is_neox,
        round_norm=round_norm_before_rope,
        rounding="eager" if round_norm_before_rope else "once",
        out=(q_out, k_out),
    )


@inference_only
def apply_rotary_embedding_triton(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Return x with each pair of neighbours rotated, whatever the flag is.

    x is (tokens, heads, head_size) or (batch, tokens, heads, head_size). cos and sin are (tokens,
    head_size / 2); with the flag they may be (tokens, head_size), of which the even columns are
    read.
    """
    if interleaved and cos.shape[-1] == x.shape[-1]:
        cos, sin = cos[..., ::2], sin[..., ::2]
    return rope_cupy.apply_rotary(x, (cos, sin), interleaved=True)


def _rows(
    cos: Any, sin: Any, of_neighbours: bool, head_size: int, batches: tuple[int, int] | None
) -> rope_cupy.RotaryTable:
    """Return the table of `rotary_embedding_cos_sin`, by batch and token if there are batches."""
    if of_neighbours and cos.shape[-1] == head_size:
        cos, sin = cos[..., ::2], sin[..., 1::2]
    if batches is not None:
        cos, sin = (part.reshape(*batches, -1) for part in (cos, sin))
    if of_neighbours:
        return rope_cupy.RotaryTable(cos, sin)
    return rope_cupy.RotaryTable.from_elementwise(cos, sin)


def _by_head(x: Any, head_size: int) -> Any:
    """Return x, or a view of x with an axis of heads."""
    if x.ndim > 2:
        return x
    return x.unflatten(-1, (-1, head_size)) if hasattr(x, "unflatten") else _split(x, head_size)


def _split(x: Any, head_size: int) -> Any:
    view = x.view()
    view.shape = (x.shape[0], x.shape[1] // head_size, head_size)  # an error where it would copy
    return view


def _of_fused(args: FusedSetKVBufferArg) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name in ("k_scale", "v_scale"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name} must be None, got {getattr(args, name)}")
    return args.value, args.k_buffer, args.v_buffer, args.cache_loc


def _flag(interleaved: bool | None, is_neox: bool | None) -> bool:
    """Return the one flag that has two names."""
    if interleaved is not None and is_neox is not None and interleaved != is_neox:
        raise ValueError(
            f"interleaved and is_neox must be equal where both are given, got {interleaved} and "
            f"{is_neox}"
        )
    if is_neox is None:
        return interleaved is None or interleaved
    return is_neox


def _in_place(
    query: Any, key: Any, table: Any, head_size: int, positions: Any, of_neighbours: bool
) -> None:
    head_dim = head_size if query.ndim == 2 else None
    if head_dim == 0:
        raise ValueError("head_size must be given where query has 2 axes, got 0")
    if key is None:
        rope_cupy.apply_rotary(
            query,
            table,
            positions=positions,
            interleaved=of_neighbours,
            head_dim=head_dim,
            out=query,
        )
        return
    rope_cupy.apply_rotary_qk(
        query,
        key,
        table,
        positions=positions,
        interleaved=of_neighbours,
        head_dim=head_dim,
        out=(query, key),
    )


def _check_rope_dim(cache: Any, rope_dim: int, full_width: bool = False) -> None:
    if rope_dim == 0:
        return
    width = cache.shape[-1] // 2 if full_width else cache.shape[-1]
    if rope_dim != width:
        raise ValueError(f"rope_dim must be 0 or that of cos_sin_cache, {width}, got {rope_dim}")


def _cache_table(cache: Any, full_width: bool, rope_dim: int) -> rope_cupy.RotaryTable:
    """Return the table of a cache, which has full width if every element has its own angle."""
    _check_rope_dim(cache, rope_dim, full_width)
    if not full_width:
        return cache_table(cache)
    return view_of(_halves_table, cache)


def _halves_table(cos_sin: Any) -> rope_cupy.RotaryTable:
    """Return the table of rows of cosines, then sines, that each element has of its own."""
    width = cos_sin.shape[-1] // 2
    return rope_cupy.RotaryTable.from_elementwise(cos_sin[..., :width], cos_sin[..., width:])
