"""What PyTorch adds: a module, gradients, operators for torch.compile. Alone in importing PyTorch.

Import `rope_cupy.torch` for `RotaryEmbedding`; calls import it by themselves when they need more.
Import it too before `torch.export.load`, or a package of AOTInductor, in a new process: such a file
names the operators that are defined here, and PyTorch does not find by itself who defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import calls, tensor
from .checks import check_number, count, described, index, is_array
from .frequencies import cos_sin, inverse_frequencies
from .options import (
    TOKEN_NORM,
    Norm,
    Options,
    axis_names,
    check_options,
    check_round_norm,
    checked_parts,
)
from .problem import OF_POSITIONS, OF_WEIGHTS, out_names, output_names
from .rotary import apply_rotary_qk
from .tables import FORMS, TableSource, source_of

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    """Rotate q and k by a table of its own, which is float32 whatever the model's dtype is.

    The cosines and sines of the positions 0 .. max_position - 1 are ``cos`` and ``sin``, of shape
    (max_position, head_dim / 2). They are no buffers: they are computed when they are first needed,
    on the device of q, from `head_dim`, `base` and `max_position`. So no loader can fill them, no
    ``.half()`` rounds them, and they are in neither ``state_dict()`` nor a pickle. The attributes
    ``cos`` and ``sin`` lie where the module does, which a buffer without elements tells.

    Args:
        head_dim: elements of a head, all of which are rotated; even.
        base: of the inverse frequencies base ** (-2 i / head_dim): Su et al., "RoFormer: Enhanced
            Transformer with Rotary Position Embedding" (2021), section 3.2.2.
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + head_dim / 2).
        max_position: how many positions the table holds.
        layout: the names of the axes of q and k, as for `rope_cupy.apply_rotary_qk`.
        device: of ``cos`` and ``sin``; by default PyTorch's.

    Raises TypeError or ValueError when `head_dim` is not a positive even int, `base` not a positive
    number or `max_position` not an int of 0 or more.

    The first call on a GPU copies the table there, so it must come before a CUDA graph is captured.

    >>> import torch
    >>> rotary = RotaryEmbedding(64, base=500000.0, max_position=8192).half()
    >>> q, k = torch.ones(1, 6, 8, 64).half(), torch.ones(1, 6, 2, 64).half()
    >>> q_out, k_out = rotary(q, k)
    >>> q_out.shape, k_out.dtype, rotary.cos.dtype
    (torch.Size([1, 6, 8, 64]), torch.float16, torch.float32)
    """

    place: torch.Tensor
    __call__: Callable[..., tuple[torch.Tensor, torch.Tensor]]

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        max_position: int = 8192,
        layout: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.base = index("head_dim", head_dim), base
        self.max_position = count("max_position", max_position)
        check_options(interleaved, layout, None, 0, False, "nan", None, False)
        inverse_frequencies(head_dim, base)  # refuses what no table can be made of
        self.interleaved, self.layout = interleaved, layout
        self.register_buffer("place", torch.empty(0, device=device), persistent=False)
        self._tables: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def cos(self) -> torch.Tensor:
        """The cosines, where the module lies."""
        return self._table_on(self.place.device)[0]

    @property
    def sin(self) -> torch.Tensor:
        """The sines, where the module lies."""
        return self._table_on(self.place.device)[1]

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k rotated: see `rope_cupy.apply_rotary_qk`."""
        return apply_rotary_qk(
            q,
            k,
            self._table_for(q),
            positions=positions,
            interleaved=self.interleaved,
            layout=self.layout,
        )

    def extra_repr(self) -> str:
        """Return what the module's repr shows."""
        return (
            f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}, "
            f"max_position={self.max_position}"
        )

    def _table_for(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        table = self._table_on(q.device)
        if torch.compiler.is_compiling() or not hasattr(q, "fake_mode"):
            return table
        return tuple(
            part if tensor.is_traced(part) else q.fake_mode.from_tensor(part) for part in table
        )

    def _table_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        self._compute(device)
        return self._tables[device, self.head_dim, self.base, self.max_position]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _compute(self, device: torch.device) -> bool:
        """Compute the table of what the module is now on a device, where there is none yet.

        While torch.compile traces, this is called and not traced.
        """
        about = device, self.head_dim, self.base, self.max_position
        if about not in self._tables:
            numbers = cos_sin(inverse_frequencies(self.head_dim, self.base), self.max_position)
            # It outlives what the first call is made in: a trace, or a mode that makes no real
            # tensors or none for gradients.
            with _disable_current_modes(), torch.inference_mode(False):
                cos, sin = (torch.from_numpy(each).to(device) for each in numbers)
            self._tables[about] = cos, sin
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle of the module holds, which computes its own table."""
        return self.__dict__ | {"_tables": {}}


# Gradients.


def recorded(given: calls.Given, key: Any, seen: tensor.Glance | None) -> tuple[Any, ...]:
    """Rotate tensors of which PyTorch wants gradients, and record how.

    `seen` is what has been glanced at of them, if they could be: see `calls.rotate_seen`.
    """
    xs, out, options = given.xs, given.out, given.options
    named = [*zip(given.names, xs, strict=True), *given.named_rows]
    named += zip(given.out_names, out or (), strict=out is not None)
    _check_recordable(given.table.arrays, named, options.norm, options.cache, out)
    if out is not None:
        _check_in_place(given.names, xs, out)
    for name, x in named:
        if not isinstance(x, torch.Tensor) and name not in OF_POSITIONS:
            raise TypeError(
                f"{name} must be a tensor where a gradient is recorded, got {type(x).__name__}"
            )
    if out is None:
        return _record(given, key, seen)
    for name, x in zip(given.names, xs, strict=True):
        _check_may_be_written(name, x)
    ready, owners = calls.checked(given, key, seen)
    # What has been checked is written before the first history moves on.
    if any([x._is_view() for x in xs]):
        for x, name in zip(xs, given.names, strict=True):  # of which autograd takes one at a time
            _record(given._replace(names=(name,), xs=(x,), out=(x,)), write=ready.write)
            ready = ready._replace(write=lambda: None)
    else:
        _record(given, write=ready.write)
    del owners  # which have kept the memory till here
    return out


def _check_recordable(
    table: Sequence[Any],
    named: Iterable[tuple[str, Any]],
    norm: Any,
    cache: Any,
    out: tuple[Any, ...] | None,
) -> None:
    """Refuse gradients that would be lost, of a table and of arrays by their names."""
    for part in table:
        if _wants_gradient(part):
            raise ValueError(
                "table must not require a gradient, which is not recorded here: use "
                "torch.no_grad() or a detached tensor, got requires_grad=True"
            )
    for name, array in named:
        if cache is not None and _wants_gradient(array):
            raise ValueError(
                f"{name} must not require a gradient, which is not recorded where a cache is "
                "written: use torch.no_grad() or a detached tensor, got requires_grad=True"
            )
        if norm is not None and out is not None and _wants_gradient(array):
            raise ValueError(
                "out must be None where a gradient of a norm is recorded (its backward pass uses "
                f"the input), got a tensor, and {name} requires a gradient"
            )


def _wants_gradient(array: Any) -> bool:
    return isinstance(array, torch.Tensor) and array.requires_grad and torch.is_grad_enabled()


def _check_in_place(names: tuple[str, ...], xs: tuple[Any, ...], out: tuple[Any, ...]) -> None:
    for name, x, y in zip(out_names(names), xs, out, strict=True):
        if y is not x:
            raise ValueError(
                f"{name} must be its input itself, or a new array, where a gradient is recorded, "
                f"got another {described(y)}"
            )


def _check_may_be_written(name: str, x: Any) -> None:
    """Refuse what autograd lets no one write in place, before its history moves on."""
    if not isinstance(x, torch.Tensor) or not x.requires_grad:
        return
    base = x._base if x._is_view() else x
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{name} must not be a leaf that requires a gradient, or a view of one, to be written "
            "in place: use a copy, or torch.no_grad(), got a leaf"
        )
    plain = torch._C._autograd.CreationMeta.DEFAULT
    if x._is_view() and torch._C._autograd._get_creation_meta(x) != plain:
        raise ValueError(
            f"{name} must not be one of several views that one operation returned, or a view that "
            "was made where gradients are off, to be written in place: take it by an index, got "
            "such a view"
        )


def _record(
    given: calls.Given,
    key: Any = None,
    seen: tensor.Glance | None = None,
    write: Callable[[], None] | None = None,
) -> tuple[Any, ...]:
    weights = [row for name, row in given.named_rows if name in OF_WEIGHTS]
    outs: tuple[Any, ...] = _Rotation.apply(  # type: ignore[no-untyped-call]
        given, key, seen, write, *given.xs, *weights
    )
    return outs


def _unchanging(given: calls.Given) -> calls.Given:
    """Return a call with copies of what is no tensor, whose changes PyTorch does not see.

    Of a table by position they are the rows that tokens have, where no array says which.
    """
    arrays, form = given.table.arrays, given.table.form
    if all([isinstance(each, torch.Tensor) for each in (*arrays, *given.rows)]):
        return given
    used, first = slice(None), given.first
    by_position = len(given.table.view(None).specs[0].shape) == 2 and form != FORMS["_frequencies"]
    if by_position and not any(name in OF_POSITIONS for name in given.row_names):
        x, start = given.xs[0], first or 0
        num_tokens = x.shape[axis_names(x.ndim, given.options).index("s")]
        used, first = slice(start, start + num_tokens), None
    return given._replace(
        table=TableSource(form, tuple([_copied(array, used) for array in arrays])),
        rows=tuple([_copied(array, slice(None)) for array in given.rows]),
        first=first,
    )


def _copied(array: Any, used: slice) -> Any:
    """Return a part of an array, in memory of its own where this is no tensor of PyTorch."""
    if isinstance(array, torch.Tensor):
        return array[used]
    if isinstance(array, np.ndarray):
        return array[used].copy()
    return torch.utils.dlpack.from_dlpack(array)[used].clone()


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the conjugate rotation of the results' gradients.

    It is linear, so a second derivative is recorded as the first is. A norm before it has
    PyTorch's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: calls.Given,
        key: Any,
        seen: tensor.Glance | None,
        write: Callable[[], None] | None,
        *xs_and_weights: Any,
    ) -> tuple[Any, ...]:
        """Rotate into new tensors, or `write` the inputs themselves."""
        names = given.names
        xs = xs_and_weights[: len(names)]
        if write is not None:
            write()  # where this raises, nothing has been recorded
            ctx.mark_dirty(*xs)
            outs = xs
        elif seen is not None:
            outs = calls.rotate_seen(given, key, seen)
        else:
            outs = calls.rotate_unseen(given)
        given = _unchanging(given)
        arrays = *given.table.arrays, *given.rows
        kept = [each for each in arrays if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(*(xs_and_weights if given.options.norm else ()), *kept)
        ctx.call = names, given.table, given.positions, given.options
        ctx.weights = [name for name in given.row_names if name in OF_WEIGHTS]
        ctx.set_materialize_grads(False)
        named = dict(zip(ctx.weights, xs_and_weights[len(xs) :], strict=True))
        constant = [
            y
            for name, x, y in zip(names, xs, outs, strict=True)
            if not any(part.requires_grad for part in (x, *_weights_of(name, named).values()))
        ]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there and are asked for."""
        saved = ctx.saved_tensors  # raises where one of them has been written since
        names, table, positions, options = ctx.call
        names_asked = dict(zip((*names, *ctx.weights), ctx.needs_input_grad[4:], strict=True))
        asked = {
            name: grad
            for name, grad in zip(names, grads, strict=True)
            if grad is not None
            and any(names_asked[each] for each in (name, *_weights_of(name, names_asked)))
        }
        found: dict[str, Any] = {}
        if asked:
            grad_names = tuple(f"{name}_grad" for name in asked)
            how = table, positions, _conjugate(options), None
            found = dict(
                zip(asked, calls.rotate(grad_names, (*asked.values(),), *how), strict=True)
            )
        if options.norm:
            found = _through_norm(found, names_asked, saved, options, options.norm)
        return *(None,) * 4, *[found.get(name) for name in names_asked]


def _weights_of(name: str, named: dict[str, Any]) -> dict[str, Any]:
    """Return those of the named that are weights of a tensor."""
    own = {"x": ("weight",), "q": ("q_weight",), "k": ("k_weight",)}.get(name, OF_WEIGHTS)
    return {each: named[each] for each in own if each in named}


def _through_norm(
    grads: dict[str, torch.Tensor],
    asked: dict[str, bool],
    saved: Sequence[torch.Tensor],
    options: Options,
    norm: Norm,
) -> dict[str, torch.Tensor]:
    """Return the gradients of inputs and weights from those of what was normalised.

    `saved` begins with what is asked for, or not, by name.
    """
    with torch.enable_grad():
        # Each in its own right: one weight may be given for q and for k.
        inputs = {name: part.view_as(part) for name, part in zip(asked, saved, strict=False)}
    found: dict[str, torch.Tensor] = {}
    for name, grad in grads.items():
        weights = _weights_of(name, inputs)
        wanted = [each for each in (name, *weights) if asked[each]]
        with torch.enable_grad():
            y = _normalised(inputs[name], weights, options, norm)
        parts = torch.autograd.grad(
            y, [inputs[each] for each in wanted], grad, create_graph=torch.is_grad_enabled()
        )
        found |= dict(zip(wanted, parts, strict=True))
    return found


def _normalised(x: Any, weights: dict[str, Any], options: Options, norm: Norm) -> Any:
    """Return x with its heads normalised, by PyTorch's own function."""
    heads = x if options.head_dim is None else x.unflatten(-1, (-1, options.head_dim))
    at = axis_names(x.ndim, options).index("h")
    if options.packed is None:
        (weight,) = weights.values() or (None,)
        return _norm_of(heads, weight, at, norm).reshape(x.shape)
    num_heads, num_kv_heads = options.packed
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), at)
    q = _norm_of(q, weights.get("q_weight"), at, norm)
    k = _norm_of(k, weights.get("k_weight"), at, norm)
    return torch.cat((q, k, v), at).reshape(x.shape)


def _norm_of(heads: Any, weight: Any, at: int, norm: Norm) -> Any:
    if weight is not None:
        wide = weight.to(torch.promote_types(weight.dtype, heads.dtype))
        weight = (wide + norm.weight_offset).to(heads.dtype)
    by_token = heads.movedim(at, -2)
    flat = by_token.flatten(-2) if norm.kind == TOKEN_NORM else heads
    # A whole number: PyTorch 2.11 takes a symbolic one for its address.
    size = (int(flat.shape[-1]),)
    flat = torch.nn.functional.rms_norm(flat, size, weight, norm.eps)
    return flat.view(by_token.shape).movedim(-2, at) if norm.kind == TOKEN_NORM else flat


@lru_cache(maxsize=256)
def _conjugate(options: Options) -> Options:
    """Return the options of the rotation back, before which there is no norm."""
    return options._replace(conjugate=not options.conjugate, norm=None)


# DTensor. Each process turns its own part by the positions of its own tokens, and sends nothing.


def sharded(given: calls.Given) -> tuple[Any, ...]:
    """Rotate DTensors, which come back with the placements that they have.

    Positions and tables are those of the whole tensors, in plain tensors or replicated ones.
    """
    from torch.distributed.tensor import DTensor

    if given.options.cache or given.options.packed:
        raise TypeError("q, k and v must be plain tensors here, got a DTensor")
    parts = _parts(given)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in given.xs)
    if given.out is not None:
        _check_in_place(given.names, given.xs, given.out)
        if wants:
            raise ValueError("out must be None where a gradient of a DTensor is recorded, got some")
    positions, table = _of_this_process(given, parts)
    local = tuple(x.to_local() for x in given.xs)
    out = None if given.out is None else local
    more = _weights_of_this_process(given, parts)
    results = calls.rotate(given.names, local, table, positions, given.options, out, more)
    if given.out is not None:
        return given.out
    return tuple(
        DTensor.from_local(
            y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        for y, x in zip(results, given.xs, strict=True)
    )


class Part(NamedTuple):
    """What a process has of an axis."""

    axis: str
    start: int
    stop: int
    of: int  # the size of the whole


def _parts(given: calls.Given) -> dict[str, Part]:
    """Return which batches, tokens and heads this process has, by the names of axes."""
    from torch.distributed.tensor import DTensor

    q = given.xs[0]
    for name, x in zip(given.names, given.xs, strict=True):
        if not isinstance(x, DTensor):
            raise TypeError(f"{name} must be a DTensor, as others are, got {type(x).__name__}")
        if (x.device_mesh, x.placements) != (q.device_mesh, q.placements):
            raise ValueError(
                f"{name} must have {given.names[0]}'s mesh and placements {q.placements}, got "
                f"{x.placements}"
            )
        axes = axis_names(x.ndim, given.options)
        for placement in x.placements:
            if not (placement.is_replicate() or placement.is_shard()):
                raise ValueError(f"{name} must be sharded or replicated, got {placement}")
            if axes[-1:] == "d" and placement.is_shard(x.ndim - 1):
                raise ValueError(
                    f"{name} must not be sharded within a head, whose elements turn in pairs, got "
                    f"{placement}"
                )
    axes, head_dim = axis_names(q.ndim, given.options), given.options.head_dim
    parts = {axis: _part(axis, q, i) for i, axis in enumerate(axes)}
    if head_dim is not None and "h" in parts:  # else the axes are refused with the rest
        _, start, stop, of = parts["h"]
        if start % head_dim or stop % head_dim:
            raise ValueError(
                f"{given.names[0]} must not be sharded within a head of head_dim={head_dim}, got "
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


def _of_this_process(given: calls.Given, parts: dict[str, Part]) -> tuple[Any, TableSource]:
    """Return the positions and the table that the tokens of this process have."""
    batch, tokens, heads = parts.get("b"), parts.get("s"), parts.get("h")
    first = given.first
    arrays = [_replicated("table", array) for array in given.table.arrays]
    trailing = 3 if given.table.form is FORMS["_matrices"] else 1
    by_position = arrays[0].ndim - trailing == 1
    if not by_position:
        arrays = [_cut(part, (batch, tokens, heads)[: part.ndim - trailing]) for part in arrays]
    table = TableSource(given.table.form, tuple(arrays))
    rows = {
        name: _replicated(name, array) for name, array in given.named_rows if name in OF_POSITIONS
    }
    start = tokens.start if tokens else 0
    if "positions" in rows:
        rows["positions"] = _cut_last(rows["positions"], (batch, tokens))
    elif "cu_seqlens" in rows:
        if tokens and tokens.stop - tokens.start < tokens.of:
            raise ValueError(
                "cu_seqlens must be None where tokens are sharded: pass the positions of the "
                "tokens, got an array"
            )
    elif by_position:
        first = (first or 0) + start
        if "seqlen_offsets" in rows:
            rows["seqlen_offsets"] = _cut(rows["seqlen_offsets"], (batch,))
    return calls.Positions(**{"positions": first} | rows), table


def _weights_of_this_process(
    given: calls.Given, parts: dict[str, Part]
) -> tuple[tuple[str, Any], ...]:
    """Return the weights of a norm, which are those of every process's heads.

    Their gradients are parts of a sum wherever heads or tokens are parts of what there is.
    """
    from torch.distributed.tensor import Partial

    heads, norm = parts.get("h"), given.options.norm
    if norm and norm.kind == TOKEN_NORM and heads and heads.stop - heads.start < heads.of:
        raise ValueError(
            "norm must be 'head' where heads are sharded, for no process has all of a token, got "
            "'heads'"
        )
    x, weights = given.xs[0], []
    grads = [Partial() if placement.is_shard() else placement for placement in x.placements]
    for name, row in given.more:
        if hasattr(row, "device_mesh") and row.device_mesh != x.device_mesh:
            raise ValueError(
                f"{name} must have {given.names[0]}'s mesh {x.device_mesh}, got {row.device_mesh}"
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


# Operators. A graph that PyTorch traces holds them in place of a call, and runs the call by them.


class _Arguments(NamedTuple):
    """What every operator takes behind the tensors that it rotates, before the options."""

    cos: Any
    sin: Any  # None where one array is the whole table
    form: Any  # of FORMS
    positions: Any
    seqlen_offsets: Any
    cu_seqlens: Any
    first: Any  # the sum of what are ints of these
    weight: Any  # or q_weight
    k_weight: Any
    slot_mapping: Any
    k_scale: Any
    v_scale: Any


def traced(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    more: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, ...]:
    """Put an operator into the graph that is being traced.

    What is written in place where a gradient is recorded is written from a new result.
    """
    source = source_of(table)
    if options[0] is None:
        options = source.interleaved, *options[1:]
    check_options(*options[:-3])
    _check_types(*options[-3:])
    if any([hasattr(x, "device_mesh") for x in xs]):
        rows, first = _arrays_and_int(positions)
        there = {name: row for name, row in zip(OF_POSITIONS, rows, strict=True) if row is not None}
        options = check_options(*options[:-3], *checked_parts(*options[-3:]))
        there |= dict(more)
        named = (*there,), (*there.values(),), first
        return sharded(calls.Given(names, xs, source, *named, options, out))
    for name, x in zip(names, xs, strict=True):
        _check_tensor(name, x)
    norm, _, cache = options[-3:]
    outs = out
    if out is not None and cache is not None and out[0] is None:
        outs = torch.empty_like(xs[0]), *out[1:]  # a new q beside caches
    named_outs = [*zip(_output_names(names, cache), outs or (), strict=outs is not None)]
    for name, y in named_outs:
        _check_tensor(name, y)
    pairs = [*zip(names, xs, strict=True), *more, *named_outs]
    _check_recordable(source.arrays, pairs, norm, cache, outs)
    records = any([_wants_gradient(each) for _, each in pairs])
    rows, first = _arrays_and_int(positions, records)
    arrays = {name: _in_graph(name, array, records) for name, array in more}
    weight = arrays.get("weight", arrays.get("q_weight"))
    others = [arrays.get(name) for name in ("k_weight", "slot_mapping", "k_scale", "v_scale")]
    parts = [_in_graph("table", part, records) for part in source.arrays]
    # Inductor gives no complex numbers to an operator that writes: they go as pairs.
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    cos, sin = parts if len(parts) == 2 else (parts[0], None)
    own = cos, sin, source.form.__name__, *rows, first, weight, *others
    arguments = *own, *_flat(options)
    if outs is not None and not records:
        torch.ops.rope_cupy.rotate_into(*_three(xs), *_three(outs), *arguments)
        return outs
    if len(xs) == 1:
        results = (torch.ops.rope_cupy.rotate(xs[0], *arguments),)
    else:
        results = tuple(torch.ops.rope_cupy.rotate_qk(xs[0], xs[1], *arguments))
    if out is None:
        return results
    _check_in_place(names, xs, out)
    for y, result in zip(out, results, strict=True):
        y.copy_(result)
    return out


def _check_types(norm: Any, packed: Any, cache: Any) -> None:
    """Refuse of the last three of Options what an operator would take for a number or a flag.

    Where it runs, it checks the rest: numbers that change are no numbers while they are traced.
    """
    if norm is not None:
        check_number("eps", norm[1])
        check_number("weight_offset", norm[2])
        check_round_norm(norm[3])
    if packed is not None:
        count("num_heads", packed[0], 1)
        count("num_kv_heads", packed[1], 1)
    if cache is not None:
        for name, scale in (("k_scale", cache[2]), ("v_scale", cache[3])):
            if scale is not None:
                check_number(name, scale)


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"{name} must be a tensor of PyTorch in a call that is traced, got {type(x).__name__}"
        )


def _in_graph(name: str, array: Any, records: bool) -> Any:
    """Return an array that is read as a tensor: NumPy's, where no backward pass reads it again."""
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray):
        _check_tensor(name, array)
    if records:
        raise TypeError(
            f"{name} must be a tensor of PyTorch where a compiled call records a gradient, which "
            "would not see that another array changes, got a NumPy array"
        )
    return torch.from_numpy(array)


def _output_names(names: tuple[str, ...], cache: Any) -> tuple[str, ...]:
    return ("q_out", "k_cache", "v_cache") if cache is not None else out_names(names)


def _three(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*tensors, None, None)[:3]


def _given(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each for each in tensors if each is not None)


def _flat(options: Sequence[Any]) -> tuple[Any, ...]:
    """Return options as an operator takes them: the fields of their parts one by one."""
    *plain, norm, packed, cache = options
    last = None if packed is None else list(packed), *(cache or (None,) * 4)
    *of_norm, round_norm = norm or (None, 0.0, 0.0, False)
    return *plain, *of_norm, repr(round_norm), *last


def _options(flat: Sequence[Any]) -> Options:
    """Return the options that an operator has been given, checked."""
    plain, (*norm, packed), cache = flat[:-9], flat[-9:-4], flat[-4:]
    norm[-1] = {"True": True, "False": False}.get(norm[-1], norm[-1].strip("'"))
    parts = checked_parts(
        None if norm[0] is None else norm, packed, None if cache[0] is None else cache
    )
    return check_options(*plain, *parts)


COMPLEX = "_complex"  # of FORMS, whose array an operator has as pairs of real numbers


def _arrays_and_int(
    positions: tuple[Any, Any, Any], records: bool = False
) -> tuple[list[torch.Tensor | None], Any]:
    """Return the tensors among what tells the positions of tokens, and what their ints add to.

    An int of NumPy, which torch.compile takes for an array, is a tensor without axes.
    """
    if positions[1] is not None or positions[2] is not None:
        calls.check_counted(*positions, lambda each: is_array(each) and each.ndim > 0)
    rows, ints = [], []
    for name, each in zip(OF_POSITIONS, positions, strict=True):
        known = each is not None and is_array(each)
        rows.append(_in_graph(name, each, records and each.ndim > 0) if known else None)
        if known and isinstance(each, torch.Tensor) and not each.ndim:
            raise ValueError(f"{name} must have an axis where it is a tensor, got shape ()")
        if each is not None and not known:
            ints.append(index(name, each, calls.AN_INT_OR_ARRAY))
    first = sum(ints) if ints else None
    if first is not None and (positions[1] is not None or positions[2] is not None):
        calls.check_start(first, any([row is not None for row in rows[1:]]))
    if first is not None and first >= 2**63:
        raise ValueError(f"positions must fit 64 bits, got {first}")
    return rows, first


class _Call(NamedTuple):
    """What an operator has been given."""

    names: tuple[str, ...]  # of what it rotates
    table: TableSource
    rows: tuple[tuple[str, torch.Tensor], ...]  # that tell the positions of tokens, by their names
    first: int | None
    more: tuple[tuple[str, torch.Tensor], ...]
    options: Options


def _call(num: int, arguments: Sequence[Any]) -> _Call:
    """Return what an operator has been given behind the `num` tensors that it rotates."""
    own = _Arguments(*arguments[: len(_Arguments._fields)])
    options = _options(arguments[len(own) :])
    names: tuple[str, ...] = ("q", "k", "v")[:num]
    if num == 1:
        names = ("qkv",) if options.packed else ("x",)
    parts = [part for part in (own.cos, own.sin) if part is not None]
    if own.form == COMPLEX:
        parts = [torch.view_as_complex(part) for part in parts]
    rows = zip(OF_POSITIONS, own[3:6], strict=True)
    of_more = ("weight" if names == ("x",) else "q_weight"), *_Arguments._fields[8:]
    more = zip(of_more, own[7:], strict=True)
    return _Call(
        names,
        TableSource(FORMS[own.form], tuple(parts)),
        tuple((name, row) for name, row in rows if row is not None),
        own.first,
        tuple((name, array) for name, array in more if array is not None),
        options,
    )


def _run(
    xs: tuple[torch.Tensor, ...], outs: tuple[torch.Tensor, ...] | None, arguments: Sequence[Any]
) -> tuple[torch.Tensor, ...]:
    call = _call(len(xs), arguments)
    rows = {name: row if row.ndim else int(row) for name, row in call.rows}
    if call.first is not None:
        start = rows.get("positions", 0)
        rows["positions"] = start + call.first
    positions = calls.Positions(**rows)
    return calls.rotate(call.names, xs, call.table, positions, call.options, outs, call.more)


def _run_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _run((x,), None, arguments)[0]


def _run_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return _run((q, k), None, arguments)


def _run_write(*arguments: Any) -> None:
    xs, outs = _given(arguments[:3]), _given(arguments[3:6])
    _run(xs, outs, arguments[6:])


def _fake_new(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return a tensor like the result, which has no memory yet."""
    _check_traced((x,), None, arguments)
    return torch.empty_like(x)


def _fake_qk_new(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    _check_traced((q, k), None, arguments)
    return torch.empty_like(q), torch.empty_like(k)


def _fake_write(*arguments: Any) -> None:
    xs, outs = _given(arguments[:3]), _given(arguments[3:6])
    _check_traced(xs, outs, arguments[6:])


def _check_traced(
    xs: tuple[torch.Tensor, ...], outs: tuple[torch.Tensor, ...] | None, arguments: Sequence[Any]
) -> None:
    """Check a call on the sizes that are traced, but for those that no one knows yet.

    A run checks its own sizes again.
    """
    call = _call(len(xs), arguments)
    rows = [*((name, row) for name, row in call.rows if row.ndim), *call.more]
    table = [("table", part) for part in call.table.arrays]
    named = [*zip(call.names, xs, strict=True), *table, *rows]
    named += zip(output_names(call.names, call.options), outs or (), strict=outs is not None)
    outlines = [tensor.outline(name, array) for name, array in named]
    if any(each is None for each in outlines):
        return
    num, behind = len(xs), len(xs) + len(table)
    calls.check_traced(
        calls.Given(
            call.names,
            tuple(outlines[:num]),
            TableSource(call.table.form, tuple(outlines[num:behind])),
            tuple(name for name, _ in rows),
            tuple(outlines[behind : behind + len(rows)]),
            call.first,
            call.options,
            None if outs is None else tuple(outlines[behind + len(rows) :]),
        )
    )


def _rotate(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Be made of an operator that has no gradient, and of the gradient where one is wanted.

    A graph that is compiled holds that operator alone, which costs it one dispatch.
    """
    return _rotated((x,), arguments)[0]


def _rotate_qk(q: torch.Tensor, k: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """Be made of one operator, as `_rotate`."""
    return _rotated((q, k), arguments)


def _rotated(xs: tuple[torch.Tensor, ...], arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    own = _Arguments(*arguments[: len(_Arguments._fields)])
    weights = [weight for weight in (own.weight, own.k_weight) if weight is not None]
    for x in (*xs, *weights):
        tensor.check_transform("an input", x)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*xs, *weights)):
        return _TracedRotation.apply(arguments, len(xs), *xs, *weights)  # type: ignore[no-any-return, no-untyped-call]
    return _new(xs, arguments)


def _new(xs: tuple[torch.Tensor, ...], arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    if len(xs) == 1:
        return (torch.ops.rope_cupy.rotate_new(*xs, *arguments),)
    return tuple(torch.ops.rope_cupy.rotate_qk_new(*xs, *arguments))


def _into(*arguments: Any) -> None:
    """Be made of an operator that writes, which has no view whose place in memory may change.

    For PyTorch (2.11 and 2.13) hands such a view to an operator at the place of its base. It is
    written from a new tensor instead; and of a cache, which is too large for one, the place is made
    a constant of the graph.
    """
    xs, outs = _given(arguments[:3]), _given(arguments[3:6])
    num_outs = 1 if _call(len(xs), arguments[6:]).options.cache else len(outs)
    for x in xs:
        tensor.check_transform("an input", x)
    if hasattr(xs[0], "fake_mode"):
        _check_traced(xs, outs, arguments[6:])
    written = []
    for i, y in enumerate(outs):
        offset = y.storage_offset()
        moves = isinstance(offset, torch.SymInt) and (y._base is not None or y.is_inference())
        if moves and i >= num_outs:
            int(offset)
        written.append(torch.empty_like(y) if moves and i < num_outs else y)
    torch.ops.rope_cupy.write_into(*arguments[:3], *_three(tuple(written)), *arguments[6:])
    for y, result in zip(outs, written, strict=True):
        if result is not y:
            y.copy_(result)


def _refuse_vmap(*_: Any) -> None:
    tensor.refuse_transform("an input")


class _TracedRotation(torch.autograd.Function):
    """A rotation in a graph, whose tensors may have no memory yet: see `_Rotation`."""

    @staticmethod
    def forward(
        ctx: Any, arguments: tuple[Any, ...], num_xs: int, *xs_and_weights: Any
    ) -> tuple[Any, ...]:
        """Rotate into new tensors."""
        own = _Arguments(*arguments[: len(_Arguments._fields)])
        call, xs = _call(num_xs, arguments), xs_and_weights[:num_xs]
        ctx.names = [*call.names, *(name for name, _ in call.more if name in OF_WEIGHTS)]
        saved = xs_and_weights if call.options.norm else ()
        ctx.save_for_backward(*saved, own.cos, own.sin, *own[3:6])
        ctx.call = len(saved), own.form, own.first, call.options
        ctx.set_materialize_grads(False)
        outs = _new(xs, arguments)
        named = dict(zip(ctx.names, xs_and_weights, strict=True))
        ctx.mark_non_differentiable(
            *(
                y
                for name, x, y in zip(call.names, xs, outs, strict=True)
                if not any(part.requires_grad for part in (x, *_weights_of(name, named).values()))
            )
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there."""
        num_saved, form, first, options = ctx.call
        cos, sin, *rows = ctx.saved_tensors[num_saved:]
        own = cos, sin, form, *rows, first, *(None,) * 5
        arguments = *own, *_flat(_conjugate(options))
        there = {
            name: grad for name, grad in zip(ctx.names, grads, strict=False) if grad is not None
        }
        found: dict[str, Any] = {}
        if there:
            found = dict(zip(there, _rotated((*there.values(),), arguments), strict=True))
        if options.norm:
            asked = dict(zip(ctx.names, ctx.needs_input_grad[2:], strict=True))
            found = _through_norm(found, asked, ctx.saved_tensors, options, options.norm)
        return None, None, *[found.get(name) for name in ctx.names]


# Operators are PyTorch's, and so of the process: they outlive this module where it is imported
# again (by `importlib.reload`, say), and then call the functions of the new one.

_TYPES = dict.fromkeys(_Arguments._fields, "Tensor?") | {
    "cos": "Tensor",
    "form": "str",
    "first": "SymInt?",
}
_OPTIONS = (
    "bool interleaved, str? layout, int? head_dim, int rotary_offset, bool conjugate, "
    "str out_of_range, int[]? mrope_section, bool mrope_interleaved, str rounding, str? norm, "
    "float eps, float weight_offset, str round_norm, int[]? packed, str? cache_layout, "
    "str? cache_dtype, float? k_number, float? v_number"
)
_BEHIND = ", ".join([f"{kind} {name}" for name, kind in _TYPES.items()]) + ", " + _OPTIONS
_ONE, _TWO = (
    f"(Tensor x, {_BEHIND}) -> Tensor",
    f"(Tensor q, Tensor k, {_BEHIND}) -> (Tensor, Tensor)",
)
_WRITES = (
    "(Tensor x, Tensor? k, Tensor? v, Tensor(a!) out, Tensor(b!)? k_out, Tensor(c!)? v_out, "
    f"{_BEHIND}) -> ()"
)
_PARTS, _WHOLE = "CompositeImplicitAutograd", "CompositeExplicitAutograd"
_OPERATORS = {  # a schema, and by what keys of PyTorch's dispatcher which functions are called
    "rotate": (_ONE, {_PARTS: "_rotate", "vmap": "_refuse_vmap"}),
    "rotate_qk": (_TWO, {_PARTS: "_rotate_qk", "vmap": "_refuse_vmap"}),
    "rotate_into": (_WRITES, {_PARTS: "_into", "vmap": "_refuse_vmap"}),
    "rotate_new": (_ONE, {_WHOLE: "_run_new", "fake": "_fake_new"}),
    "rotate_qk_new": (_TWO, {_WHOLE: "_run_qk_new", "fake": "_fake_qk_new"}),
    "write_into": (_WRITES, {_WHOLE: "_run_write", "fake": "_fake_write"}),
}


def _by_name(function: str) -> Callable[..., Any]:
    """Return what calls a function of this module as it is then."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(__name__), function)(*arguments)

    return call


def _define(name: str, schema: str, functions: dict[str, str]) -> None:
    whole_name = f"rope_cupy::{name}"
    if hasattr(torch.ops.rope_cupy, name):
        known = getattr(torch.ops.rope_cupy, name).default._schema
        if known != torch._C.parse_schema(whole_name + schema):
            raise ImportError(
                "rope_cupy.torch must be imported in a new process after another version of it, "
                f"whose operator {whole_name} takes other arguments"
            )
        return
    torch.library.define(whole_name, schema)
    for key, function in functions.items():
        if key == "fake":
            torch.library.register_fake(whole_name, _by_name(function))
        elif key == "vmap":
            torch.library.register_vmap(whole_name, _by_name(function))
        else:
            torch.library.impl(whole_name, key, _by_name(function))


for _name, (_schema, _functions) in _OPERATORS.items():
    _define(_name, _schema, _functions)


def _run_untraced(function: Any) -> None:
    """Let torch.compile trace nothing of a function that it runs where its graph has a break."""
    frames = torch._C._dynamo.eval_frame
    try:
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)
    except (AttributeError, TypeError):  # which this PyTorch does not have
        pass


_run_untraced(calls.rotate)
