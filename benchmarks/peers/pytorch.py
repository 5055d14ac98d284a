"""PyTorch's own operations, one by one and compiled by torch.compile for the shape."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tasks import BLOCK, EPS, Cache, Call, Inputs, Pair, Task

from . import NEW, Peer, Rotate, need_one_position, q_after
from .rope_cupy import alone


def rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    offset: int,
) -> torch.Tensor:
    """Return x (b, s, h, d) rotated in float32."""
    rows = slice(x.shape[1]) if positions is None else positions
    cos, sin = cos[rows][:, None], sin[rows][:, None]
    end = offset + 2 * cos.shape[-1]
    part = x[..., offset:end].to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = part.chunk(2, dim=-1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    y = y.to(x.dtype)
    if end - offset == x.shape[-1]:
        return y
    return torch.cat([x[..., :offset], y, x[..., end:]], dim=-1)


def rotated_qk(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> Pair:
    """Return q and k rotated, in new arrays."""
    return rotated(q, *arguments), rotated(k, *arguments)


def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm of (b, s, h, d) over as many neighbours as there are weights."""
    rows = x.flatten(2).unflatten(2, (-1, len(weight)))
    return torch.nn.functional.rms_norm(rows, weight.shape, weight, EPS).view(x.shape)


def norm_rotated(weights: Pair, q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> Pair:
    """Return q and k normalised in float32 and rounded, then rotated, as models have it."""
    q, k = (normalised(x, weight) for x, weight in zip((q, k), weights, strict=True))
    return rotated_qk(q, k, *arguments)


def store(k: torch.Tensor, v: torch.Tensor, into: Cache) -> None:
    """Store k and v by index_copy_.

    Into blocks it is an assignment by indices; numbers of 8 bits are made by several operations.
    """
    slots = into.slots.flatten()
    for x, cached in ((k, into.k), (v, into.v)):
        rows = x.flatten(0, 1)
        if into.scale is not None:
            most = torch.finfo(cached.dtype).max
            quotients = (rows.float() / into.scale).clamp(-most, most)
            rows, cached = quotients.to(cached.dtype).view(torch.uint8), cached.view(torch.uint8)
        if cached.is_contiguous():
            cached.flatten(0, 1).index_copy_(0, slots, rows)
        else:
            cached[slots // BLOCK, slots % BLOCK] = rows


def rotated_and_stored(
    v: torch.Tensor, into: Cache, q: torch.Tensor, k: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """Return q rotated, in a new array, and store k rotated and v."""
    q, k = rotated_qk(q, k, *arguments)
    store(k, v, into)
    return q


FUNCTIONS = {"norm": norm_rotated, "cache": rotated_and_stored}


def _arguments(task: Task, inputs: Inputs) -> tuple[Any, ...]:
    need_one_position(task)
    first = {"norm": (inputs.weights,), "cache": (inputs.v, inputs.cache)}
    table, shape = inputs.table, task.shape
    heads = *first.get(task.op.kind, ()), inputs.q, inputs.k
    return *heads, table.cos, table.sin, inputs.positions, shape.interleaved, shape.rotary_offset


def eager(task: Task, inputs: Inputs) -> Call:
    """The operations one by one."""
    return functools.partial(FUNCTIONS.get(task.op.kind, rotated_qk), *_arguments(task, inputs))


def compiled(task: Task, inputs: Inputs) -> Call:
    """The same function compiled."""
    function = _compiled(task, FUNCTIONS.get(task.op.kind, rotated_qk))
    return functools.partial(function, *_arguments(task, inputs))


@functools.lru_cache(maxsize=1)
def _compiled(task: Task, function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # else the shapes before count against the limit of recompilations
    return torch.compile(function, dynamic=False)


def two_launches(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk in place, then `store`."""
    return q_after(inputs, alone(task, inputs), store, inputs.k, inputs.v, inputs.stored)


def training(task: Task, inputs: Inputs, compiled: bool = False) -> dict[str, Rotate]:
    """The operations one by one."""
    table = inputs.table.cos, inputs.table.sin, None, task.shape.interleaved, 0
    rotate = torch.compile(rotated_qk, dynamic=False) if compiled else rotated_qk
    return {NEW: lambda q, k: rotate(q, k, *table)}


OURS = ("torch",)
PEERS = {
    "torch two launches": Peer(OURS, {"cache": two_launches}, gpu_only=False),
    "torch.compile": Peer(
        OURS,
        dict.fromkeys(("rotation", "norm", "cache"), compiled)
        | {"training": functools.partial(training, compiled=True)},
    ),
    "torch eager": Peer(
        OURS,
        dict.fromkeys(("rotation", "norm", "cache"), eager) | {"training": training},
        gpu_only=False,
    ),
}
