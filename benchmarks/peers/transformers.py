"""transformers: apply_rotary_pos_emb of its Llama, with tables in the dtype of q; new arrays."""

from __future__ import annotations

import functools

from tasks import Call, Inputs, Task, full_width

from . import Peer, imported, need, need_no_positions, need_whole_heads


def rotation(task: Task, inputs: Inputs) -> Call:
    """apply_rotary_pos_emb."""
    rotate = imported("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    need(not task.shape.interleaved, "pairs of halves only")
    need_whole_heads(task)
    need_no_positions(inputs)
    tables = inputs.table.form(full_width, inputs.q.dtype)
    cos, sin = (part[None, : task.shape.tokens] for part in tables)
    return functools.partial(rotate, inputs.q, inputs.k, cos, sin, unsqueeze_dim=2)


PEERS = {
    "transformers": Peer(
        ("transformers",), {"rotation": rotation, "eager": rotation}, gpu_only=False
    )
}
