"""What happens to q and k between their projections and attention: normalised, rotated and joined.

Every stand-in for an attention processor of diffusers is built on this: the norms that are known,
the tables that a model's tensors stand for, and one call of rope_cupy for each stream of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import MochiRMSNorm
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm

import rope_cupy
from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary_qk,
    join_qkv,
)

Q_AND_K = "norm_q", "norm_k"  # what most attention calls its norms
MOST_IN_A_HEAD = 512  # elements of a head that is normalised
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
PLAIN_TENSORS = torch.Tensor, torch.nn.Parameter
HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class UnknownCallError(Exception):
    """A call that a stand-in leaves to the processor that it stands for, and why."""


# Norms. Their weights are read without calling them, so nothing may be attached to them.


class Norms(NamedTuple):
    """The norms of q and of k, which one call can apply."""

    weights: tuple[Any, Any]
    widths: tuple[int, int]  # elements that are normalised together
    eps: float
    round_norm: bool | str


def norms_of(q_norm: Any, k_norm: Any, dtype: torch.dtype | None) -> Norms | None:
    """Return what the norms of q and k compute of numbers of a dtype; None where there are none.

    A norm is known where its class is exactly PyTorch's or diffusers' RMSNorm, and its result has
    the dtype of its input. Results are rounded once, after the weight, but those of diffusers'
    RMSNorm with weights of 16 bits before it too. Without a dtype the caller computes the norm in
    float32 and rounds its result.
    """
    if q_norm is None and k_norm is None:
        return None
    why = why_norm_is_unknown(q_norm) or why_norm_is_unknown(k_norm)
    if why:
        raise UnknownCallError(why)
    kind, eps, weights = type(q_norm), q_norm.eps, (q_norm.weight, k_norm.weight)
    if type(k_norm) is not kind or k_norm.eps != eps:
        raise UnknownCallError("the norms of q and k differ")
    if eps is None:  # the distance of 1 to the next number, in the dtype of the norm's input
        if dtype not in (None, torch.float32, torch.float64):
            raise UnknownCallError("its norm has no eps of its own")
        eps = torch.finfo(dtype or torch.float32).eps
    for weight in weights:
        if weight is None:
            continue
        if type(weight) not in PLAIN_TENSORS:
            raise UnknownCallError("the weight of its norm is no plain tensor")
        if dtype is not None and weight.dtype != dtype and kind is not MochiRMSNorm:
            raise UnknownCallError("its norm has weights of another dtype than its input")
    shapes = [m.normalized_shape if kind is torch.nn.RMSNorm else m.dim for m in (q_norm, k_norm)]
    if len(shapes[0]) != 1 or len(shapes[1]) != 1:
        raise UnknownCallError("its norm is of several axes")
    twice = kind is DiffusersRMSNorm and dtype is not None and dtype.itemsize == 2
    round_norm = "before_weight" if twice and weights[0] is not None else True
    return Norms(weights, (shapes[0][0], shapes[1][0]), eps, round_norm)


def why_norm_is_unknown(module: Any) -> str:
    """Return what is not known of a norm, whatever its input is, or nothing."""
    if module is None:
        return "one of q and k has no norm"
    if type(module) not in (torch.nn.RMSNorm, DiffusersRMSNorm, MochiRMSNorm):
        return "its norm is of no class that is known"
    if type(module) is DiffusersRMSNorm and module.bias is not None:
        return "its norm has a bias"
    own = module.__dict__
    if "forward" in own or any([own[hooks] for hooks in HOOKS]):
        return "its norm has hooks"
    return ""


# Tables.


def full_width(cos: torch.Tensor, sin: torch.Tensor, start: int = 0) -> RotaryTable:
    """Return the table of (s, d) from a token on, or of (1 or b, s, 1, d), every angle twice."""
    if start:
        cos, sin = cos[start:], sin[start:]
    if cos.ndim == 4:
        cos, sin = cos.squeeze(2), sin.squeeze(2)
        if cos.shape[0] == 1:
            cos, sin = cos.squeeze(0), sin.squeeze(0)
    return RotaryTable.from_full_width(cos, sin)


def matrices(freqs: torch.Tensor) -> RotaryTable:
    """Return the table of matrices (..., s, 1, d / 2, 2, 2)."""
    return RotaryTable.from_matrices(freqs.squeeze(-4))


def pair_of(freqs: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (cos, sin) that a model hands to its blocks, if they can be a table for x."""
    if not isinstance(freqs, tuple | list) or len(freqs) != 2:
        raise UnknownCallError("its table is no (cos, sin)")
    cos, sin = checked(freqs[0], x), checked(freqs[1], x)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise UnknownCallError("its cosines and sines differ in form")
    return cos, sin


def full_width_by_token(freqs: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (cos, sin) of shape (s, d) that a model hands to its blocks beside x."""
    cos, sin = pair_of(freqs, x)
    if cos.ndim != 2 or cos.shape[0] != x.shape[1]:
        raise UnknownCallError("its table is not by token")
    return cos, sin


def full_width_of_all_heads(freqs: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (cos, sin) of shape (1 or b, s, 1, d) that a model hands to its blocks."""
    cos, sin = pair_of(freqs, x)
    if cos.ndim != 4 or cos.shape[:3] not in ((1, x.shape[1], 1), (*x.shape[:2], 1)):
        raise UnknownCallError("its table is not by token")
    return cos, sin


def checked(freqs: Any, x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a table if it lies where x does and needs no gradient."""
    if type(freqs) not in PLAIN_TENSORS:
        raise UnknownCallError("its table is no plain tensor")
    if freqs.device != x.device:
        raise UnknownCallError("its table is on another device")
    if freqs.requires_grad and torch.is_grad_enabled():
        raise UnknownCallError("its table needs a gradient")
    return freqs  # type: ignore[no-any-return]


# Streams: the tokens of a text, of an image, or of both where one projection makes q and k of both.


class Stream(NamedTuple):
    """q, k and v of some tokens, (b, s, heads * head_dim), and what becomes of q and k.

    Without a table they are normalised and not rotated. `first_row` is None where the tokens have
    the rows of the table from 0 on, which must hold them. Else, of one stream alone, it is the row
    of the first token, and tokens that the table holds no row for are not rotated.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norms: Norms | None
    table: RotaryTable | None
    first_row: int | None = None


Pair = tuple[torch.Tensor, torch.Tensor]


def projected(attn: Any, x: torch.Tensor, added: bool = False) -> tuple[Any, Any, Any]:
    """Return q, k and v of hidden states, or of those that an attention has added projections for.

    The projections are called as they are: they may be quantized, adapted by LoRA, or have hooks.
    """
    if added:
        return attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def projected_by_one(attn: Any, x: torch.Tensor, added: bool = False) -> tuple[Any, Any, Any]:
    """Return what `projected` does where fuse_projections has made one of three projections."""
    whole = attn.to_added_qkv if added else attn.to_qkv
    return whole(x).chunk(3, dim=-1)  # type: ignore[no-any-return]


def prologue(
    streams: Sequence[Stream],
    head_dim: int,
    interleaved: bool = True,
    norm: str = "head",
    rounding: str = "once",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v of all streams, behind one another, as (b, s, heads, head_dim).

    `norm` and `rounding` are those of rope_cupy.apply_qk_norm_rotary.
    """
    for stream in streams:
        check_stream(stream, head_dim, norm)
        if stream.q.dtype != streams[0].q.dtype or len(stream.q) != len(streams[0].q):
            raise UnknownCallError("text and image differ in dtype or batch")
    options: dict[str, Any] = {"head_dim": head_dim, "interleaved": interleaved}
    options["rounding"] = rounding
    if len(streams) == 1:
        q, k = _rotated(streams[0], norm, options)
        v = streams[0].v
    else:
        parts = [
            rope_cupy.Stream(stream.q, stream.k, stream.v, stream.table, None, *_weights_of(stream))
            for stream in streams
        ]
        q, k, v = join_qkv(parts, **_norm_of_all(streams, norm), **options)
    return by_head(q, head_dim), by_head(k, head_dim), by_head(v, head_dim)


def rotated_apart(
    q: torch.Tensor,
    k: torch.Tensor,
    norms: Norms | None,
    tables: Any,
    head_dim: int,
    **options: Any,
) -> Pair:
    """Return q and k, (b, s, heads * head_dim) of two lengths, rotated by a table for each.

    All heads of a token are normalised together.
    """
    if norms is None or norms.widths != (q.shape[-1], k.shape[-1]):
        raise UnknownCallError("its norm is not of all heads")
    options |= {"head_dim": head_dim, "norm": "heads"}
    options |= {"eps": norms.eps, "round_norm": norms.round_norm}
    q_out, k_out = (
        apply_norm_rotary(x, weight, table, **options)
        for x, weight, table in zip((q, k), norms.weights, tables, strict=True)
    )
    return q_out, k_out


def rotate_behind(
    q: torch.Tensor, k: torch.Tensor, length: int, table: RotaryTable, interleaved: bool
) -> Pair:
    """Return q and k, (b, s, heads, d), rotated from a token on: in place, but for gradients."""
    parts = q[:, length:], k[:, length:]
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        apply_rotary_qk(*parts, table, out=parts, interleaved=interleaved)
        return q, k
    rotated = apply_rotary_qk(*parts, table, interleaved=interleaved)
    q_out, k_out = (
        torch.cat([x[:, :length], part], dim=1) for x, part in zip((q, k), rotated, strict=True)
    )
    return q_out, k_out


def joint_mask(mask: Any, x: torch.Tensor, text: torch.Tensor) -> Any:
    """Return which tokens of text and image see each other, (b, 1, s, s), by the text's mask."""
    if mask is None:
        return None
    if mask.ndim != 2:
        raise UnknownCallError("its mask is not of the text")
    image = torch.ones(x.shape[:2], device=x.device)
    seen = torch.cat([mask.to(image), image], dim=1)[:, None]
    return seen[..., None, :] * seen[..., :, None] > 0


def by_head(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Split the last axis of x into heads."""
    return x.view(*x.shape[:-1], -1, head_dim)


def check_stream(stream: Stream, head_dim: int, norm: str) -> None:
    """Leave to the original what rope_cupy does not take."""
    q, k = stream.q, stream.k
    if head_dim > MOST_IN_A_HEAD:
        raise UnknownCallError("its heads are too large")
    for x in (q, k):
        if type(x) is not torch.Tensor or x.dtype not in DTYPES or x.dtype != q.dtype:
            raise UnknownCallError("q and k are no plain tensors of one dtype")
        if x.ndim != 3 or x.shape[-1] % head_dim != 0:
            raise UnknownCallError("q or k has another shape")
    if q.shape[:2] != k.shape[:2]:
        raise UnknownCallError("q and k differ in length")
    if stream.norms is not None:
        widths = (q.shape[-1], k.shape[-1]) if norm == "heads" else (head_dim, head_dim)
        if stream.norms.widths != widths:
            raise UnknownCallError("its norm is of another number of elements")


def _rotated(stream: Stream, norm: str, options: dict[str, Any]) -> Pair:
    """Return q and k of a stream, normalised and rotated by one call."""
    q, k, _, norms, table, first_row = stream
    if first_row is not None:
        rows = torch.arange(first_row, first_row + q.shape[1], device=q.device)
        options = options | {"positions": rows, "out_of_range": "keep"}
    if norms is None:
        return apply_rotary_qk(q, k, table, **options)
    options = options | {"eps": norms.eps, "round_norm": norms.round_norm, "norm": norm}
    return apply_qk_norm_rotary(q, k, *norms.weights, table, **options)


def _weights_of(stream: Stream) -> tuple[Any, Any]:
    return (None, None) if stream.norms is None else stream.norms.weights


def _norm_of_all(streams: Sequence[Stream], norm: str) -> dict[str, Any]:
    """Return what one call is told of the norms of all streams."""
    norms = [stream.norms for stream in streams if stream.norms is not None]
    if not norms:
        return {}
    options = {"eps": norms[0].eps, "round_norm": norms[0].round_norm}
    if any([(each.eps, each.round_norm) != (*options.values(),) for each in norms]):
        raise UnknownCallError("the norms of text and image differ")
    if len(norms) == len(streams):
        return options | {"norm": norm}
    if norm != "head" or any([None in each.weights for each in norms]):
        raise UnknownCallError("one of text and image has a norm, and no weights")
    return options
