"""TransformerEngine: write `rope_cupy.compat.transformer_engine` for
`transformer_engine.pytorch.attention.rope` or `transformer_engine.pytorch.attention`.

What differs: two more launches compute the cosines and sines of the angles, and two more round them
unless fused=True; calls with start_positions have gradients, and may have cp_size > 1, which not
all versions of TransformerEngine allow; a position that is not in `freqs` gives NaN, or in "thd" an
unrotated token; a tensor that is too long for `freqs` is a ValueError, not an AssertionError.

As in TransformerEngine, results are contiguous; fused=True computes in float32 and rounds once;
without it cosines, sines and every operation are rounded to t's dtype; each element is rotated by
the angle in its own column; context parallelism is zigzag.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

import rope_cupy

from ._autograd import contiguous
from ._shared import empty_like

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RotaryPositionEmbedding",
    "apply_fused_qkv_rotary_pos_emb",
    "apply_rotary_pos_emb",
]

TensorFormat: TypeAlias = Literal["sbhd", "bshd", "thd"]
TENSOR_FORMATS: tuple[str, ...] = get_args(TensorFormat)


class RotaryPositionEmbedding(torch.nn.Module):
    """Compute the angles of positions, (max_seq_len, 1, 1, dim) in float32, every angle twice."""

    inv_freq: Tensor

    def __init__(
        self,
        dim: int,
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: int | None = None,
        pretrained_max_position_embeddings: int | None = None,
        rotary_base: float = 10000.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        if rotary_percent < 1.0:
            dim = int(dim * rotary_percent)
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        self.pretrained_max_position_embeddings = pretrained_max_position_embeddings
        self.rotary_base, self.interleaved = rotary_base, interleaved
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
        self.register_buffer("inv_freq", 1.0 / rotary_base ** (pairs / dim))

    def forward(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Return the angles of the positions offset .. offset + max_seq_len - 1."""
        freq = self.inv_freq
        positions = torch.arange(max_seq_len, device=freq.device, dtype=freq.dtype) + offset
        trained, factor = self.pretrained_max_position_embeddings, self.seq_len_interpolation_factor
        if trained is not None and factor is not None:
            positions = positions * (1 / max(max_seq_len / trained, factor))
        with torch.autocast(freq.device.type, enabled=False):
            angles = torch.outer(positions, freq)
        both = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 2)
        return both[:, None, None]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: TensorFormat = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Return t, (s, b, h, d), (b, s, h, d) or packed (t, h, d), rotated by angles (s2, 1, 1, d2).

    start_positions is added to the positions of each batch, or of each packed sequence. With
    cp_size, t has the tokens of cp_rank, and cu_seqlens are for whole sequences.
    """
    layout = _layout(tensor_format, cu_seqlens)
    of_first = cu_seqlens is None and start_positions is None and cp_size == 1
    length = t.shape[layout.index("s")] if of_first else None  # if not, an array has the rows
    table = _table(freqs, None if fused else t.dtype, length)
    options: dict[str, Any] = {
        "interleaved": interleaved,
        "layout": layout,
        "rounding": "once" if fused else "eager",
    }
    if layout == "shd":
        options["out_of_range"] = "keep"
        options |= _sequences(cu_seqlens, start_positions, cp_size, cp_rank)
    elif start_positions is not None:
        options["seqlen_offsets"] = start_positions
    halves = cp_size > 1 and layout != "shd"

    def rotate(x: Tensor, out: Tensor, *, conjugate: bool) -> None:
        if not halves:
            rope_cupy.apply_rotary(x, table, out=out, conjugate=conjugate, **options)
            return
        axis = layout.index("s")
        size = _half(x.shape[axis])
        for i, piece in enumerate((cp_rank, 2 * cp_size - 1 - cp_rank)):
            part, out_part = x.narrow(axis, i * size, size), out.narrow(axis, i * size, size)
            how = options | {"positions": piece * size, "out": out_part, "conjugate": conjugate}
            rope_cupy.apply_rotary(part, table, **how)

    return contiguous(t, rotate)


def apply_fused_qkv_rotary_pos_emb(
    qkv: Tensor,
    q_freqs: Tensor,
    k_freqs: Tensor,
    qkv_split_arg_list: list[int],
    tensor_format: TensorFormat = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of qkv (s, b, h, d) or (b, s, h, d), contiguous, with q and k rotated.

    qkv_split_arg_list has the numbers of the d elements that belong to q, k and v. q may have
    several heads of k's size there, and is then (s, b, h * heads, k's size).
    """
    layout = _layout(tensor_format, None)
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens must be None: packed tensors are not taken, got a tensor")
    split = tuple(qkv_split_arg_list)
    if sum(split) != qkv.shape[-1] or len(split) != 3 or split[0] % split[1]:
        raise ValueError(
            f"qkv_split_arg_list must be q's, k's and v's parts of {qkv.shape[-1]} elements, q's a "
            f"multiple of k's, got {qkv_split_arg_list}"
        )
    q_table = _table(q_freqs, None)
    k_table = q_table if k_freqs is q_freqs else _table(k_freqs, None)
    positions = _positions(qkv, layout, start_positions, cp_size, cp_rank)
    options = {"positions": positions, "layout": "sbhd", "interleaved": interleaved}
    rotate = partial(_rotate_qkv, tables=(q_table, k_table), options=options)
    if not (qkv.requires_grad and torch.is_grad_enabled()):
        return _split_qkv(qkv, split, rotate)
    q, k, v = _SplitQKV.apply(qkv, split, rotate)  # type: ignore[no-untyped-call]
    return q, k, v


def _split_qkv(qkv: Tensor, split: tuple[int, ...], rotate: Any) -> tuple[Tensor, Tensor, Tensor]:
    q_in, k_in, v = _qkv_parts(qkv, split)
    q, k = empty_like(q_in), empty_like(k_in)
    rotate((q_in, k_in), (q, k), conjugate=False)
    s, b, heads, _ = qkv.shape
    q, k = q.view(s, b, heads * q.shape[2], split[1]), k.view(s, b, heads, split[1])
    return q, k, v.clone(memory_format=torch.contiguous_format)


class _SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, split: tuple[int, ...], rotate: Any) -> Any:
        ctx.shape, ctx.split, ctx.rotate = qkv.shape, split, rotate
        return _split_qkv(qkv, split, rotate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None]:
        dqkv = dq.new_empty(ctx.shape)
        dq_out, dk_out, dv_out = _qkv_parts(dqkv, ctx.split)
        heads = ctx.shape[2]
        ctx.rotate((_by_group(dq, heads), _by_group(dk, heads)), (dq_out, dk_out), conjugate=True)
        dv_out.copy_(dv)
        return dqkv, None, None


def _rotate_qkv(
    xs: Any, outs: Any, *, conjugate: bool, tables: tuple[Any, Any], options: dict[str, Any]
) -> None:
    how = options | {"conjugate": conjugate}
    if tables[0] is tables[1]:
        rope_cupy.apply_rotary_qk(xs[0], xs[1], tables[0], out=outs, **how)
        return
    for x, out, table in zip(xs, outs, tables, strict=True):
        rope_cupy.apply_rotary(x, table, out=out, **how)


def _qkv_parts(qkv: Tensor, split: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k as (tokens of all batches, groups, heads of a group, size), and v."""
    q, k, v = qkv.split_with_sizes(split, -1)
    s, b, heads, _ = qkv.shape
    tokens, size = s * b, split[1]
    q, k = q.reshape(tokens, heads, split[0] // size, size), k.reshape(tokens, heads, 1, size)
    return q, k, v


def _by_group(x: Tensor, groups: int) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], groups, -1, x.shape[-1])


def _positions(
    qkv: Tensor, layout: str, start_positions: Tensor | None, cp_size: int, cp_rank: int
) -> Tensor | None:
    """Return the position of each token of all batches, or None if it is the token's index."""
    axis = layout.index("s")
    length, batch = qkv.shape[axis], qkv.shape[1 - axis]
    if start_positions is None and cp_size == 1 and batch == 1:
        return None
    positions = torch.arange(length, device=qkv.device)
    if cp_size > 1:
        half = _half(length)
        positions[:half] += cp_rank * half
        positions[half:] += (2 * cp_size - 2 - cp_rank) * half
    starts = torch.zeros(batch, dtype=torch.int64, device=qkv.device)
    starts = starts if start_positions is None else start_positions
    both = positions[:, None] + starts[None]
    return (both if axis == 0 else both.T).reshape(-1)


def _sequences(
    cu_seqlens: Any, start_positions: Tensor | None, cp_size: int, cp_rank: int
) -> dict[str, Any]:
    """Return where packed sequences begin and at which positions; zigzag cuts each into two."""
    if cp_size == 1:
        how = {"cu_seqlens": cu_seqlens}
        return how if start_positions is None else how | {"seqlen_offsets": start_positions}
    ends = cu_seqlens // cp_size
    half = (ends[1:] - ends[:-1]) // 2
    both = torch.stack([ends[:-1], ends[:-1] + half], 1).reshape(-1)
    offsets = torch.stack([cp_rank * half, (2 * cp_size - 1 - cp_rank) * half], 1)
    if start_positions is not None:
        offsets = offsets + start_positions[:, None].to(offsets.dtype)
    cu_halves = torch.cat([both, ends[-1:]])
    return {"cu_seqlens": cu_halves, "seqlen_offsets": offsets.reshape(-1)}


def _layout(tensor_format: str, cu_seqlens: Any) -> str:
    if tensor_format not in TENSOR_FORMATS:
        raise ValueError(f"tensor_format must be 'sbhd', 'bshd' or 'thd', got {tensor_format!r}")
    if tensor_format != "thd":
        return tensor_format
    if cu_seqlens is None:
        raise ValueError("cu_seqlens must be given with tensor_format='thd', got None")
    return "shd"


def _half(length: int) -> int:
    if length % 2:
        raise ValueError(f"t must have an even number of tokens with cp_size > 1, got {length}")
    return length // 2


def _table(freqs: Tensor, dtype: Any, length: int | None = None) -> rope_cupy.RotaryTable:
    """Return the table of angles (s, 1, 1, d2), in float32 or rounded to a dtype.

    With `length` it has at most so many rows.
    """
    angles = freqs.flatten(1).float()
    if length is not None and length < angles.shape[0]:
        angles = angles[:length]
    cos, sin = angles.cos(), angles.sin()
    if dtype is not None:
        cos, sin = cos.to(dtype=dtype), sin.to(dtype=dtype)
    return rope_cupy.RotaryTable.from_elementwise(cos, sin)
