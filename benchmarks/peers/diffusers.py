"""diffusers: apply_rotary_emb of diffusers.models.embeddings, for q and for k; new arrays."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tasks import Call, Inputs, Task, complex_numbers, full_width

from . import Peer, imported, need, need_no_positions, need_whole_heads


def rotation(task: Task, inputs: Inputs) -> Call:
    """Neighbours are rotated by complex numbers, its shorter way; halves by cosines and sines."""
    tokens, table = task.shape.tokens, inputs.table
    function = imported("diffusers.models.embeddings").apply_rotary_emb
    need_whole_heads(task)
    need_no_positions(inputs)
    need(task.itemsize <= 4, "computes in float32")
    if task.shape.interleaved:
        options: dict[str, Any] = {"freqs_cis": table.form(complex_numbers)[None, :tokens]}
        options["use_real"] = False
    else:
        freqs = tuple(part[:tokens] for part in table.form(full_width, torch.float32))
        options = {"freqs_cis": freqs, "use_real_unbind_dim": -2, "sequence_dim": 1}
    rotate = functools.partial(function, **options)
    return lambda: (rotate(inputs.q), rotate(inputs.k))


PEERS = {"diffusers": Peer(("diffusers",), {"rotation": rotation}, gpu_only=False)}
