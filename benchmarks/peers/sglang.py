"""SGLang: kernels of its jit_kernel, launched through raw tvm-ffi with dependent launch.

`import sglang` needs most of what a server needs. So the package is found without importing it, and
its public headers are built as its own sglang.jit_kernel builds them. What is called is what its
functions call, without the custom op around it; "SGLang torch op" has such an op.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result import AbsentError, UnsupportedError
from tasks import EPS, Call, Inputs, Pair, Task, cache

from . import (
    Build,
    Peer,
    by_token,
    every_position,
    imported,
    installed,
    need,
    need_in_place,
    need_sixteen_bits,
    q_after,
    slices,
    whole,
)
from .rope_cupy import alone

ROPE = "elementwise/rope.cuh"


def rotation(task: Task, inputs: Inputs, as_torch_op: bool = False) -> Call:
    """The FusedRopeKernel that apply_rope_inplace calls, in place."""
    need_in_place(task)
    need_sixteen_bits(task)
    q, k = (by_token(x) for x in slices(task, inputs))
    need(q.stride(1) == k.stride(1), "one stride from head to head for q and k")
    of = rotation_kernel(task)
    launch = _torch_op(*of) if as_torch_op else kernel(*of).launch
    table, positions = inputs.table.form(cache, torch.float32), every_position(task, inputs)
    return whole(functools.partial(launch, q, k, table, positions), inputs)


def norm(task: Task, inputs: Inputs) -> Call:
    """The QKNormRopeKernel of fused_inplace_qknorm_rope."""
    launch = kernel(*norm_kernel(task)).launch
    q, k = (by_token(x) for x in inputs[:2])
    table, positions = inputs.table.form(cache, torch.float32), every_position(task, inputs)
    weights = inputs.weights or ()
    return whole(functools.partial(launch, q, k, *weights, table, positions, EPS), inputs)


def kv_cache(task: Task, inputs: Inputs) -> Call:
    """apply_rope_inplace_with_kvcache, which rotates k where it is as well."""
    launch = kernel(*cache_kernel(task)).launch
    table, positions = inputs.table.form(cache, torch.float32), every_position(task, inputs)
    caches, slots = _flat_rows(inputs)
    heads = (by_token(x) for x in inputs[:3])
    return q_after(inputs, functools.partial(launch, *heads, *caches, table, positions, slots))


def two_launches(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk in place, then the StoreKVCacheKernel of store_cache."""
    store = kernel(*store_kernel(task)).launch
    caches, slots = _flat_rows(inputs)
    k, v = (x.flatten(2).flatten(0, 1) for x in (inputs.k, inputs.v))
    row_bytes = _row_bytes(task)
    num_split = 4 if row_bytes % 2048 == 0 else 2 if row_bytes % 1024 == 0 else 1  # as it chooses
    return q_after(inputs, alone(task, inputs), store, k, v, *caches, slots, num_split)


def rotation_kernel(task: Task) -> tuple[str, str]:
    return (
        ROPE,
        f"FusedRopeKernel<{_is_neox(task)}, {task.shape.rotary_dim}, PDL, {_element(task)}>",
    )


def norm_kernel(task: Task) -> tuple[str, str]:
    shape = task.shape
    need(task.op.norm == "head", "a norm of each head only")
    rotates = shape.head_dim in (64, 128, 256) and not shape.rotary_offset
    need(rotates, "heads of 64, 128 or 256 that are rotated from their beginning only")
    sizes = f"{shape.head_dim}, {shape.rotary_dim}, {_is_neox(task)}"
    return "diffusion/qknorm_rope.cuh", f"QKNormRopeKernel<{sizes}, PDL, {_element(task)}>"


def cache_kernel(task: Task) -> tuple[str, str]:
    shape = task.shape
    _need_flat(task)
    is_whole = shape.rotary_dim == shape.head_dim and shape.head_dim in (64, 128, 256, 512)
    need(is_whole, "whole heads of 64, 128, 256 or 512 only")
    header, rotate = rotation_kernel(task)
    return header, f"{rotate}::run_fused"


def store_kernel(task: Task) -> tuple[str, str]:
    _need_flat(task)
    return "elementwise/kvcache.cuh", f"StoreKVCacheKernel<{_row_bytes(task)}, PDL>"


def _need_flat(task: Task) -> None:
    flat = task.op.cache == "NHD" and task.op.cache_dtype == task.dtype
    need(flat, "a flat cache in the dtype of q only")


def _row_bytes(task: Task) -> int:
    return task.shape.k_heads * task.shape.head_dim * task.itemsize


def _flat_rows(inputs: Inputs) -> tuple[Pair, torch.Tensor]:
    """Return caches (slots, heads * d) and the slots of all tokens."""
    k, v = inputs.stored.flat()
    return (k.flatten(1), v.flatten(1)), inputs.stored.slots.flatten()


def _is_neox(task: Task) -> str:
    return str(not task.shape.interleaved).lower()


def _element(task: Task) -> str:
    need_sixteen_bits(task)
    return {"bfloat16": "bf16_t", "float16": "fp16_t"}[task.dtype]


@functools.cache
def kernel(header: str, name: str) -> Any:
    """Build a kernel of SGLang as its jit_kernel does, and return the module that launches it."""
    build = imported("tvm_ffi.cpp").load_inline
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise AbsentError("sglang is not installed")
    folder = Path(package.origin).parent / "jit_kernel"
    path = folder / "csrc" / header
    if not path.exists():
        raise AbsentError(f"sglang {installed('sglang')} has no {path.relative_to(folder.parent)}")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", f"{major}.{minor}")
    name = name.replace("PDL", "true" if major >= 9 else "false")
    function = name if name.endswith("run_fused") else f"{name}::run"
    flags = ["-std=c++20", "-O3"]
    arch = f"-DSGL_CUDA_ARCH={major * 100 + minor * 10}"
    return build(
        "sglang_" + re.sub(r"\W+", "_", function),
        cuda_sources=[
            f'#include "{path}"',
            f"TVM_FFI_DLL_EXPORT_TYPED_FUNC(launch, ({function}));",
        ],
        extra_cflags=flags,
        extra_cuda_cflags=[arch, *flags, "--expt-relaxed-constexpr"],
        extra_include_paths=[str(folder / "include")],
    )


LIBRARY = torch.library.Library("rope_cupy_benchmarks", "DEF")


@functools.cache
def _torch_op(header: str, name: str) -> Callable[..., None]:
    """Return a launch as an operator of PyTorch, defined without torch.library.custom_op."""
    launch, op = kernel(header, name).launch, re.sub(r"\W+", "_", name)
    LIBRARY.define(f"{op}(Tensor(a!) q, Tensor(b!) k, Tensor table, Tensor positions) -> ()")
    LIBRARY.impl(op, lambda *arguments: launch(*arguments), "CUDA")
    return getattr(getattr(torch.ops, LIBRARY.ns), op).default


def _builds(kernels: dict[str, Callable[[Task], tuple[str, str]]]) -> Callable[..., list[Build]]:
    """Return what gives the builds of the kernels that tasks need, by kind of operation."""

    def builds(tasks: list[Task]) -> list[Build]:
        found = []
        for task in tasks:
            with contextlib.suppress(UnsupportedError):
                found.append((kernel, *kernels[task.op.kind](task)))
        return found

    return builds


ROTATIONS = dict.fromkeys(("rotation", "qkv"), rotation_kernel)
PEERS = {
    "SGLang": Peer(
        ("sglang",),
        {"rotation": rotation, "norm": norm, "cache": kv_cache, "qkv": rotation},
        build=_builds(ROTATIONS | {"norm": norm_kernel, "cache": cache_kernel}),
    ),
    "SGLang torch op": Peer(
        ("sglang",), {"host call": functools.partial(rotation, as_torch_op=True)}
    ),
    "two launches": Peer(
        ("sglang",), {"cache": two_launches}, build=_builds({"cache": store_kernel})
    ),
}
