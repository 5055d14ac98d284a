"""Liger: Triton kernels."""

from __future__ import annotations

import torch
from tasks import EPS, Call, Inputs, Pair, Task, full_width

from . import IN_PLACE, Peer, Rotate, imported, need, need_in_place, need_no_positions


def _rotate(task: Task, inputs: Inputs) -> Rotate:
    """liger_rotary_pos_emb, which rotates q and k, or their gradients, in place.

    It copies what is not dense as (b, s, h, d), and returns the rotated copies.
    """
    rotate = imported("liger_kernel.transformers.rope").liger_rotary_pos_emb
    need(not task.shape.interleaved, "pairs of halves only")
    need(not task.shape.rotary_offset, "no slice at an offset")
    tables = inputs.table.form(full_width, torch.float32)
    cos, sin = (part[None, : task.shape.tokens] for part in tables)

    def call(q: torch.Tensor, k: torch.Tensor) -> Pair:
        q_out, k_out = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return call


def rotation(task: Task, inputs: Inputs) -> Call:
    """liger_rotary_pos_emb, in place."""
    rotate = imported("liger_kernel.transformers.rope").liger_rotary_pos_emb
    _rotate(task, inputs)  # says what it cannot do
    need_no_positions(inputs)
    need_in_place(task)
    tables = inputs.table.form(full_width, torch.float32)
    cos, sin = (part[None, : task.shape.tokens] for part in tables)
    q, k = inputs.q.transpose(1, 2), inputs.k.transpose(1, 2)

    def call() -> Pair:
        q_out, k_out = rotate(q, k, cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return call


def norm(task: Task, inputs: Inputs) -> Call:
    """LigerRMSNormFunction of q and of k, then the rotation: three kernels."""
    rotation(task, inputs)  # says what it cannot do
    normalise = imported("liger_kernel.transformers.rms_norm").LigerRMSNormFunction.apply
    weights = inputs.weights or ()

    def call() -> Pair:
        q, k = (
            normalise(x.flatten(2).unflatten(2, (-1, len(weight))), weight, EPS).view(x.shape)
            for x, weight in zip(inputs[:2], weights, strict=True)
        )
        return rotation(task, inputs._replace(q=q, k=k))()

    return call


def training(task: Task, inputs: Inputs) -> dict[str, Rotate]:
    """liger_rotary_pos_emb, with gradients."""
    return {IN_PLACE: _rotate(task, inputs)}


PEERS = {
    "Liger": Peer(("liger-kernel",), {"rotation": rotation, "norm": norm, "training": training})
}
