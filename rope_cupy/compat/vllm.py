"""vLLM: write `rope_cupy.compat.vllm` for `vllm._custom_ops` (`rotary_embedding`,
`fused_qk_norm_rope`) and for the modules that have `triton_mrope` and `fused_qk_rmsnorm_rope_gate`.

What differs: any head size, any strides, float32, float64 and int32 positions are taken; a position
that is not in the cache gives NaN, where vLLM reads past the cache; if q and the tables differ in
dtype, `triton_mrope` computes in float32, and vLLM in the dtype of the tables.

`RotaryEmbeddingOverride` is for vLLM's registry of out-of-tree operations. vLLM is not imported
here, so make the class in your program:

    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
    from rope_cupy.compat.vllm import RotaryEmbeddingOverride

    @RotaryEmbedding.register_oot
    class CupyRotaryEmbedding(RotaryEmbeddingOverride, RotaryEmbedding):
        pass

As in vLLM, no gradient is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import (
    by_token_of_three_axes,
    cache_table,
    inference_only,
    itself_or_new,
    sections_within,
    view_of,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RotaryEmbeddingOverride",
    "fused_qk_norm_rope",
    "fused_qk_rmsnorm_rope_gate",
    "rotary_embedding",
    "triton_mrope",
]


@inference_only
def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """Rotate query, and key if there is one, in place.

    positions are (num_tokens,) or (batch, seq_len), query and key (positions..., heads * head_size)
    or (positions..., heads, head_size), cos_sin_cache (max_position, rotary_dim).
    """
    ndim, table = positions.ndim, cache_table(cos_sin_cache)
    options: dict[str, Any] = {
        "positions": positions,
        "interleaved": not is_neox,
        "layout": "shd" if ndim == 1 else "bshd",
        "head_dim": head_size if query.ndim == ndim + 1 else None,
        "rotary_offset": rope_dim_offset,
        "conjugate": inverse,
    }
    if key is None:
        rope_cupy.apply_rotary(query, table, out=query, **options)
    else:
        rope_cupy.apply_rotary_qk(query, key, table, out=(query, key), **options)


@inference_only
def fused_qk_norm_rope(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    position_ids: Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    """Normalise the heads of q and k in qkv (num_tokens, heads * head_dim), then rotate them.

    qkv is written in place, and results are rounded once.
    """
    end_q, end_k = num_heads_q * head_dim, (num_heads_q + num_heads_k) * head_dim
    if qkv.shape[-1] != end_k + num_heads_v * head_dim:
        raise ValueError(
            f"qkv must have {num_heads_q} + {num_heads_k} + {num_heads_v} heads of {head_dim} "
            f"elements, got shape {tuple(qkv.shape)}"
        )
    table = cache_table(cos_sin_cache)
    options: dict[str, Any] = {
        "eps": eps,
        "round_norm": False,
        "positions": position_ids,
        "interleaved": not is_neox,
        "head_dim": head_dim,
    }
    if num_heads_v == num_heads_k:
        rope_cupy.apply_rotary_qkv(
            qkv,
            table,
            num_heads=num_heads_q,
            num_kv_heads=num_heads_k,
            q_weight=q_weight,
            k_weight=k_weight,
            out=qkv,
            **options,
        )
        return
    q, k = qkv[:, :end_q], qkv[:, end_q:end_k]
    rope_cupy.apply_qk_norm_rotary(q, k, q_weight, k_weight, table, out=(q, k), **options)


@inference_only
def triton_mrope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: list[int],
    head_size: int,
    rotary_dim: int,
    mrope_interleaved: bool,
    is_neox_style: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (num_tokens, heads * head_size) by positions on three axes.

    cos and sin are (3, num_tokens, rotary_dim / 2). Every operation is rounded. A tensor whose rows
    are contiguous, such as a slice of a packed one, is written in place and returned; for any other
    a rotated copy is returned.
    """
    about = rotary_dim // 2, mrope_interleaved, *mrope_section
    table, positions, sections = view_of(_of_three_axes, cos, sin, about)
    return rope_cupy.apply_rotary_qk(
        q,
        k,
        table,
        positions=positions,
        mrope_section=sections,
        mrope_interleaved=mrope_interleaved,
        interleaved=not is_neox_style,
        head_dim=head_size,
        rounding="eager",
        out=(itself_or_new(q), itself_or_new(k)),
    )


@inference_only
def fused_qk_rmsnorm_rope_gate(
    q_gate: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    eps: float,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: list[int] | tuple[int, int, int] | None = None,
    norm_beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split q from the gate of every head, normalise q and k, and rotate rotary_dim elements.

    q_gate is (num_tokens, num_q_heads * 2 * head_dim), k (num_tokens, num_kv_heads * head_dim),
    positions (num_tokens,) or, with mrope_section, (3, num_tokens). Returns q, k and the gate, each
    (num_tokens, heads * head_dim) and contiguous.
    """
    if (positions.ndim == 2) != (mrope_section is not None):
        raise ValueError(
            "mrope_section must be given with positions of three axes and with no others, got "
            f"{mrope_section} and positions of shape {tuple(positions.shape)}"
        )
    if cos_sin_cache.shape[-1] != rotary_dim:
        raise ValueError(
            f"cos_sin_cache must have rotary_dim={rotary_dim} columns, got "
            f"{cos_sin_cache.shape[-1]}"
        )
    tokens = q_gate.shape[0]
    pairs = q_gate.reshape(tokens, num_q_heads, 2, head_dim)
    # The gate is what v is to a joint attention: copied beside q and k, in the same launch.
    stream = rope_cupy.Stream(
        pairs[:, :, 0],
        k.reshape(tokens, num_kv_heads, head_dim),
        pairs[:, :, 1],
        cache_table(cos_sin_cache),
        positions,
        q_weight,
        k_weight,
    )
    results = rope_cupy.join_qkv(
        [stream],
        eps=eps,
        weight_offset=norm_beta,
        mrope_section=mrope_section and _sections(mrope_section, rotary_dim // 2, True),
        mrope_interleaved=mrope_section is not None,
        interleaved=False,
    )
    q_out, k_out, gate = (x.reshape(tokens, -1) for x in results)
    return q_out, k_out, gate


class RotaryEmbeddingOverride:
    """The methods that vLLM's RotaryEmbedding calls, as a base class to put before it."""

    def forward_oot(
        self: Any, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate query and key in place by the layer's cos_sin_cache, and return them."""
        cache = self.cos_sin_cache
        if cache.device != query.device:
            cache = self.cos_sin_cache = cache.to(query.device)
        rotary_embedding(positions, query, key, self.head_size, cache, self.is_neox_style)
        return query, key

    forward_cuda = forward_oot


def _of_three_axes(
    cos: Any, sin: Any, pairs: int, interleaved: bool, *sections: int
) -> tuple[Any, Any, tuple[int, int, int]]:
    """Return the table of `triton_mrope`, the positions, and the number of pairs of each axis."""
    table, positions = by_token_of_three_axes(cos, sin, pairs)
    return table, positions, _sections(sections, pairs, interleaved)


def _sections(sections: Sequence[int], pairs: int, interleaved: bool) -> tuple[int, int, int]:
    """Return how many pairs each axis has; like vLLM, ignore sections beyond the last pair."""
    first, second, third = sections
    if interleaved:
        second, third = min(second, (pairs + 1) // 3), min(third, pairs // 3)
        return pairs - second - third, second, third
    return sections_within(pairs, first, second)
