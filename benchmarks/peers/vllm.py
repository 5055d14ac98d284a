"""vLLM: rotary_embedding of vllm._custom_ops, which its layer RotaryEmbedding calls.

The layer makes its table itself; this function takes one, in the dtype of q.
"""

from __future__ import annotations

import functools

import torch
from tasks import Call, Inputs, Task, cache

from . import Peer, by_token, every_position, imported, need_in_place, q_after, slices, whole


def rotation(task: Task, inputs: Inputs) -> Call:
    """rotary_embedding, in place."""
    rotate = imported("vllm._custom_ops").rotary_embedding
    need_in_place(task)
    q, k = (by_token(x) for x in slices(task, inputs))
    table, positions = inputs.table.form(cache, q.dtype), every_position(task, inputs)
    arguments = positions, q, k, task.shape.rotary_dim, table, not task.shape.interleaved
    return whole(functools.partial(rotate, *arguments), inputs)


def kv_cache(task: Task, inputs: Inputs) -> Call:
    """rotary_embedding in place, then reshape_and_cache_flash: two launches."""
    rotate = rotation(task, inputs)
    store = imported("vllm._custom_ops").reshape_and_cache_flash
    k, v, into = by_token(inputs.k), by_token(inputs.v), inputs.stored
    caches, kind, scale = (into.k, into.v), "auto", into.scale
    if scale is None:
        scale = torch.ones(1, device=k.device)
    else:
        caches, kind = (into.k.view(torch.uint8), into.v.view(torch.uint8)), "fp8"
    arguments = k, v, *caches, into.slots.flatten(), kind, scale, scale
    return q_after(inputs, rotate, store, *arguments)


PEERS = {"vLLM": Peer(("vllm",), {"rotation": rotation, "cache": kv_cache})}
