"""What is compared, one file a peer: what it can do, when it is there, and how it is called.

A peer has a function for each kind of operation that it offers. From a task and a set of inputs the
function makes a call of no argument; tables in the peer's form, views and compiled code are made
beforehand. The call returns q and k, rotated in place where the peer can, or q alone where k and v
go into caches. For training the function returns functions of q and k. `AbsentError` says that a
package is not installed, `UnsupportedError` that a task cannot be done. Every peer is called
through its public functions, but where its own docstring says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from result import AbsentError, UnsupportedError
from tasks import BY_AXES, Call, Inputs, Pair, Task

NEW, IN_PLACE = "new arrays", "in place"  # calls of training
Rotate = Callable[[torch.Tensor, torch.Tensor], Pair]
Build = tuple[Any, ...]  # a function and its arguments


class Peer(NamedTuple):
    """distributions: packages, of which the first that is installed gives the version.
    kinds: a function for each kind of operation.
    options: what the functions may be given besides on a GPU; the fastest of them counts.
    build: from tasks, what is to be compiled ahead.
    is_yardstick: it moves bytes or does a part of the task, and its result is not compared.
    """

    distributions: tuple[str, ...]
    kinds: dict[str, Callable[..., Any]]
    options: tuple[dict[str, int], ...] = ({},)
    build: Callable[[list[Task]], list[Build]] | None = None
    gpu_only: bool = True
    is_yardstick: bool = False


def imported(name: str) -> Any:
    """Return a module; AbsentError says why there is none."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        raise AbsentError(f"{package} is not installed" if missing else str(error)) from error


def installed(*distributions: str) -> str:
    """Return the version of the first of these packages that is installed, or nothing."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def need(holds: bool, reason: str) -> None:
    """Raise UnsupportedError where a condition does not hold."""
    if not holds:
        raise UnsupportedError(reason)


def need_no_positions(inputs: Inputs) -> None:
    need(inputs.positions is None, "takes no positions")


def need_one_position(task: Task) -> None:
    need(task.variant not in BY_AXES, "one position of a token only")


def need_whole_heads(task: Task) -> None:
    need(task.shape.rotary_dim == task.shape.head_dim, "whole heads only")


def need_in_place(task: Task) -> None:
    need(task.variant != "new", "rotates in place only")


def need_sixteen_bits(task: Task) -> None:
    need(task.itemsize == 2, "float16 and bfloat16 only")


def slices(task: Task, inputs: Inputs) -> Pair:
    """Return the rotated parts of q and k, which is how a slice of a head is passed to most."""
    start = task.shape.rotary_offset
    part = slice(start, start + task.shape.rotary_dim)
    return inputs.q[..., part], inputs.k[..., part]


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Return (b, s, h, d) as (b * s, h, d), without a copy."""
    try:
        return x.view(-1, *x.shape[2:])
    except RuntimeError as error:
        raise UnsupportedError("all tokens must lie at one stride from each other") from error


def every_position(task: Task, inputs: Inputs) -> torch.Tensor:
    """Return a position for each token of the batch, for those who must have them."""
    need_one_position(task)
    if inputs.positions is None:
        return torch.arange(task.shape.tokens, device=inputs.q.device).repeat(task.shape.batch)
    return inputs.positions.repeat(task.shape.batch)


def packed(task: Task, inputs: Inputs) -> torch.Tensor:
    """Return the buffer (b, s, q_heads + 2 k_heads, d) of which q, k and v are views."""
    shape = task.shape
    heads = shape.q_heads + 2 * shape.k_heads
    size = shape.batch * shape.tokens * heads * shape.head_dim
    return inputs.memory[:size].view(shape.batch, shape.tokens, heads, shape.head_dim)


def whole(rotate: Call, inputs: Inputs) -> Call:
    """Return a call that rotates in place and returns q and k."""

    def call() -> Pair:
        rotate()
        return inputs.q, inputs.k

    return call


def q_after(inputs: Inputs, rotate: Call, *arguments: Any) -> Call:
    """Return a call that rotates in place, calls the function `arguments` begins with, if any, and
    returns q.
    """

    def fused() -> torch.Tensor:
        rotate()
        return inputs.q

    def two() -> torch.Tensor:
        rotate()
        arguments[0](*arguments[1:])
        return inputs.q

    return two if arguments else fused


def one_by_one(task: Task, inputs: Inputs, library: Any, most: int) -> Call:
    """Call a library's apply_rotary_emb for q and for k.

    For a packed buffer call its form that takes both.
    """
    shape = task.shape
    need_no_positions(inputs)
    need(not (shape.rotary_offset and task.variant == "new"), "a new array of the slice alone")
    q, k = slices(task, inputs) if shape.rotary_offset else (inputs.q, inputs.k)
    need(q.shape[-1] <= most, f"head_dim of {most} at most")
    tables = {"cos": inputs.table.cos, "sin": inputs.table.sin, "interleaved": shape.interleaved}
    if task.variant == "packed" and not shape.rotary_offset:
        buffer, rotate = packed(task, inputs), library.apply_rotary_emb_qkv_
        return whole(lambda: rotate(buffer, **tables, num_heads_q=shape.q_heads), inputs)
    inplace, rotate = task.variant != "new", library.apply_rotary_emb

    def call() -> Pair:
        results = rotate(q, **tables, inplace=inplace), rotate(k, **tables, inplace=inplace)
        return (inputs.q, inputs.k) if inplace else results

    return call


def training_one_by_one(task: Task, inputs: Inputs, library: Any) -> dict[str, Rotate]:
    """The same, of q and k with gradients."""
    table = {"cos": inputs.table.cos, "sin": inputs.table.sin}
    table["interleaved"] = task.shape.interleaved
    rotate = library.apply_rotary_emb
    return {
        NEW: lambda q, k: (rotate(q, **table), rotate(k, **table)),
        IN_PLACE: lambda q, k: (
            rotate(q, **table, inplace=True),
            rotate(k, **table, inplace=True),
        ),
    }


def call_of(name: str, task: Task, inputs: Inputs, **options: int) -> Any:
    """Return a peer's call for a task, or its functions of q and k for training."""
    peer = PEERS[name]
    need(not peer.gpu_only or task.device != "cpu", "runs on a GPU only")
    return peer.kinds[task.op.kind](task, inputs, **options)


def names_for(kind: str) -> list[str]:
    """Return the peers that offer a kind of operation."""
    return [name for name, peer in PEERS.items() if kind in peer.kinds]


def version(name: str) -> str:
    """Return the version of a peer's package, or nothing."""
    return installed(*PEERS[name].distributions) if name in PEERS else ""


def build_ahead(tasks: list[Task], names: list[str]) -> None:
    """Build what peers compile, all at once; a failure is met again in a call."""
    builds: set[Build] = set()
    for name in names:
        peer = PEERS[name]
        if peer.build:
            builds.update(peer.build([task for task in tasks if task.op.kind in peer.kinds]))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for function, *arguments in builds:
            pool.submit(function, *arguments)


from . import (  # noqa: E402
    comfy_kitchen,
    diffusers,
    flash_attn,
    flashinfer,
    liger,
    limit,
    pytorch,
    quack,
    rope_cupy,
    sglang,
    transformers,
    vllm,
)

PEERS: dict[str, Peer] = {
    name: peer
    for module in (
        *(limit, rope_cupy, sglang, flashinfer, vllm, comfy_kitchen, flash_attn, quack, liger),
        *(transformers, diffusers, pytorch),
    )
    for name, peer in module.PEERS.items()
}
YARDSTICKS = {name for name, peer in PEERS.items() if peer.is_yardstick}
