"""FlashInfer: write `rope_cupy.compat.flashinfer` for `flashinfer` or `flashinfer.rope`.

What differs: any head size and rotary size, float32 and float64 are taken; angles computed from
`rope_theta` are right at any position, where FlashInfer's have errors at large positions; a
position that is not in `cos_sin_cache` gives NaN, where FlashInfer reads past the cache.

Not covered: the functions that quantise to 8 bits (`rope_quantize_fp8`, `mla_rope_quantize_fp8`,
`rope_quantize_fp8_append_paged_kv_cache`), because rope_cupy writes results in the dtype of the
inputs.

The frequencies of each set of parameters are copied to a GPU once. So make one call before you
capture a CUDA graph, or compile a function that calls one. As in FlashInfer, no gradient is
recorded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

import rope_cupy
from rope_cupy import frequencies

from ._shared import inference_only, put, view_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]
MAX_TABLES = 64  # that are kept; each has a few numbers

_tables: dict[Any, rope_cupy.RotaryTable] = {}


@inference_only
def apply_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """Rotate packed q and k (nnz, heads, head_dim).

    Sequence i has the rows indptr[i] to indptr[i + 1] - 1, whose positions begin at offsets[i].
    """
    table = _table(q, rotary_dim, rope_scale, rope_theta)
    return rope_cupy.apply_rotary_qk(
        q, k, table, cu_seqlens=indptr, seqlen_offsets=offsets, interleaved=interleave
    )


@inference_only
def apply_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate as `apply_rope`, in place."""
    table = _table(q, rotary_dim, rope_scale, rope_theta)
    how: dict[str, Any] = {"cu_seqlens": indptr, "seqlen_offsets": offsets}
    rope_cupy.apply_rotary_qk(q, k, table, interleaved=interleave, out=(q, k), **how)


@inference_only
def apply_llama31_rope(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Rotate as `apply_rope`, by the frequencies of Llama 3.1."""
    scaling = low_freq_factor, high_freq_factor, old_context_len
    table = _table(q, rotary_dim, rope_scale, rope_theta, scaling)
    return rope_cupy.apply_rotary_qk(
        q, k, table, cu_seqlens=indptr, seqlen_offsets=offsets, interleaved=interleave
    )


@inference_only
def apply_llama31_rope_inplace(
    q: Tensor,
    k: Tensor,
    indptr: Tensor,
    offsets: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """Rotate as `apply_llama31_rope`, in place."""
    scaling = low_freq_factor, high_freq_factor, old_context_len
    table = _table(q, rotary_dim, rope_scale, rope_theta, scaling)
    how: dict[str, Any] = {"cu_seqlens": indptr, "seqlen_offsets": offsets}
    rope_cupy.apply_rotary_qk(q, k, table, interleaved=interleave, out=(q, k), **how)


@inference_only
def apply_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (nnz, heads, head_dim) by the position of each row."""
    table = _table(q, rotary_dim, rope_scale, rope_theta)
    return rope_cupy.apply_rotary_qk(q, k, table, positions=pos_ids, interleaved=interleave)


@inference_only
def apply_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate as `apply_rope_pos_ids`, in place."""
    table = _table(q, rotary_dim, rope_scale, rope_theta)
    rope_cupy.apply_rotary_qk(q, k, table, positions=pos_ids, interleaved=interleave, out=(q, k))


@inference_only
def apply_llama31_rope_pos_ids(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Rotate as `apply_rope_pos_ids`, by the frequencies of Llama 3.1."""
    scaling = low_freq_factor, high_freq_factor, old_context_len
    table = _table(q, rotary_dim, rope_scale, rope_theta, scaling)
    return rope_cupy.apply_rotary_qk(q, k, table, positions=pos_ids, interleaved=interleave)


@inference_only
def apply_llama31_rope_pos_ids_inplace(
    q: Tensor,
    k: Tensor,
    pos_ids: Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """Rotate as `apply_llama31_rope_pos_ids`, in place."""
    scaling = low_freq_factor, high_freq_factor, old_context_len
    table = _table(q, rotary_dim, rope_scale, rope_theta, scaling)
    rope_cupy.apply_rotary_qk(q, k, table, positions=pos_ids, interleaved=interleave, out=(q, k))


@inference_only
def apply_rope_with_cos_sin_cache(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rotate query and key (nnz, heads * head_size) by rows of a cache.

    The cache is float32, (max_seq_len, rotary_dim). Each row has cosines, then sines.
    """
    return rope_cupy.apply_rotary_qk(
        query,
        key,
        view_of(_table_of_float32, cos_sin_cache),
        positions=positions,
        head_dim=head_size if query.ndim == 2 else None,
        interleaved=not is_neox,
    )


@inference_only
def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate as `apply_rope_with_cos_sin_cache`, in place."""
    rope_cupy.apply_rotary_qk(
        query,
        key,
        view_of(_table_of_float32, cos_sin_cache),
        positions=positions,
        head_dim=head_size if query.ndim == 2 else None,
        interleaved=not is_neox,
        out=(query, key),
    )


def _table_of_float32(cos_sin_cache: Any) -> rope_cupy.RotaryTable:
    """Return the table of a cache, which must be float32."""
    if not str(cos_sin_cache.dtype).endswith("float32"):
        raise ValueError(f"cos_sin_cache should be float32, got {cos_sin_cache.dtype}")
    return rope_cupy.RotaryTable.from_cache(cos_sin_cache)


def _table(
    q: Any,
    rotary_dim: int | None,
    rope_scale: float,
    rope_theta: float,
    scaling: tuple[float, float, int] | None = None,
) -> rope_cupy.RotaryTable:
    """Return frequencies on the device of q, from which each call computes cosines and sines."""
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    device = getattr(q.device, "id", q.device)  # CuPy's own devices have no hash
    about = rotary_dim, rope_scale, rope_theta, scaling, type(q), device
    table = _tables.get(about)
    if table is None:
        inv_freq = _inverse_frequencies(rotary_dim, rope_scale, rope_theta, scaling)
        table = rope_cupy.RotaryTable.from_inverse_frequencies(inv_freq, like=q, precompute=False)
        put(_tables, about, table, MAX_TABLES)
    return table


@lru_cache
def _inverse_frequencies(
    rotary_dim: int, scale: float, theta: float, scaling: tuple[float, float, int] | None
) -> np.ndarray[Any, np.dtype[np.float64]]:
    if scaling is None:
        return frequencies.inverse_frequencies(rotary_dim, theta) / scale
    low_freq_factor, high_freq_factor, old_context_len = scaling
    return frequencies.llama3(
        rotary_dim,
        theta,
        factor=scale,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position=old_context_len,
    )
