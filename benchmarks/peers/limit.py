"""The limit: kernels that only read and write back the bytes of a task (limit.cu); and a copy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tasks import Call, Inputs, Task

from . import Peer, imported, need, slices

WORD = 16  # bytes that a thread moves at once


def dense(task: Task, inputs: Inputs, threads: int = 256) -> Call:
    """Read and write back as many bytes as the task has to move, in place, from dense memory."""
    words = task.heads_bytes // 2 // WORD
    if task.device == "cpu":
        numbers = inputs.memory.view(torch.uint8)[: words * WORD].view(torch.int64)
        return lambda: numbers.bitwise_xor_(0)
    q_words = words * task.shape.q_heads // task.heads
    start = inputs.memory.data_ptr()
    arguments = start, start + q_words * WORD, q_words, words - q_words
    return _launch("limit_kernel", -(-words // threads), (threads,), arguments)


def same_places(task: Task, inputs: Inputs, threads: int = 256) -> Call:
    """Read and write back just the slices of q and k that are rotated, in place.

    The memory is fetched in larger pieces than a slice may be, so this can take longer than the
    limit, which moves as many bytes that lie together.
    """
    shape = task.shape
    if task.device == "cpu":
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[task.itemsize]
        parts = [x.view(integer) for x in slices(task, inputs)]
        return lambda: [x.bitwise_xor_(0) for x in parts]
    sizes = [width * task.itemsize for width in (shape.rotary_dim, shape.head_dim)]
    sizes.append(shape.rotary_offset * task.itemsize)
    need(not any(size % WORD for size in sizes), f"slices of whole words of {WORD} bytes only")
    words, pitch, _ = (size // WORD for size in sizes)
    rows_of_a_block = max(1, threads // words)
    rows = [shape.batch * shape.tokens * heads for heads in (shape.q_heads, shape.k_heads)]
    arguments = *(x.data_ptr() for x in slices(task, inputs)), *rows, pitch
    num_blocks = -(-sum(rows) // rows_of_a_block)
    return _launch("limit_rows_kernel", num_blocks, (words, rows_of_a_block), arguments)


def copy(task: Task, inputs: Inputs) -> Call:
    """Copy the bytes of q and k from one dense buffer to another."""
    numbers = inputs.memory.view(torch.uint8)[: task.heads_bytes // 2]
    copied = torch.empty_like(numbers)
    return lambda: copied.copy_(numbers)


def _launch(name: str, num_blocks: int, block: tuple[int, ...], arguments: tuple[int, ...]) -> Call:
    cupy = imported("cupy")
    launch = functools.partial(_kernel(name), (num_blocks,), block)
    arguments = *arguments, cupy.uint32(0)
    return lambda: launch(arguments, stream=_CurrentStream())


@functools.cache
def _kernel(name: str) -> Any:
    code = (Path(__file__).parents[1] / "limit.cu").read_text(encoding="utf-8")
    module = imported("cupy").RawModule(code=code, options=("-std=c++17",))
    return module.get_function(name)


class _CurrentStream:
    """PyTorch's current stream, as CuPy's launch reads it."""

    @property
    def ptr(self) -> int:
        return torch.cuda.current_stream().cuda_stream


CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
THREADS = tuple({"threads": threads} for threads in (128, 256, 512, 1024))
OF_ALL = dict.fromkeys(("rotation", "norm", "cache", "qkv", "join", "eager"), dense)
PEERS = {
    "limit": Peer(CUPY, OF_ALL, THREADS, gpu_only=False, is_yardstick=True),
    "limit, same places": Peer(
        CUPY, {"rotation": same_places}, THREADS, gpu_only=False, is_yardstick=True
    ),
    "copy": Peer(("torch",), {"rotation": copy}, gpu_only=False, is_yardstick=True),
}
