"""quack: write `rope_cupy.compat.quack` for `quack.rotary`.

What differs: any head size and rotary size is taken, also where 8 does not divide them; a position
that the table does not hold leaves its token unrotated, where quack reads past the table.

As there, a leaf that requires a gradient may be rotated in place, and the backward pass of a
function that writes in place writes over the gradient that it is given, if that is contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import rope_cupy

from ._autograd import in_place
from .flash_attn import apply_rotary as flash_attn_rotary
from .flash_attn import apply_rotary_emb_kv_ as flash_attn_rotary_kv_
from .flash_attn import keywords, parts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
]


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate x as `apply_rotary_emb`, or the other way, without a gradient."""
    start = 0 if seqlen_offsets is None else seqlen_offsets
    of_sequences = start, cu_seqlens, max_seqlen
    return flash_attn_rotary(x, cos, sin, *of_sequences, interleaved, inplace, conjugate)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate x, (batch, seqlen, nheads, headdim) or packed (total, nheads, headdim)."""
    options = keywords(seqlen_offsets, cu_seqlens, interleaved)
    if not inplace:
        y: Tensor = rope_cupy.apply_rotary(x, (cos, sin), **options)
        return y

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        rope_cupy.apply_rotary(x, (cos, sin), out=out, conjugate=conjugate, **options)

    return in_place(x, rotate, reuse_gradient=True)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Tensor | None = None,
    num_heads_q: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    headdim: int | None = None,
) -> Tensor:
    """Rotate q and k of qkv in place, and return it.

    Its shape is (batch, seqlen, 3, nheads, headdim), or ends in heads, num_heads_q of q and then
    those of k and of v, after (batch, seqlen) or, with cu_seqlens, (total,); with `headdim` heads
    and their elements are one axis.
    """
    options = keywords(seqlen_offsets, cu_seqlens, interleaved)

    def by_head(x: Tensor) -> Tensor:
        if headdim is not None and x.shape[-1] != headdim:
            x = x.view(*x.shape[:-1], -1, headdim)
        return x if cu_seqlens is None or x.ndim != 4 else x.view(-1, *x.shape[2:])

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        x_parts, out_parts = parts(by_head(x), num_heads_q), parts(by_head(out), num_heads_q)
        (q, k, v), (q_out, k_out, v_out) = x_parts, out_parts
        rope_cupy.apply_rotary_qk(
            q, k, (cos, sin), out=(q_out, k_out), conjugate=conjugate, **options
        )
        if out is not x:
            v_out[...] = v

    return in_place(qkv, rotate, reuse_gradient=True)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: Tensor | None = None,
) -> Tensor:
    """Rotate k of kv, (batch, seqlen, 2, nheads, headdim), in place."""
    start = 0 if seqlen_offsets is None else seqlen_offsets
    return flash_attn_rotary_kv_(kv, cos, sin, interleaved, start)
