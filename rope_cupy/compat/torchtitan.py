"""torchtitan: write `rope_cupy.compat.torchtitan` for `torchtitan.models.common.rope`;
`ComplexRoPE` and `CosSinRoPE` here only have `apply_rotary_emb`, to assign
`ComplexRoPE.apply_rotary_emb = ...`.

What differs: nothing. The function `apply_rotary_emb` is both in one, and also takes a whole cache
with rows by position, as functions of older torchtitan do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import view_of

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
        table = view_of(_complex_table, rope_cache, about=(query.shape[1],))
        return rope_cupy.apply_rotary_qk(query, key, table, interleaved=True)


class CosSinRoPE:
    """Rotate pairs of halves by cosines and sines of full width."""

    @staticmethod
    def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Return query and key (batch, seq_len, heads, head_dim) rotated by a real cache.

        The cache is (1 or batch, seq_len, 1, 2 head_dim). Each row has cosines, then sines.
        """
        table = view_of(_real_table, rope_cache, about=tuple(query.shape[1::2]))
        return rope_cupy.apply_rotary_qk(query, key, table, interleaved=False)


def apply_rotary_emb(query: Tensor, key: Tensor, rope_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by a complex cache as `ComplexRoPE`, by a real one as `CosSinRoPE`."""
    form: Any = ComplexRoPE if "complex" in str(rope_cache.dtype) else CosSinRoPE
    q_out, k_out = form.apply_rotary_emb(query, key, rope_cache)
    return q_out, k_out


def _complex_table(cache: Any, seq_len: int) -> rope_cupy.RotaryTable:
    return rope_cupy.RotaryTable.from_complex(_rows(cache, seq_len))


def _real_table(cache: Any, seq_len: int, head_dim: int) -> rope_cupy.RotaryTable:
    rows = _rows(cache, seq_len)
    return rope_cupy.RotaryTable.from_elementwise(rows[..., :head_dim], rows[..., head_dim:])


def _rows(cache: Any, seq_len: int) -> Any:
    """Return the first rows of a cache by position, or a prepared cache unchanged."""
    return cache[:seq_len] if cache.ndim == 2 else cache
