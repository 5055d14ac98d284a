"""FlashInfer: its Python functions, which compile their kernels when they are first called."""

from __future__ import annotations

import functools

import torch
from result import UnsupportedError
from tasks import BLOCK, SCALE, Call, Inputs, Pair, Task, cache

from . import (
    Build,
    Peer,
    by_token,
    every_position,
    imported,
    need,
    need_sixteen_bits,
    q_after,
    slices,
    whole,
)


def rotation(task: Task, inputs: Inputs) -> Call:
    """flashinfer.rope.apply_rope_with_cos_sin_cache, and its form in place."""
    library, shape = imported("flashinfer.rope"), task.shape
    need(shape.rotary_dim in (64, 128, 256, 512), "head_dim of 64, 128, 256 or 512")
    need_sixteen_bits(task)
    table, positions = inputs.table.form(cache, torch.float32), every_position(task, inputs)
    options = shape.rotary_dim, table, not shape.interleaved
    if task.variant != "new":
        q, k = (by_token(x) for x in slices(task, inputs))
        rotate = library.apply_rope_with_cos_sin_cache_inplace
        return whole(functools.partial(rotate, positions, q, k, *options), inputs)
    need(shape.rotary_dim == shape.head_dim, "a new array of the slice alone")
    q, k = (x.view(-1, x.shape[2] * x.shape[3]) for x in inputs[:2])
    rotate = functools.partial(library.apply_rope_with_cos_sin_cache, positions, q, k, *options)

    def call() -> Pair:
        q_out, k_out = rotate()
        return q_out.view(inputs.q.shape), k_out.view(inputs.k.shape)

    return call


def norm(task: Task, inputs: Inputs) -> Call:
    """FlashInfer has two, for other tasks."""
    imported("flashinfer.rope")
    raise UnsupportedError(
        "its fused norms compute the angles of a video, or fill a cache of 8/1 or 64/8 heads"
    )


def kv_cache(task: Task, inputs: Inputs) -> Call:
    """The rotation in place, then append_paged_kv_cache: two launches.

    Into 8 bits it is one, rope_quantize_fp8_append_paged_kv_cache, which rounds q to 8 bits too,
    and so has fewer bytes to write. All tokens are of one sequence, whose positions are the slots.
    """
    shape, layout, into = task.shape, task.op.cache or "", inputs.stored
    q, k, v = (by_token(x) for x in inputs[:3])
    caches, slots = into.arranged(layout), into.slots.flatten().int()
    num_blocks = into.k.shape[0]
    pages = torch.arange(num_blocks, device=slots.device, dtype=torch.int32)
    ends, full = slots.new_tensor([0, num_blocks]), slots.new_tensor([BLOCK])
    sequence = torch.zeros_like(slots)
    if into.scale is None:
        append = functools.partial(
            imported("flashinfer.page").append_paged_kv_cache,
            *(k, v, sequence, slots, caches, pages, ends, full),
            kv_layout=layout,
        )
        return q_after(inputs, rotation(task, inputs), append)
    need(shape.rotary_dim == shape.head_dim, "measured with whole heads only")
    positions, table = every_position(task, inputs), inputs.table.form(cache, torch.float32)
    q_out = torch.empty_like(inputs.q, dtype=into.k.dtype)
    append = functools.partial(
        imported("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache,
        *(q, k, None, None, v, table, positions, caches, pages, ends, sequence, slots),
        is_neox=not shape.interleaved,
        quant_scale_kv=1 / SCALE,
        page_size=BLOCK,
        kv_layout=layout,
        q_rope_out=q_out.flatten(0, 1),
        enable_pdl=torch.cuda.get_device_capability() >= (9, 0),
    )
    return q_after(inputs._replace(q=q_out), append)


def _build(tasks: list[Task]) -> list[Build]:
    fills = any(task.op.cache for task in tasks)
    return [(_call_rotation,), *([(_call_append,)] if fills else [])]


def _call_rotation() -> None:
    rotate = imported("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    positions = torch.zeros(1, dtype=torch.int64, device="cuda")
    q, k = torch.zeros(2, 1, 64, dtype=torch.bfloat16, device="cuda")
    rotate(positions, q, k, 64, torch.zeros(1, 64, device="cuda"))


def _call_append() -> None:
    append = imported("flashinfer.page").append_paged_kv_cache
    rows = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    caches = torch.zeros(2, 1, BLOCK, 1, 64, dtype=torch.bfloat16, device="cuda")
    zero, one = torch.arange(2, dtype=torch.int32, device="cuda")[:, None]
    append(rows, rows, zero, zero, tuple(caches), zero, torch.cat([zero, one]), one)


PEERS = {
    "FlashInfer": Peer(
        ("flashinfer-python",),
        {"rotation": rotation, "norm": norm, "cache": kv_cache},
        build=_build,
    )
}
