"""Liger: write `rope_cupy.compat.liger` for `liger_kernel.transformers.rope`, and for
`liger_kernel.transformers.qwen2vl_mrope` and `liger_kernel.transformers.llama4_rope`.

What differs: results are new tensors with the memory order of the inputs, where Liger writes q and
k in place for some orders of memory; with `freqs_cis` of several batches each batch is rotated by
its own rows, where Liger takes the rows of the first batch for all.

As in Liger, the last element of a head with an odd number of elements is not rotated, and
`position_ids` and `unsqueeze_dim` have no effect for tables without an axis of heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rope_cupy

from ._shared import by_token_of_three_axes, half_width, sections_within, view_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "liger_llama4_text_rotary_pos_emb",
    "liger_llama4_vision_rotary_pos_emb",
    "liger_multimodal_rotary_pos_emb",
    "liger_rotary_pos_emb",
    "liger_rotary_pos_emb_gpt_oss",
    "liger_rotary_pos_emb_vision",
]


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return q and k (batch, heads, seq_len, head_dim) rotated in halves.

    cos and sin are (seq_len, width) or (1 or batch, seq_len, width), which may have an axis of
    heads of size 1 too. The width is the number of rotated elements, with every angle twice, or
    with `rotary_dim` at least half of it.
    """
    table = view_of(_table, cos, sin, about=(unsqueeze_dim, rotary_dim, q.shape[-1]))
    return rope_cupy.apply_rotary_qk(q, k, table, layout="bhsd", interleaved=False)


def liger_rotary_pos_emb_gpt_oss(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate whole heads by cos and sin of half their width."""
    return liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=q.shape[-1])


def liger_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k (seq_length, heads, head_dim) rotated in halves.

    cos and sin are (seq_length, head_dim), with every angle twice.
    """
    return rope_cupy.apply_rotary_qk(q, k, view_of(half_width, cos, sin), interleaved=False)


def liger_multimodal_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: list[int],
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return q and k (batch, heads, seq_len, head_dim) rotated by positions on three axes.

    cos and sin are (3, batch, seq_len, head_dim), and mrope_section says how many pairs each axis
    rotates. Every operation is rounded.
    """
    table, positions = view_of(_by_token, cos, sin)
    return rope_cupy.apply_rotary_qk(
        q,
        k,
        table,
        positions=positions,
        mrope_section=sections_within(cos.shape[-1] // 2, *mrope_section[:2]),  # as in Liger
        layout="bhsd",
        interleaved=False,
        rounding="eager",
    )


def liger_llama4_text_rotary_pos_emb(
    xq: Tensor, xk: Tensor, freqs_cis: Tensor
) -> tuple[Tensor, Tensor]:
    """Return xq and xk (batch, seq_len, heads, head_dim) with pairs of neighbours rotated.

    freqs_cis is (seq_len or more, head_dim / 2) or (batch or 1, seq_len or more, head_dim / 2):
    complex, or real with a last axis of size 2.
    """
    table = view_of(_complex_table, freqs_cis, about=(xq.shape[1],))
    return rope_cupy.apply_rotary_qk(xq, xk, table, interleaved=True)


def liger_llama4_vision_rotary_pos_emb(
    query: Tensor, key: Tensor, freqs_ci: Tensor
) -> tuple[Tensor, Tensor]:
    """Return query and key (batch, seq_len, heads, head_dim) with pairs of neighbours rotated.

    The table is complex, (seq_len, head_dim / 2), and may have axes of size 1. A complex table
    becomes real when its model is cast; such a table multiplies by its real part.
    """
    if _is_complex(freqs_ci):
        table = view_of(_complex_table, freqs_ci, about=(query.shape[1], True))
    else:
        freqs = freqs_ci.reshape(-1, freqs_ci.shape[-1])
        table = rope_cupy.RotaryTable(freqs, freqs * 0)
    return rope_cupy.apply_rotary_qk(query, key, table, interleaved=True)


def _table(
    cos: Any, sin: Any, unsqueeze_dim: int, rotary_dim: int | None, head_dim: int
) -> rope_cupy.RotaryTable:
    """Return the table of `liger_rotary_pos_emb`, by batch and token."""
    if cos.ndim == 4:
        axis = unsqueeze_dim if cos.shape[unsqueeze_dim] == 1 else 1
        cos, sin = cos.squeeze(axis), sin.squeeze(axis)
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    if rotary_dim is None:
        return half_width(cos[..., :head_dim], sin[..., :head_dim])
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and in (0, head_dim={head_dim}], got {rotary_dim}"
        )
    half = rotary_dim // 2
    if cos.shape[-1] < half:
        raise ValueError(
            f"cos must have rotary_dim / 2 = {half} columns or more, got {cos.shape[-1]}"
        )
    return rope_cupy.RotaryTable(cos[..., :half], sin[..., :half])


def _by_token(cos: Any, sin: Any) -> tuple[rope_cupy.RotaryTable, Any]:
    rows, positions = by_token_of_three_axes(cos, sin)
    return half_width(*rows), positions


def _complex_table(freqs: Any, seq_len: int, is_flat: bool = False) -> rope_cupy.RotaryTable:
    """Return the table of the first `seq_len` tokens, of the last two axes alone if `is_flat`."""
    if not _is_complex(freqs):  # the last axis has real and imaginary parts
        cos, sin = freqs[..., 0], freqs[..., 1]
        return rope_cupy.RotaryTable(cos[..., :seq_len, :], sin[..., :seq_len, :])
    if is_flat:
        freqs = freqs.reshape(-1, freqs.shape[-1])
    return rope_cupy.RotaryTable.from_complex(freqs[..., :seq_len, :])


def _is_complex(x: Any) -> bool:
    return "complex" in str(x.dtype)
