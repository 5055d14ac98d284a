"""flash-attention: write `rope_cupy.compat.flash_attn` for `flash_attn.layers.rotary`, and for
`flash_attn.ops.triton.rotary`, which has `apply_rotary`.

What differs: heads may have more than 256 elements; cosines and sines may have another dtype than
x; an int `seqlen_offsets` beyond the table is a ValueError, not an AssertionError; the backward
pass of a function that writes in place returns a new gradient, where flash-attention overwrites the
incoming one.

As in flash-attention, a token whose position is not in the table stays unrotated, and a leaf that
requires a gradient may be rotated in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import rope_cupy

from ._autograd import in_place
from ._shared import inference_only

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


@inference_only
def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate x as `apply_rotary_emb`, or with `conjugate` the other way, without a gradient."""
    options, out = keywords(seqlen_offsets, cu_seqlens, interleaved), x if inplace else None
    y: Tensor = rope_cupy.apply_rotary(x, (cos, sin), conjugate=conjugate, out=out, **options)
    return y


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
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

    return in_place(x, rotate)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Return x (batch, seqlen, nheads, headdim) rotated by cos and sin (seqlen, rotary_dim / 2) or
    (batch, seqlen, rotary_dim / 2), with a rounding after every operation, in x's dtype.
    """
    y: Tensor = rope_cupy.apply_rotary(x, (cos, sin), interleaved=interleaved, rounding="eager")
    return y


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of qkv in place, and return qkv.

    qkv is (batch, seqlen, 3, nheads, headdim), or (batch, seqlen, num_heads_q + 2 num_heads_k,
    headdim). If cos_k and sin_k are given, they rotate k.
    """
    options = keywords(seqlen_offsets, None, interleaved)
    if cos_k is not None or sin_k is not None:
        options["k_table"] = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        rotate_packed(x, out, num_heads_q, (cos, sin), conjugate, options)

    return in_place(qkv, rotate)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate k of kv, (batch, seqlen, 2, nheads, headdim), in place."""
    options = keywords(seqlen_offsets, None, interleaved)
    check_packed("kv", kv.shape, 2)

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        k = x.select(2, 0)
        k_out = k if out is x else out.select(2, 0)
        rope_cupy.apply_rotary(k, (cos, sin), out=k_out, conjugate=conjugate, **options)
        if out is not x:
            out[:, :, 1] = x[:, :, 1]

    return in_place(kv, rotate)


class RotaryEmbedding(torch.nn.Module):
    """Rotate qkv, or q and kv, in place, by tables that the module owns in their dtype.

    With `scale_base` the scores decay with distance: xPos, Sun et al., "A Length-Extrapolatable
    Transformer" (2022), section 3.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base = scale_base
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate qkv, or, with kv, q (batch, seqlen, nheads, headdim) and kv, and return them.

        A tensor `seqlen_offset` needs `max_seqlen`, the number of positions, at least once.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            raise ValueError("max_seqlen must be given with a tensor seqlen_offset, got None")
        cos, sin = self._cos_cached, self._sin_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv,
                cos,
                sin,
                self._cos_k_cached,
                self._sin_k_cached,
                interleaved=self.interleaved,
                seqlen_offsets=seqlen_offset,
                num_heads_q=num_heads_q,
            )
        how: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **how)
        cos_k = cos if self._cos_k_cached is None else self._cos_k_cached
        sin_k = sin if self._sin_k_cached is None else self._sin_k_cached
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **how)

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / self.base ** (pairs / self.dim)

    def _compute_scale(self, device: Any = None) -> Tensor:
        pairs = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (pairs + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Compute the tables again if they are too short, or have another device or dtype."""
        cos = self._cos_cached
        if (
            cos is not None
            and seqlen <= self._seq_len_cached
            and cos.device == device
            and cos.dtype == dtype
            and not (self.training and cos.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        positions = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq: Any = self.inv_freq  # which .half() may have rounded
        if inv_freq.dtype != torch.float32:
            inv_freq = self._compute_inv_freq(device)
        angles = torch.outer(positions, inv_freq.to(device))
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is not None:
            power = (positions - seqlen // 2) / self.scale_base
            scale = self._compute_scale(device) ** power[:, None]
            self._cos_k_cached, self._sin_k_cached = (
                (cos / scale).to(dtype),
                (sin / scale).to(dtype),
            )
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)


def keywords(
    seqlen_offsets: int | Tensor | None, cu_seqlens: Tensor | None, interleaved: bool
) -> dict[str, Any]:
    """Return the options of a call, without those that have no effect."""
    options: dict[str, Any] = {"interleaved": interleaved, "out_of_range": "keep"}
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens
    if isinstance(seqlen_offsets, int):
        if seqlen_offsets:
            options["positions" if cu_seqlens is None else "seqlen_offsets"] = seqlen_offsets
    elif seqlen_offsets is not None:
        options["seqlen_offsets"] = seqlen_offsets
    return options


def rotate_packed(
    x: Tensor,
    out: Tensor,
    num_heads_q: int | None,
    table: Any,
    conjugate: bool,
    options: dict[str, Any],
) -> None:
    """Rotate q and k of x, (..., 3, nheads, headdim) or (..., heads, headdim), and write out."""
    shape = x.shape
    num_heads, num_kv_heads = _numbers(shape, num_heads_q)
    is_by_head = len(shape) != 5
    is_one_axis = is_by_head or all(y.stride(2) == num_heads * y.stride(3) for y in (x, out))
    if is_one_axis and "k_table" not in options:
        packed = x if is_by_head else _one_axis(x)
        rope_cupy.apply_rotary_qkv(
            packed,
            table,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            conjugate=conjugate,
            out=packed if out is x else out if is_by_head else _one_axis(out),
            **options,
        )
        return
    q, k, v = _parts(x, num_heads, num_kv_heads)
    q_out, k_out, v_out = (q, k, v) if out is x else _parts(out, num_heads, num_kv_heads)
    rope_cupy.apply_rotary_qk(q, k, table, conjugate=conjugate, out=(q_out, k_out), **options)
    if out is not x:
        v_out[...] = v


def _one_axis(qkv: Tensor) -> Tensor:
    return qkv.view(*qkv.shape[:2], -1, qkv.shape[-1])


def _parts(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.ndim == 5:
        return qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2)
    q, k, v = qkv.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), -2)
    return q, k, v


def _numbers(shape: tuple[int, ...], num_heads_q: int | None) -> tuple[int, int]:
    """Return how many heads q and k have in qkv."""
    if len(shape) == 5:
        check_packed("qkv", shape, 3)
        return shape[3], shape[3]
    if num_heads_q is None:
        raise ValueError(f"num_heads_q must be given with qkv of {len(shape)} axes, got None")
    num_heads_k, rest = divmod(shape[-2] - num_heads_q, 2)
    if rest or num_heads_k <= 0:
        raise ValueError(
            f"qkv must have num_heads_q + 2 num_heads_k heads, {num_heads_q} of them q's, got "
            f"{shape[-2]}"
        )
    return num_heads_q, num_heads_k


def check_packed(name: str, shape: tuple[int, ...], count: int) -> None:
    """Refuse another shape of a packed tensor than (batch, seqlen, count, nheads, headdim)."""
    if len(shape) != 5 or shape[2] != count:
        raise ValueError(
            f"{name} must have the shape (batch, seqlen, {count}, nheads, headdim), got "
            f"{tuple(shape)}"
        )
