"""flash-attn: apply_rotary_emb of flash_attn.layers.rotary, a Triton kernel."""

from __future__ import annotations

from typing import Any

from tasks import SEQUENCE, Call, Inputs, Task

from . import Peer, Rotate, imported, one_by_one, slices, training_one_by_one, whole

MODULE = "flash_attn.layers.rotary"


def rotation(task: Task, inputs: Inputs) -> Call:
    """apply_rotary_emb of q and of k, also by offsets and cu_seqlens."""
    library, table = imported(MODULE), inputs.table
    in_sequences = task.variant == "sequences"
    if task.variant == "offsets":
        options: dict[str, Any] = {"seqlen_offsets": inputs.options["seqlen_offsets"]}
    elif in_sequences:
        options = {"cu_seqlens": inputs.options["cu_seqlens"].int(), "max_seqlen": SEQUENCE}
    else:
        return one_by_one(task, inputs, library, 256)
    part = slice(0, SEQUENCE if in_sequences else len(table.cos))
    options |= {"cos": table.cos[part], "sin": table.sin[part], "inplace": True}
    options["interleaved"] = task.shape.interleaved
    q, k = (x[0] if in_sequences else x for x in slices(task, inputs))
    rotate = library.apply_rotary_emb
    return whole(lambda: (rotate(q, **options), rotate(k, **options)), inputs)


def training(task: Task, inputs: Inputs) -> dict[str, Rotate]:
    """apply_rotary_emb of q and of k."""
    return training_one_by_one(task, inputs, imported(MODULE))


PEERS = {
    "flash-attn": Peer(
        ("flash-attn",), {"rotation": rotation, "qkv": rotation, "training": training}
    )
}
