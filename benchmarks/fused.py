"""The rotation fused with what stands beside it: what is asked, of whom, and what is right.

A provider is a function from a task and its inputs to a call of no argument, as in providers.py,
whose helpers it uses. The call returns q and k, in place where the provider can, or q alone where k
and v go into their caches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import inputs as rotations
import numpy as np
import providers as peers
import torch
from inputs import CHECKED, reference
from outcome import AbsentError, UnsupportedError, WrongError
from providers import SEQUENCE, Call, Case, Pair
from shapes import Shape

EPS = 1e-6
BLOCK = 16  # slots of a block of a cache
SCALE = 0.02  # what is divided by before it is rounded to 8 bits: normal numbers, as up to 300
TOLERANCE = rotations.TOLERANCE | {"float8_e4m3fn": 4e-2}  # three bits behind the leading one


class Op(NamedTuple):
    """What is fused.

    variant: of the case, how q and k lie and who tells their positions.
    norm: "head" or "heads", over which RMSNorm takes its mean, or nothing.
    cache: "NHD" for k and v that go into a flat cache, "HND" into a paged one, or nothing.
    """

    variant: str = "in place"
    norm: str | None = None
    cache: str | None = None
    cache_dtype: str = "bfloat16"


OPS = {
    "norm head": Op(norm="head"),
    "norm heads": Op(norm="heads"),
    "cache": Op("positions", cache="NHD"),
    "cache paged HND": Op("positions", cache="HND"),
    "cache float8": Op("positions", cache="NHD", cache_dtype="float8_e4m3fn"),
    "qkv": Op("packed"),
    "qkv norm": Op("packed", norm="head"),
    "eager": Op(),  # every product and sum rounded, by tables in the dtype of q
}


class Task(NamedTuple):
    """An operation on a case."""

    name: str
    case: Case

    def __str__(self) -> str:
        return f"{self.name}, {self.shape.name}"

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def shape(self) -> Shape:
        return self.case.shape

    @property
    def device(self) -> str:
        return self.case.device

    @property
    def heads_bytes(self) -> int:
        """Bytes of heads that are read and written once."""
        if self.op.cache is None:
            return self.rotation_bytes
        return self.rotation_bytes // self._heads * self.shape.q_heads + self.store_bytes

    @property
    def rotation_bytes(self) -> int:
        """Those of q and k in place, of which a norm reads and writes all, also what rests."""
        shape = self.shape
        width = shape.head_dim if self.op.norm else shape.rotary_dim
        return 2 * shape.batch * shape.tokens * self._heads * width * self.case.itemsize

    @property
    def store_bytes(self) -> int:
        """Those of k and v, read from where they are and written to their caches."""
        shape = self.shape
        itemsizes = self.case.itemsize + getattr(torch, self.op.cache_dtype).itemsize
        return 2 * shape.batch * shape.tokens * shape.k_heads * shape.head_dim * itemsizes

    @property
    def table_bytes(self) -> int:
        """Bytes of the table's rows, of positions, slots and weights, read once."""
        shape = self.shape
        rows = self.case.table_bytes // (2 if self.name == "eager" else 1)
        slots = 8 * shape.batch * shape.tokens if self.op.cache else 0
        heads = {None: 0, "head": 2, "heads": self._heads}[self.op.norm]
        return rows + slots + heads * shape.head_dim * self.case.itemsize

    @property
    def _heads(self) -> int:
        return self.shape.q_heads + self.shape.k_heads


class Cache(NamedTuple):
    """Where k and v go."""

    k: torch.Tensor  # (blocks, BLOCK, heads, d), however it lies
    v: torch.Tensor
    slots: torch.Tensor  # (b, s), int64
    scale: torch.Tensor | None  # of k and of v, (1,), float32

    def arranged(self, layout: str) -> Pair:
        """Return k and v as blocks in a layout."""
        return (self.k, self.v) if layout == "NHD" else _swapped(self.k, self.v)

    def flat(self) -> Pair:
        """Return k and v as (slots, heads, d)."""
        return self.k.flatten(0, 1), self.v.flatten(0, 1)


class Inputs(NamedTuple):
    """One set of what a call reads and writes."""

    qkv: peers.Inputs
    weights: Pair | None
    cache: Cache | None


def inputs_of(task: Task) -> list[Inputs]:
    """Return sets of inputs, as many as of the rotation alone."""
    shape, op, device = task.shape, task.op, task.device
    weights = None
    if op.norm:
        sizes = [shape.head_dim * (n if op.norm == "heads" else 1) for n in shape[3:5]]
        # Of size 1, so that what is normalised again and again does not fade.
        signs = [2 * torch.randint(2, (size,), device=device) - 1 for size in sizes]
        q_weight, k_weight = (sign.to(getattr(torch, task.case.dtype)) for sign in signs)
        weights = q_weight, k_weight
    return [
        Inputs(qkv, weights, _cache(task) if op.cache else None)
        for qkv in rotations.inputs_of(task.case)
    ]


def _cache(task: Task) -> Cache:
    """Return empty caches, twice as large as what is stored, and slots in blocks of any order.

    Of fewer tokens than a sequence each has a block of its own.
    """
    shape, device = task.shape, task.device
    tokens, dtype = shape.batch * shape.tokens, getattr(torch, task.op.cache_dtype)
    count = torch.arange(tokens, device=device)
    is_long = tokens >= SEQUENCE
    num_blocks = 2 * (-(-tokens // BLOCK) if is_long else tokens)
    blocks = torch.randperm(num_blocks, device=device)
    if is_long:
        slots = blocks[count // BLOCK] * BLOCK + count % BLOCK
    else:
        slots = blocks[:tokens] * BLOCK + torch.randint(BLOCK, (tokens,), device=device)
    axes = num_blocks, BLOCK, shape.k_heads, shape.head_dim
    if task.op.cache == "HND":
        axes = num_blocks, shape.k_heads, BLOCK, shape.head_dim
    k, v = (torch.zeros(axes, dtype=dtype, device=device) for _ in range(2))
    if task.op.cache == "HND":
        k, v = _swapped(k, v)
    scale = torch.full((1,), SCALE, device=device) if dtype.itemsize == 1 else None
    return Cache(k, v, slots.view(shape.batch, shape.tokens), scale)


def _swapped(k: torch.Tensor, v: torch.Tensor) -> Pair:
    return k.transpose(1, 2), v.transpose(1, 2)


class Exact:
    """What a task gives for one set in float64, at some of its tokens."""

    def __init__(self, task: Task, inputs: Inputs) -> None:
        shape, qkv = task.shape, inputs.qkv
        self.task, self.inputs = task, inputs
        self.before = [x.clone() for x in (qkv.q, qkv.k, qkv.v)]
        num = min(shape.tokens, max(8, CHECKED // (shape.q_heads * shape.head_dim)))
        some = np.random.default_rng().permutation(shape.tokens)[:num]
        tokens = sorted({0, shape.tokens - 1, *map(int, some)})
        self.index = torch.tensor(tokens, device=task.device)
        q, k, v = (reference.to_float64(x[:, self.index]) for x in self.before)
        if inputs.weights:
            weights = map(reference.to_float64, inputs.weights)
            q, k = (normalised(x, weight) for x, weight in zip((q, k), weights, strict=True))
        cos, sin = map(reference.to_float64, _table_of(task, inputs))
        rows = self.index if qkv.positions is None else qkv.positions[self.index]
        rotate = functools.partial(
            reference.rotate,
            cos=cos,
            sin=sin,
            interleaved=shape.interleaved,
            rotary_offset=shape.rotary_offset,
            positions=np.asarray(rows.cpu()),
        )
        self.after = [rotate(q), rotate(k), v]

    def error_of(self, call: Call) -> float:
        """Restore the set, make a call on it and return its relative error.

        Raises WrongError where that is more than a few roundings.
        """
        qkv, cache = self.inputs.qkv, self.inputs.cache
        for x, before in zip((qkv.q, qkv.k, qkv.v), self.before, strict=True):
            x.copy_(before)
        if cache is not None:
            cache.k.zero_(), cache.v.zero_()
        results = [call()] if cache is not None else [*call(), qkv.v]
        actual = [(x.dtype, _numbers(x)[:, self.index]) for x in results]
        if cache is not None:
            actual += [(x.dtype, self._stored(x)) for x in (cache.k, cache.v)]
        error = 0.0
        for (dtype, values), exact in zip(actual, self.after, strict=True):
            error = max(error, self._error(dtype, reference.to_float64(values), exact))
        return error

    def _error(self, dtype: torch.dtype, actual: np.ndarray, exact: np.ndarray) -> float:
        name = str(dtype).removeprefix("torch.")
        known = self.task.case.dtype, self.task.op.cache_dtype
        if actual.shape != exact.shape or name not in known:
            raise WrongError(f"{name} of shape {actual.shape}", math.nan)
        error = float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
        if not error <= TOLERANCE[name]:
            raise WrongError(f"relative error {error:.1e}", error)
        return error

    def _stored(self, cached: torch.Tensor) -> torch.Tensor:
        """Return what a cache holds of the tokens, and see that no other slot was written."""
        cache = self.inputs.cache
        assert cache is not None
        numbers = _numbers(cached) * (1 if cache.scale is None else SCALE)
        slots = cache.slots[:, self.index]
        rows = numbers[slots // BLOCK, slots % BLOCK]
        numbers[cache.slots // BLOCK, cache.slots % BLOCK] = 0
        if numbers.any():
            raise WrongError("a slot of no token is written", math.nan)
        return rows


def _numbers(x: torch.Tensor) -> torch.Tensor:
    """Return numbers of 8 bits as such that PyTorch's operations know."""
    return x.float() if x.itemsize == 1 else x


def normalised(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return RMSNorm of (b, s, h, d) over as many neighbours as there are weights."""
    rows = x.reshape(*x.shape[:2], -1, len(weight))
    means = np.mean(rows**2, axis=-1, keepdims=True)
    return (rows / np.sqrt(means + EPS) * weight).reshape(x.shape)


def _table_of(task: Task, inputs: Inputs) -> Pair:
    """Return the cosines and sines that rope_cupy reads, which for "eager" are rounded."""
    table = inputs.qkv.table
    if task.name != "eager":
        return table.cos, table.sin
    return table.form(_rounded, inputs.qkv.q.dtype)


def _rounded(table: peers.Table, dtype: torch.dtype) -> Pair:
    return table.cos.to(dtype), table.sin.to(dtype)


def limit(task: Task, inputs: Inputs, **options: int) -> Call:
    """Read and write back as many bytes as the task has to read and write, in dense memory."""
    return peers.limit(task, inputs.qkv, **options)


def rotation(task: Task, inputs: Inputs, rounding: str = "once") -> Call:
    """rope_cupy.apply_rotary_qk in place, of the same q and k by the same table."""
    q, k = inputs.qkv.q, inputs.qkv.k
    return functools.partial(
        peers.imported("rope_cupy").apply_rotary_qk,
        q,
        k,
        _rope_cupy_table(task, inputs),
        interleaved=task.shape.interleaved,
        rotary_offset=task.shape.rotary_offset,
        rounding=rounding,
        out=(q, k),
        **inputs.qkv.how,
    )


def rope_cupy(task: Task, inputs: Inputs) -> Call:
    """The function of rope_cupy for the task, in place."""
    library, op, qkv, shape = peers.imported("rope_cupy"), task.op, inputs.qkv, task.shape
    q, k, table = qkv.q, qkv.k, _rope_cupy_table(task, inputs)
    how = {"interleaved": shape.interleaved, "rotary_offset": shape.rotary_offset, **qkv.how}
    if inputs.cache is not None:
        cache = inputs.cache
        caches = cache.flat() if op.cache == "NHD" else cache.arranged("HND")
        how |= {"slot_mapping": cache.slots, "cache_layout": op.cache, "out": q}
        how |= {"k_scale": cache.scale, "v_scale": cache.scale}
        return functools.partial(library.apply_rotary_kv_cache, q, k, qkv.v, *caches, table, **how)
    if op.norm:
        q_weight, k_weight = inputs.weights or (None, None)
        how |= {"q_weight": q_weight, "k_weight": k_weight, "norm": op.norm, "eps": EPS}
    if op.variant == "packed":
        packed = _packed(task, inputs)
        how |= {"num_heads": shape.q_heads, "num_kv_heads": shape.k_heads, "out": packed}
        return peers._whole(functools.partial(library.apply_rotary_qkv, packed, table, **how), qkv)
    if op.norm:
        return functools.partial(library.apply_qk_norm_rotary, q, k, table=table, out=(q, k), **how)
    return rotation(task, inputs, rounding="eager")


def _rope_cupy_table(task: Task, inputs: Inputs) -> Any:
    return peers.imported("rope_cupy").RotaryTable(*_table_of(task, inputs))


def _packed(task: Task, inputs: Inputs) -> torch.Tensor:
    """Return the buffer (b, s, q_heads + 2 k_heads, d) of which q, k and v are views."""
    shape = task.shape
    heads = shape.q_heads + 2 * shape.k_heads
    size = shape.batch * shape.tokens * heads * shape.head_dim
    return inputs.qkv.memory[:size].view(shape.batch, shape.tokens, heads, shape.head_dim)


def normalised_by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return RMSNorm of (b, s, h, d) over as many neighbours as there are weights."""
    rows = x.flatten(2).unflatten(2, (-1, len(weight)))
    return torch.nn.functional.rms_norm(rows, weight.shape, weight, EPS).view(x.shape)


def norm_rotated_by_torch(q: torch.Tensor, k: torch.Tensor, weights: Pair, *arguments: Any) -> Pair:
    """Return q and k normalised in float32 and rounded, then rotated, as models have it."""
    q, k = (normalised_by_torch(x, weight) for x, weight in zip((q, k), weights, strict=True))
    return peers.rotated_qk_by_torch(q, k, *arguments)


def torch_eager_norm(task: Task, inputs: Inputs) -> Call:
    """PyTorch's rms_norm, then its operations one by one in float32, into new arrays."""
    return functools.partial(norm_rotated_by_torch, *_norm_arguments(task, inputs))


def torch_compile_norm(task: Task, inputs: Inputs) -> Call:
    """The same function compiled by torch.compile for the shape, into new arrays."""
    peers.gpu_only(task.case)
    return functools.partial(_compiled(task, norm_rotated_by_torch), *_norm_arguments(task, inputs))


def _norm_arguments(task: Task, inputs: Inputs) -> tuple[Any, ...]:
    q, k, *arguments = peers._torch_arguments(task.case, inputs.qkv)
    return q, k, inputs.weights, *arguments


@functools.lru_cache(maxsize=1)
def _compiled(task: Task, function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # else the shapes before count against the limit of recompilations
    return torch.compile(function, dynamic=False)


def sglang_norm(task: Task, inputs: Inputs) -> Call:
    """SGLang's fused_inplace_qknorm_rope, without the custom op around it: see providers.sglang."""
    peers.gpu_only(task.case)
    q, k, _ = _by_token(inputs)
    launch = _sglang(*_sglang_norm(task)).launch
    table = inputs.qkv.table.form(peers.cache, torch.float32)
    positions = peers._every_position(task.case, inputs.qkv)
    weights = inputs.weights or ()
    call = functools.partial(launch, q, k, *weights, table, positions, EPS)
    return peers._whole(call, inputs.qkv)


def _sglang_norm(task: Task) -> tuple[str, str]:
    shape = task.shape
    if task.op.norm != "head":
        raise UnsupportedError("a norm of each head only")
    if shape.head_dim not in (64, 128, 256) or shape.rotary_offset:
        raise UnsupportedError("heads of 64, 128 or 256 that turn from their beginning only")
    sizes = f"{shape.head_dim}, {shape.rotary_dim}, {_is_neox(shape)}"
    return "diffusion/qknorm_rope.cuh", f"QKNormRopeKernel<{sizes}, PDL, {_element(task)}>"


def comfy_kitchen(task: Task, inputs: Inputs) -> Call:
    """comfy_kitchen.rms_rope_ and its kin for halves, in place, on its fastest backend.

    One launch where q and k have as many heads, else two. Without a norm, see providers.py.
    """
    peers.gpu_only(task.case)
    library = peers.imported("comfy_kitchen")
    if task.op.variant == "packed" and task.shape.q_heads != task.shape.k_heads:
        raise UnsupportedError("packed q and k of as many heads only")
    if task.op.norm is None:
        return peers.comfy_kitchen(task.case, inputs.qkv)
    if task.op.norm != "head":
        raise UnsupportedError("a norm of each head only")
    peers._whole_heads_only(task.case)
    rotate = library.rms_rope_ if task.shape.interleaved else library.rms_rope_split_half_
    table = inputs.qkv.table.form(peers.matrices)[None, : task.shape.tokens, None]
    weights = inputs.weights or ()
    return functools.partial(rotate, inputs.qkv.q, inputs.qkv.k, table, *weights, EPS)


def flashinfer_norm(task: Task, inputs: Inputs) -> Call:
    """FlashInfer has two, for other tasks."""
    peers.gpu_only(task.case)
    peers.imported("flashinfer.rope")
    raise UnsupportedError(
        "its fused norms compute the angles of a video, or fill a cache of 8/1 or 64/8 heads"
    )


def liger_norm(task: Task, inputs: Inputs) -> Call:
    """LigerRMSNormFunction of q and of k, then liger_rotary_pos_emb: three Triton kernels."""
    peers.liger(task.case, inputs.qkv)  # says what it cannot do
    normalise = peers.imported("liger_kernel.transformers.rms_norm").LigerRMSNormFunction.apply
    weights = inputs.weights or ()

    def call() -> Pair:
        q, k = (
            normalise(x.flatten(2).unflatten(2, (-1, len(weight))), weight, EPS).view(x.shape)
            for x, weight in zip(inputs.qkv[:2], weights, strict=True)
        )
        return peers.liger(task.case, inputs.qkv._replace(q=q, k=k))()

    return call


def sglang_cache(task: Task, inputs: Inputs) -> Call:
    """SGLang's apply_rope_inplace_with_kvcache, without the custom op around it.

    It rotates k where it is as well.
    """
    peers.gpu_only(task.case)
    launch = _sglang(*_sglang_cache(task)).launch
    positions = peers._every_position(task.case, inputs.qkv)
    table = inputs.qkv.table.form(peers.cache, torch.float32)
    caches, slots = _flat_rows(inputs)
    return _q_of(
        functools.partial(launch, *_by_token(inputs), *caches, table, positions, slots), inputs
    )


def _sglang_cache(task: Task) -> tuple[str, str]:
    shape = task.shape
    _flat_only(task)
    if shape.rotary_dim != shape.head_dim or shape.head_dim not in (64, 128, 256, 512):
        raise UnsupportedError("whole heads of 64, 128, 256 or 512 only")
    kernel = f"FusedRopeKernel<{_is_neox(shape)}, {shape.rotary_dim}, PDL, {_element(task)}>"
    return "elementwise/rope.cuh", f"{kernel}::run_fused"


def two_launches(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk in place, then SGLang's store_cache without its custom op."""
    peers.gpu_only(task.case)
    store = _sglang(*_sglang_store(task)).launch
    caches, slots = _flat_rows(inputs)
    k, v = (x.flatten(2).flatten(0, 1) for x in (inputs.qkv.k, inputs.qkv.v))
    row_bytes = _row_bytes(task)
    num_split = 4 if row_bytes % 2048 == 0 else 2 if row_bytes % 1024 == 0 else 1  # as it chooses
    rotate = rotation(task, inputs)

    def call() -> torch.Tensor:
        rotate()
        store(k, v, *caches, slots, num_split)
        return inputs.qkv.q

    return call


def _sglang_store(task: Task) -> tuple[str, str]:
    _flat_only(task)
    return "elementwise/kvcache.cuh", f"StoreKVCacheKernel<{_row_bytes(task)}, PDL>"


def _row_bytes(task: Task) -> int:
    return task.shape.k_heads * task.shape.head_dim * task.case.itemsize


def _flat_only(task: Task) -> None:
    if task.op.cache != "NHD" or task.op.cache_dtype != task.case.dtype:
        raise UnsupportedError("a flat cache in the dtype of q only")


def _flat_rows(inputs: Inputs) -> tuple[Pair, torch.Tensor]:
    """Return caches (slots, heads * d) and the slots of all tokens."""
    assert inputs.cache is not None
    k, v = inputs.cache.flat()
    return (k.flatten(1), v.flatten(1)), inputs.cache.slots.flatten()


def stored_by_torch(k: torch.Tensor, v: torch.Tensor, cache: Cache) -> None:
    """Store k and v by PyTorch's operations."""
    slots = cache.slots.flatten()
    for x, cached in ((k, cache.k), (v, cache.v)):
        rows = x.flatten(0, 1)
        if cache.scale is not None:
            most = torch.finfo(cached.dtype).max
            quotients = (rows.float() / cache.scale).clamp(-most, most)
            rows, cached = quotients.to(cached.dtype).view(torch.uint8), cached.view(torch.uint8)
        if cached.is_contiguous():
            cached.flatten(0, 1).index_copy_(0, slots, rows)
        else:
            cached[slots // BLOCK, slots % BLOCK] = rows


def torch_two_launches(task: Task, inputs: Inputs) -> Call:
    """rope_cupy.apply_rotary_qk in place, then PyTorch's index_copy_ of k and of v.

    Into blocks it is an assignment by indices; numbers of 8 bits are made by several operations.
    """
    rotate, qkv, cache = rotation(task, inputs), inputs.qkv, inputs.cache
    assert cache is not None

    def call() -> torch.Tensor:
        rotate()
        stored_by_torch(qkv.k, qkv.v, cache)
        return qkv.q

    return call


def rotated_and_stored_by_torch(
    v: torch.Tensor, cache: Cache, q: torch.Tensor, k: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    """Return q rotated, and store k rotated and v, by PyTorch's operations."""
    q, k = peers.rotated_qk_by_torch(q, k, *arguments)
    stored_by_torch(k, v, cache)
    return q


def torch_eager_cache(task: Task, inputs: Inputs) -> Call:
    """PyTorch's operations one by one, q into a new array."""
    arguments = peers._torch_arguments(task.case, inputs.qkv)
    return functools.partial(rotated_and_stored_by_torch, inputs.qkv.v, inputs.cache, *arguments)


def torch_compile_cache(task: Task, inputs: Inputs) -> Call:
    """The same function compiled by torch.compile for the shape."""
    peers.gpu_only(task.case)
    function = _compiled(task, rotated_and_stored_by_torch)
    arguments = peers._torch_arguments(task.case, inputs.qkv)
    return functools.partial(function, inputs.qkv.v, inputs.cache, *arguments)


def flashinfer_cache(task: Task, inputs: Inputs) -> Call:
    """FlashInfer's rotation in place, then append_paged_kv_cache: two launches.

    Into 8 bits it is one, rope_quantize_fp8_append_paged_kv_cache, which rounds q to 8 bits too,
    and so has fewer bytes to write. All tokens are of one sequence, whose positions are the slots.
    """
    peers.gpu_only(task.case)
    shape, op, qkv, cache = task.shape, task.op, inputs.qkv, inputs.cache
    assert op.cache is not None and cache is not None
    q, k, v = _by_token(inputs)
    caches, slots = cache.arranged(op.cache), cache.slots.flatten().int()
    num_blocks = cache.k.shape[0]
    pages = torch.arange(num_blocks, device=slots.device, dtype=torch.int32)
    ends, full = slots.new_tensor([0, num_blocks]), slots.new_tensor([BLOCK])
    sequence = torch.zeros_like(slots)
    if cache.scale is not None:
        if shape.rotary_dim != shape.head_dim:
            raise UnsupportedError("measured with whole heads only")
        positions = peers._every_position(task.case, qkv)
        q_out = torch.empty_like(qkv.q, dtype=cache.k.dtype)
        append = functools.partial(
            peers.imported("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache,
            *(q, k, None, None, v, qkv.table.form(peers.cache, torch.float32), positions, caches),
            *(pages, ends, sequence, slots),
            is_neox=not shape.interleaved,
            quant_scale_kv=1 / SCALE,
            page_size=BLOCK,
            kv_layout=op.cache,
            q_rope_out=q_out.flatten(0, 1),
            enable_pdl=torch.cuda.get_device_capability() >= (9, 0),
        )

        def quantize() -> torch.Tensor:
            append()
            return q_out

        return quantize
    rotate = peers.flashinfer(task.case, qkv)
    append = functools.partial(
        peers.imported("flashinfer.page").append_paged_kv_cache,
        *(k, v, sequence, slots, caches, pages, ends, full),
        kv_layout=op.cache,
    )

    def call() -> torch.Tensor:
        rotate()
        append()
        return qkv.q

    return call


def vllm_cache(task: Task, inputs: Inputs) -> Call:
    """vLLM's rotary_embedding in place, then its reshape_and_cache_flash: two launches."""
    rotate = peers.vllm(task.case, inputs.qkv)
    store = peers.imported("vllm._custom_ops").reshape_and_cache_flash
    _, k, v = _by_token(inputs)
    cache = inputs.cache
    assert cache is not None
    caches, kind = (cache.k, cache.v), "auto"
    if cache.scale is not None:
        caches, kind = (cache.k.view(torch.uint8), cache.v.view(torch.uint8)), "fp8"
    scale = torch.ones(1, device=k.device) if cache.scale is None else cache.scale
    arguments = k, v, *caches, cache.slots.flatten(), kind, scale, scale

    def call() -> torch.Tensor:
        rotate()
        store(*arguments)
        return inputs.qkv.q

    return call


def _rotating(provider: Callable[..., Call]) -> Callable[..., Call]:
    """Return a provider of a task that the rotation is."""
    return lambda task, inputs: provider(task.case, inputs.qkv)


def _by_token(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (peers._by_token(x) for x in inputs.qkv[:3])
    return q, k, v


def _q_of(call: Call, inputs: Inputs) -> Call:
    whole = peers._whole(call, inputs.qkv)
    return lambda: whole()[0]


def _is_neox(shape: Shape) -> str:
    return str(not shape.interleaved).lower()


def _element(task: Task) -> str:
    peers._sixteen_bits(task.case)
    return {"bfloat16": "bf16_t", "float16": "fp16_t"}[task.case.dtype]


@functools.cache
def _sglang(header: str, kernel: str) -> Any:
    """Build a kernel of SGLang as its jit_kernel does, and return the module that launches it."""
    build = peers.imported("tvm_ffi.cpp").load_inline
    package = importlib.util.find_spec("sglang")
    if package is None or package.origin is None:
        raise AbsentError("sglang is not installed")
    folder = Path(package.origin).parent / "jit_kernel"
    path = folder / "csrc" / header
    if not path.exists():
        raise AbsentError(f"sglang {peers.version('SGLang')} has no {path}")
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", f"{major}.{minor}")
    kernel = kernel.replace("PDL", "true" if major >= 9 else "false")
    function = kernel if kernel.endswith("run_fused") else f"{kernel}::run"
    flags = ["-std=c++20", "-O3"]
    module = build(
        "sglang_" + re.sub(r"\W+", "_", function),
        cuda_sources=[
            f'#include "{path}"',
            f"TVM_FFI_DLL_EXPORT_TYPED_FUNC(launch, ({function}));",
        ],
        extra_cflags=flags,
        extra_cuda_cflags=[
            f"-DSGL_CUDA_ARCH={major * 100 + minor * 10}",
            *flags,
            "--expt-relaxed-constexpr",
        ],
        extra_include_paths=[str(folder / "include")],
    )
    return module


Provider = Callable[..., Call]
LIMIT, ROTATION, OURS = "limit", "rotation alone", "rope_cupy"
TWO_LAUNCHES, TORCH_TWO_LAUNCHES = "two launches", "torch two launches"
YARDSTICKS = (LIMIT, ROTATION)  # the one rotates nothing, the other nothing but rotates
NORM: dict[str, Provider] = {
    LIMIT: limit,
    ROTATION: rotation,
    OURS: rope_cupy,
    "SGLang": sglang_norm,
    "comfy-kitchen": comfy_kitchen,
    "FlashInfer": flashinfer_norm,
    "Liger": liger_norm,
    "torch.compile": torch_compile_norm,
    "torch eager": torch_eager_norm,
}
CACHE: dict[str, Provider] = {
    LIMIT: limit,
    OURS: rope_cupy,
    TWO_LAUNCHES: two_launches,
    TORCH_TWO_LAUNCHES: torch_two_launches,
    "SGLang": sglang_cache,
    "FlashInfer": flashinfer_cache,
    "vLLM": vllm_cache,
    "torch.compile": torch_compile_cache,
    "torch eager": torch_eager_cache,
}
QKV: dict[str, Provider] = {
    LIMIT: limit,
    ROTATION: rotation,
    OURS: rope_cupy,
    "SGLang": _rotating(peers.sglang),
    "comfy-kitchen": comfy_kitchen,
    "flash-attn": _rotating(peers.flash_attn),
    "quack": _rotating(peers.quack),
}
EAGER: dict[str, Provider] = {
    LIMIT: limit,
    ROTATION: rotation,
    OURS: rope_cupy,
    "transformers": _rotating(peers.transformers),
}
PROVIDERS = {
    name: CACHE if op.cache else NORM if op.norm else EAGER if name == "eager" else QKV
    for name, op in OPS.items()
}
NAMES = [*dict.fromkeys(name for each in (NORM, CACHE, QKV, EAGER) for name in each)]
PACKAGES = {ROTATION: OURS, TWO_LAUNCHES: "SGLang", TORCH_TWO_LAUNCHES: "torch eager"}


def version(provider: str) -> str:
    """Return the version of a provider's package, or nothing."""
    return peers.version(PACKAGES.get(provider, provider))


def build_ahead(tasks: list[Task], providers: list[str]) -> None:
    """Build what FlashInfer and SGLang compile, at once; a failure is met again in a call."""
    kernels: set[tuple[str, str]] = set()
    for task in tasks:
        wanted: list[Callable[[Task], tuple[str, str]]] = []
        if "SGLang" in providers and (task.op.cache or task.op.norm):
            wanted.append(_sglang_cache if task.op.cache else _sglang_norm)
        if TWO_LAUNCHES in providers and task.op.cache:
            wanted.append(_sglang_store)
        for kernel_of in wanted:
            with contextlib.suppress(UnsupportedError):
                kernels.add(kernel_of(task))
    rotating = [task.case for task in tasks if PROVIDERS[task.name] is QKV]
    builds = [functools.partial(_sglang, *kernel) for kernel in kernels]
    builds.append(functools.partial(peers.build_ahead, rotating, providers))
    if "FlashInfer" in providers and any(task.op.cache for task in tasks):
        builds.append(_call_flashinfer)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for build in builds:
            pool.submit(build)


def _call_flashinfer() -> None:
    append = peers.imported("flashinfer.page").append_paged_kv_cache
    rows = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device="cuda")
    caches = torch.zeros(2, 1, BLOCK, 1, 64, dtype=torch.bfloat16, device="cuda")
    zero, one = torch.arange(2, dtype=torch.int32, device="cuda")[:, None]
    append(rows, rows, zero, zero, tuple(caches), zero, torch.cat([zero, one]), one)
