"""quack: apply_rotary_emb of quack.rotary, a kernel of CuTe's DSL."""

from __future__ import annotations

from tasks import Call, Inputs, Task

from . import Peer, Rotate, imported, need, one_by_one, training_one_by_one


def rotation(task: Task, inputs: Inputs) -> Call:
    """apply_rotary_emb of q and of k."""
    shape = task.shape
    need(shape.head_dim % 8 == shape.rotary_dim % 8 == 0, "multiples of 8 only")
    return one_by_one(task, inputs, imported("quack.rotary"), 512)


def training(task: Task, inputs: Inputs) -> dict[str, Rotate]:
    """apply_rotary_emb of q and of k."""
    return training_one_by_one(task, inputs, imported("quack.rotary"))


PEERS = {
    "quack": Peer(("quack-kernels",), {"rotation": rotation, "qkv": rotation, "training": training})
}
