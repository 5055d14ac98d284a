"""comfy-kitchen: its functions for neighbours and for halves, on its fastest backend."""

from __future__ import annotations

import functools

from tasks import EPS, Call, Inputs, Task, matrices

from . import Peer, imported, need, need_no_positions, need_whole_heads


def rotation(task: Task, inputs: Inputs) -> Call:
    """comfy_kitchen.apply_rope and its kin for halves and in place."""
    library = imported("comfy_kitchen")
    need_whole_heads(task)
    need_no_positions(inputs)
    name = "apply_rope" if task.shape.interleaved else "apply_rope_split_half"
    rotate = getattr(library, name + ("" if task.variant == "new" else "_"))
    table = inputs.table.form(matrices)[None, : task.shape.tokens, None]
    return functools.partial(rotate, inputs.q, inputs.k, table)


def fused(task: Task, inputs: Inputs) -> Call:
    """comfy_kitchen.rms_rope_ and its kin for halves, in place; without a norm, the rotation.

    One launch where q and k have as many heads, else two.
    """
    library, shape = imported("comfy_kitchen"), task.shape
    as_many = task.op.variant != "packed" or shape.q_heads == shape.k_heads
    need(as_many, "packed q and k of as many heads only")
    if task.op.norm is None:
        return rotation(task, inputs)
    need(task.op.norm == "head", "a norm of each head only")
    need_whole_heads(task)
    rotate = library.rms_rope_ if shape.interleaved else library.rms_rope_split_half_
    table = inputs.table.form(matrices)[None, : shape.tokens, None]
    return functools.partial(rotate, inputs.q, inputs.k, table, *(inputs.weights or ()), EPS)


PEERS = {
    "comfy-kitchen": Peer(("comfy-kitchen",), {"rotation": rotation, "norm": fused, "qkv": fused})
}
