"""quack: write `rope_cupy.compat.quack` for `quack.rotary`.

What differs: heads and rotary sizes need not be multiples of 8; a token whose position is not in
the table stays unrotated, where quack reads past the table.

As in quack, a leaf that requires a gradient may be rotated in place, and the backward pass of a
function that writes in place overwrites the incoming gradient if that is contiguous.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import rope_cupy

from ._autograd import in_place
from .flash_attn import apply_rotary as flash_attn_rotary
from .flash_attn import apply_rotary_emb_kv_ as flash_attn_rotary_kv_
from .flash_attn import keywords, rotate_packed

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
    """Rotate x as `apply_rotary_emb`, or with `conjugate` the other way, without a gradient."""
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

    qkv is (batch, seqlen, 3, nheads, headdim) or (batch, seqlen, heads, headdim), with num_heads_q
    heads of q, then the heads of k, then those of v. With cu_seqlens, (total,) replaces (batch,
    seqlen). With `headdim` the last axis holds all heads.
    """
    options = keywords(seqlen_offsets, cu_seqlens, interleaved)

    def by_head(x: Tensor) -> Tensor:
        if headdim is not None and x.shape[-1] != headdim:
            x = x.view(*x.shape[:-1], -1, headdim)
        return x if cu_seqlens is None or x.ndim != 4 else x.view(-1, *x.shape[2:])

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        heads = by_head(x)
        heads_out = heads if out is x else by_head(out)
        rotate_packed(heads, heads_out, num_heads_q, (cos, sin), conjugate, options)

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
