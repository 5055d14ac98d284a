"""torchtitan: write `rope_cupy.compat.torchtitan` for `torchtitan.models.common.rope`;
`ComplexRoPE` and `CosSinRoPE` here only have `apply_rotary_emb`, to assign
`ComplexRoPE.apply_rotary_emb = ...`.

What differs: nothing. The function `apply_rotary_emb` is both in one, and also takes a whole cache
with rows by position, as functions of older torchtitan do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rope_cupy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ComplexRoPE", "CosSinRoPE", "apply_rotary_emb"]


class ComplexRoPE:
    """Rotate pairs of neighbours by complex numbers."""

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key (batch, seq_len, heads, head_dim) rotated by a complex cache.

        The cache is (1 or batch, seq_len, 1, head_dim / 2).
        """
        table = rope_cupy.RotaryTable.from_complex(_rows(query, rope_cache))
        return rope_cupy.apply_rotary_qk(query, key, table, interleaved=True)


class CosSinRoPE:
    """Rotate pairs of halves by cosines and sines of full width."""

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key (batch, seq_len, heads, head_dim) rotated by a real cache.

        The cache is (1 or batch, seq_len, 1, 2 head_dim). Each row has cosines, then sines.
        """
        head_dim, rows = query.shape[-1], _rows(query, rope_cache)
        cos, sin = rows[..., :head_dim], rows[..., head_dim:]
        table = rope_cupy.RotaryTable.from_elementwise(cos, sin)
        return rope_cupy.apply_rotary_qk(query, key, table, interleaved=False)


def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by a complex cache as `ComplexRoPE`, by a real one as `CosSinRoPE`."""
    form: Any = ComplexRoPE if "complex" in str(rope_cache.dtype) else CosSinRoPE
    q_out, k_out = form.apply_rotary_emb(query, key, rope_cache)
    return q_out, k_out


def _rows(query: Tensor, cache: Tensor) -> Tensor:
    """Return the first rows of a cache by position, or a prepared cache unchanged."""
    return cache[: query.shape[1]] if cache.ndim == 2 else cache
