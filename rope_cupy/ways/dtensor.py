"""The way of a call on DTensors: each process rotates its own part, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Partial

from ..call import Call, Named
from ..choices import TOKEN_NORM
from ..options import axis_names
from ..table_forms import TableSource, matrices, no_table
from .autograd import check_in_place

Outs = tuple[Any, ...]


def local_call(call: Call) -> tuple[Call, Callable[[Outs], Outs]]:
    """Return the call on this process's part, and what makes of its results those of the whole.

    Results have the placements that inputs have. Positions and tables are those of the whole
    tensors, in plain tensors or replicated ones.
    """
    if call.options.cache or call.options.packed:
        raise TypeError("q, k and v must be plain tensors here, got a DTensor")
    parts = _parts(call)
    if call.out is not None:
        check_in_place(call)
        if torch.is_grad_enabled() and any(x.requires_grad for x in call.xs):
            raise ValueError("out must be None where a gradient of a DTensor is recorded, got some")
    table, positions, offset = _of_this_process(call, parts)
    extra = (*positions, *_weights_of_this_process(call, parts))
    xs = tuple(x.to_local() for x in call.xs)
    local = call._replace(
        xs=xs, table=table, position_offset=offset, out=None if call.out is None else xs
    )

    def whole(results: Outs) -> Outs:
        if call.out is not None:
            return call.out
        return tuple(
            DTensor.from_local(
                y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
            )
            for y, x in zip(results, call.xs, strict=True)
        )

    return local.with_extra(extra), whole


class Part(NamedTuple):
    """What a process has of an axis."""

    axis: str
    start: int
    stop: int
    of: int  # the size of the whole


def _parts(call: Call) -> dict[str, Part]:
    """Return which batches, tokens and heads this process has, by the names of axes."""
    q = call.xs[0]
    for name, x in zip(call.names, call.xs, strict=True):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor, as others are, got {type(x).__name__}")
        if (x.device_mesh, x.placements) != (q.device_mesh, q.placements):
            raise ValueError(
                f"{name} must have {call.names[0]}'s mesh and placements {q.placements}, got "
                f"{x.placements}"
            )
        axes = axis_names(x.ndim, call.options)
        for placement in x.placements:
            if not (placement.is_replicate() or placement.is_shard()):
                raise ValueError(f"{name} must be sharded or replicated, got {placement}")
            if axes[-1:] == "d" and placement.is_shard(x.ndim - 1):
                raise ValueError(
                    f"{name} must not be sharded within a head, whose elements turn in pairs, got "
                    f"{placement}"
                )
    axes, head_dim = axis_names(q.ndim, call.options), call.options.head_dim
    parts = {axis: _part(axis, q, i) for i, axis in enumerate(axes)}
    if head_dim is not None and "h" in parts:  # else the axes are refused with the rest
        _, start, stop, of = parts["h"]
        if start % head_dim or stop % head_dim:
            raise ValueError(
                f"{call.names[0]} must not be sharded within a head of head_dim={head_dim}, got "
                f"the elements {start} to {stop}"
            )
        parts["h"] = Part("h", start // head_dim, stop // head_dim, of // head_dim)
    return parts


def _part(name: str, x: Any, axis: int) -> Part:
    """Return what this process has of an axis, which is cut into equal chunks, the last less.

    PyTorch's own function for it cannot be traced by torch.compile before PyTorch 2.13.
    """
    mesh, start, size = x.device_mesh, 0, x.shape[axis]
    for i, placement in enumerate(x.placements):
        if placement.is_shard(axis):
            chunk = -(-size // mesh.size(i))
            begin = min(chunk * mesh.get_local_rank(i), size)
            start, size = start + begin, min(chunk, size - begin)
    return Part(name, start, start + size, x.shape[axis])


def _of_this_process(call: Call, parts: dict[str, Part]) -> tuple[TableSource, Named, int | None]:
    """Return the table, the positions and their offset that the tokens of this process have."""
    if call.table.form is no_table:
        return call.table, call.position_arrays, call.position_offset
    batch, tokens, heads = parts.get("b"), parts.get("s"), parts.get("h")
    offset, form = call.position_offset, call.table.form
    arrays = [_replicated("table", array) for array in call.table.arrays]
    trailing = 3 if form is matrices else 1
    by_position = arrays[0].ndim - trailing == 1
    if not by_position:
        axes = batch, tokens if offset is None else None, heads
        arrays = [_cut(part, axes[: part.ndim - trailing]) for part in arrays]
    positions = {name: _replicated(name, array) for name, array in call.position_arrays}
    if "positions" in positions:
        positions["positions"] = _cut_last(positions["positions"], (batch, tokens))
    elif "cu_seqlens" in positions:
        if tokens and tokens.stop - tokens.start < tokens.of:
            raise ValueError(
                "cu_seqlens must be None where tokens are sharded: pass the positions of the "
                "tokens, got an array"
            )
    elif by_position or offset is not None:
        offset = (offset or 0) + (tokens.start if tokens else 0)
        if "seqlen_offsets" in positions:
            positions["seqlen_offsets"] = _cut(positions["seqlen_offsets"], (batch,))
    return TableSource(form, tuple(arrays)), tuple(positions.items()), offset


def _weights_of_this_process(call: Call, parts: dict[str, Part]) -> Named:
    """Return the weights and biases of a norm, which are those of every process's heads.

    Their gradients are parts of a sum wherever heads or tokens are parts of what there is.
    """
    heads, norm = parts.get("h"), call.options.norm
    if norm and norm.kind == TOKEN_NORM and heads and heads.stop - heads.start < heads.of:
        raise ValueError(
            "norm must be 'head' where heads are sharded, for no process has all of a token, got "
            "'heads'"
        )
    x, weights = call.xs[0], []
    grads = [Partial() if placement.is_shard() else placement for placement in x.placements]
    for name, row in call.weights:
        if hasattr(row, "device_mesh") and row.device_mesh != x.device_mesh:
            raise ValueError(
                f"{name} must have {call.names[0]}'s mesh {x.device_mesh}, got {row.device_mesh}"
            )
        weights.append((name, _replicated(name, row, grad_placements=grads)))
    return tuple(weights)


def _cut_last(array: Any, parts: tuple[Part | None, ...]) -> Any:
    """Return these parts of an array's last axes: one before them is that of axes of positions."""
    leading = array.ndim - len(parts)
    kept = (None,) * leading + parts if leading > 0 else parts[-array.ndim :]
    return _cut(array, kept)


def _cut(array: Any, parts: tuple[Part | None, ...]) -> Any:
    """Return these parts of an array's axes; a batch or a head that serves all stays whole."""
    for axis, part in enumerate(parts):
        if part and array.shape[axis] == part.of and (part.of > 1 or part.axis == "s"):
            array = array.narrow(axis, part.start, part.stop - part.start)
    return array


def _replicated(name: str, array: Any, **how: Any) -> Any:
    """Return a plain tensor, or what every process has of a DTensor."""
    if not hasattr(array, "device_mesh"):
        return array
    if not all(placement.is_replicate() for placement in array.placements):
        raise ValueError(
            f"{name} must be a plain tensor or replicated, got the placements {array.placements}"
        )
    return array.to_local(**how)
