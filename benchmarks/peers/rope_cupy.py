"""rope_cupy itself, and its rotation alone beside what is fused with it."""

from __future__ import annotations

import functools
from typing import Any

import tasks
import torch
from tasks import EPS, Call, Inputs, Table, Task, streams_of, table_of

from . import IN_PLACE, NEW, Peer, Rotate, imported, need, packed, whole


def rotation(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk."""
    is_packed = task.variant == "sequences" and task.shape.batch > 1
    need(not is_packed, "packed sequences of one batch only")
    table, options = inputs.table.form(_table, task.table), inputs.options
    if task.table == "frequencies":
        need("positions" not in options, "the table's first row is not of position 0")
        options = options | {"positions": inputs.table.first}
    return _rotation(task, inputs, table, None if task.variant == "new" else inputs[:2], **options)


def alone(task: Task, inputs: Inputs, rounding: str = "once") -> Call:
    """rope_cupy.apply_rotary_qk in place, of the same q and k by the same table."""
    table, options = _fused_table(task, inputs), inputs.options
    return _rotation(task, inputs, table, inputs[:2], rounding=rounding, **options)


def _rotation(task: Task, inputs: Inputs, table: Any, out: Any, **options: Any) -> Call:
    return functools.partial(
        imported("rope_cupy").apply_rotary_qk,
        *(inputs.q, inputs.k, table),
        interleaved=task.shape.interleaved,
        rotary_offset=task.shape.rotary_offset,
        out=out,
        **options,
    )


def _table(table: Table, form: str) -> Any:
    view = imported("rope_cupy").RotaryTable
    if form in ("elementwise", "full"):
        make = view.from_elementwise if form == "elementwise" else view.from_full_width
        return make(*table.form(tasks.full_width, torch.float32))
    if form == "cache":
        return view.from_cache(table.form(tasks.cache, torch.float32))
    if form == "complex":
        return view.from_complex(table.form(tasks.complex_numbers))
    if form == "matrices":
        return view.from_matrices(table.form(tasks.matrices))
    if form == "frequencies":
        return view.from_inverse_frequencies(table.inv_freq, like=table.cos, precompute=False)
    return view(table.cos, table.sin)


def _fused_table(task: Task, inputs: Inputs) -> Any:
    return imported("rope_cupy").RotaryTable(*table_of(task, inputs))


def fused(task: Task, inputs: Inputs) -> Call:
    """The function of rope_cupy for the task, in place."""
    library, op, shape = imported("rope_cupy"), task.op, task.shape
    q, k, table = inputs.q, inputs.k, _fused_table(task, inputs)
    options = {"interleaved": shape.interleaved, "rotary_offset": shape.rotary_offset}
    options |= inputs.options
    if inputs.cache is not None:
        into = inputs.cache
        caches = into.flat() if op.cache == "NHD" else into.arranged("HND")
        options |= {"slot_mapping": into.slots, "cache_layout": op.cache, "out": q}
        options |= {"k_scale": into.scale, "v_scale": into.scale}
        return functools.partial(
            library.apply_rotary_kv_cache, q, k, inputs.v, *caches, table, **options
        )
    if op.norm:
        q_weight, k_weight = inputs.weights or (None, None)
        options |= {"q_weight": q_weight, "k_weight": k_weight, "norm": op.norm, "eps": EPS}
    if op.variant == "packed":
        qkv = packed(task, inputs)
        options |= {"num_heads": shape.q_heads, "num_kv_heads": shape.k_heads, "out": qkv}
        return whole(functools.partial(library.apply_rotary_qkv, qkv, table, **options), inputs)
    if op.norm:
        return functools.partial(
            library.apply_qk_norm_rotary, q, k, table=table, out=(q, k), **options
        )
    return alone(task, inputs, rounding="eager")


def join(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.join_qkv of text and image."""
    library, options = imported("rope_cupy"), _join_options(task)
    table, weights = _fused_table(task, inputs), inputs.weights or (None, None)
    streams = [
        library.Stream(*(x[:, tokens] for x in inputs[:3]), table, positions, *weights)
        for tokens, positions in streams_of(inputs)
    ]
    out = tuple(torch.empty_like(x) for x in inputs[:3])
    return functools.partial(library.join_qkv, streams, out=out, **options)


def joined_by_two_calls(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_qk_norm_rotary of text and of image into joint arrays, and torch.cat of v."""
    library, options = imported("rope_cupy"), _join_options(task)
    table, weights = _fused_table(task, inputs), inputs.weights or (None, None)
    q, k, v = (torch.empty_like(x) for x in inputs[:3])
    calls = [
        functools.partial(
            library.apply_qk_norm_rotary,
            *(inputs.q[:, tokens], inputs.k[:, tokens], *weights, table),
            positions=positions,
            out=(q[:, tokens], k[:, tokens]),
            **options,
        )
        for tokens, positions in streams_of(inputs)
    ]
    of_v = [inputs.v[:, tokens] for tokens, _ in streams_of(inputs)]

    def call() -> tuple[torch.Tensor, ...]:
        for each in calls:
            each()
        return q, k, torch.cat(of_v, dim=1, out=v)

    return call


def _join_options(task: Task) -> dict[str, Any]:
    options = {"interleaved": task.shape.interleaved, "rotary_offset": task.shape.rotary_offset}
    return options | {"norm": task.op.norm, "eps": EPS}


def training(task: Task, inputs: Inputs) -> dict[str, Rotate]:
    """rope_cupy.apply_rotary_qk, into new arrays and in place."""
    rotate = functools.partial(
        imported("rope_cupy").apply_rotary_qk,
        table=inputs.table.form(_table, "half"),
        interleaved=task.shape.interleaved,
    )
    return {NEW: rotate, IN_PLACE: lambda q, k: rotate(q, k, out=(q, k))}


def compiled_training(task: Task, inputs: Inputs) -> dict[str, Rotate]:
    """The same inside a function that torch.compile compiles."""
    rotate = training(task, inputs)[NEW]
    return {NEW: torch.compile(lambda q, k: rotate(q, k), dynamic=False, fullgraph=True)}


OURS = ("rope-cupy",)
FUSED = dict.fromkeys(("norm", "cache", "qkv", "eager"), fused)
ALONE = dict.fromkeys(("norm", "qkv", "eager"), alone)
PEERS = {
    "rotation alone": Peer(OURS, ALONE, gpu_only=False, is_yardstick=True),
    "rope_cupy": Peer(
        OURS, {"rotation": rotation, "training": training, "join": join, **FUSED}, gpu_only=False
    ),
    "two calls and torch.cat": Peer(OURS, {"join": joined_by_two_calls}, gpu_only=False),
    "rope_cupy, compiled": Peer(OURS, {"training": compiled_training}),
}
