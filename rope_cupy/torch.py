"""What PyTorch adds: a module, gradients, operators for torch.compile. Alone in importing PyTorch.

Import `rope_cupy.torch` for `RotaryEmbedding`; calls import it by themselves when they need more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from . import calls
from .checks import count, described, index
from .frequencies import cos_sin, inverse_frequencies
from .options import Options, axis_names, check_options
from .problem import out_names
from .rotary import apply_rotary_qk
from .tables import FORMS, TableSource, source_of
from .tensor import Glance, check_gradient

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(torch.nn.Module):
    """Rotate q and k by a table of its own, which is float32 whatever the model's dtype is.

    The cosines and sines of the positions 0 .. max_position - 1 are the buffers ``cos`` and
    ``sin``, of shape (max_position, head_dim / 2). They follow the module to a device, keep their
    dtype in ``.half()`` and ``.to(torch.bfloat16)``, are made anew when a module leaves the device
    "meta", and are not in ``state_dict()``.

    Args:
        head_dim: elements of a head, all of which turn; even.
        base: of the inverse frequencies base ** (-2 i / head_dim): Su et al., "RoFormer: Enhanced
            Transformer with Rotary Position Embedding" (2021), section 3.2.2.
        interleaved: True pairs elements (2 i, 2 i + 1), False elements (i, i + head_dim / 2).
        max_position: how many positions the table holds.
        layout: the names of the axes of q and k, as for `rope_cupy.apply_rotary_qk`.
        device: of the table; by default PyTorch's, which is "meta" where a model is made there.

    Raises TypeError or ValueError when `head_dim` is not a positive even int, `base` not a positive
    number or `max_position` not an int of 0 or more.

    >>> import torch
    >>> rotary = RotaryEmbedding(64, base=500000.0, max_position=8192).half()
    >>> q, k = torch.ones(1, 6, 8, 64).half(), torch.ones(1, 6, 2, 64).half()
    >>> q_out, k_out = rotary(q, k)
    >>> q_out.shape, k_out.dtype, rotary.cos.dtype
    (torch.Size([1, 6, 8, 64]), torch.float16, torch.float32)
    """

    cos: torch.Tensor
    sin: torch.Tensor
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
        self.interleaved, self.layout = interleaved, layout
        device = torch.get_default_device() if device is None else device
        for name, part in zip(("cos", "sin"), self._table(), strict=True):
            self.register_buffer(name, part.to(device), persistent=False)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor | int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q and k rotated: see `rope_cupy.apply_rotary_qk`."""
        return apply_rotary_qk(
            q,
            k,
            (self.cos, self.sin),
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

    def _table(self) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos_sin(inverse_frequencies(self.head_dim, self.base), self.max_position)
        return torch.from_numpy(cos), torch.from_numpy(sin)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Move the table as PyTorch asks, but keep its dtype; from "meta" make it anew."""
        before = self.cos, self.sin
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.cos.device
        if before[0].is_meta and device.type != "meta":
            before = self._table()
        self.cos, self.sin = (part.to(device) for part in before)
        return self


# Gradients.


def recorded(given: calls.Given, key: Any, seen: Glance | None) -> tuple[Any, ...]:
    """Rotate tensors of which PyTorch wants gradients, and record how.

    `seen` is what has been glanced at of them, if they could be: see `calls.rotate_seen`.
    """
    xs, out = given.xs, given.out
    for part in given.table.arrays:
        check_gradient("table", part)
    if out is None:
        return _record(given, key, seen)
    _check_in_place(given.names, xs, out)
    for name, x in zip(given.names, xs, strict=True):
        _check_may_be_written(name, x)
    ready, owners = calls.checked(given, key, seen)
    if any([isinstance(x, torch.Tensor) and x._is_view() for x in xs]):
        for x, name in zip(xs, given.names, strict=True):  # of which autograd takes one at a time
            _record(given._replace(names=(name,), xs=(x,), out=(x,)))
    else:
        _record(given)
    ready.write()
    del owners  # which have kept the memory till here
    return out


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


def _record(given: calls.Given, key: Any = None, seen: Glance | None = None) -> tuple[Any, ...]:
    outs: tuple[Any, ...] = _Rotation.apply(  # type: ignore[no-untyped-call]
        given, key, seen, *given.xs
    )
    return outs


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the conjugate rotation of the results' gradients.

    It is linear, so a second derivative is recorded as the first is.
    """

    @staticmethod
    def forward(
        ctx: Any, given: calls.Given, key: Any, seen: Glance | None, *xs: Any
    ) -> tuple[Any, ...]:
        """Rotate into new tensors; of inputs to be written later, note that they will be."""
        names, table, out = given.names, given.table, given.out
        kept = [each for each in (*table.arrays, *given.rows) if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(*kept)
        ctx.call = names, table, given.positions, given.options
        ctx.set_materialize_grads(False)
        if out is not None:
            ctx.mark_dirty(*xs)
            outs = xs
        elif seen is not None:
            outs = calls.rotate_seen(given, key, seen)
        else:
            outs = calls.rotate_unseen(given)
        constant = [y for x, y in zip(xs, outs, strict=True) if not x.requires_grad]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there and are asked for."""
        _ = ctx.saved_tensors  # raises where one of them has been written since
        names, table, positions, options = ctx.call
        asked = {
            f"{name}_grad": grad
            for name, grad, is_asked in zip(names, grads, ctx.needs_input_grad[3:], strict=True)
            if is_asked and grad is not None
        }
        if not asked:
            return (None,) * (3 + len(names))
        how = table, positions, _conjugate(options), None
        turned = dict(zip(asked, calls.rotate((*asked,), (*asked.values(),), *how), strict=True))
        return None, None, None, *[turned.get(f"{name}_grad") for name in names]


@cache
def _conjugate(options: Options) -> Options:
    return options._replace(conjugate=not options.conjugate)


# DTensor. Each process turns its own part by the positions of its own tokens, and sends nothing.


def sharded(given: calls.Given) -> tuple[Any, ...]:
    """Rotate DTensors, which come back with the placements that they have.

    Positions and tables are those of the whole tensors, in plain tensors or replicated ones.
    """
    from torch.distributed.tensor import DTensor

    parts = _parts(given)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in given.xs)
    if given.out is not None:
        _check_in_place(given.names, given.xs, given.out)
        if wants:
            raise ValueError("out must be None where a gradient of a DTensor is recorded, got some")
    positions, table = _of_this_process(given, parts)
    local = tuple(x.to_local() for x in given.xs)
    out = None if given.out is None else local
    results = calls.rotate(given.names, local, table, positions, given.options, out)
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
    rows, first = dict(zip(given.row_names, given.rows, strict=True)), given.first
    arrays = [_replicated("table", array) for array in given.table.arrays]
    trailing = 3 if given.table.form is FORMS["_matrices"] else 1
    by_position = arrays[0].ndim - trailing == 1
    if not by_position:
        arrays = [_cut(part, (batch, tokens, heads)[: part.ndim - trailing]) for part in arrays]
    table = TableSource(given.table.form, tuple(arrays))
    rows = {name: _replicated(name, array) for name, array in rows.items()}
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


def _replicated(name: str, array: Any) -> Any:
    """Return a plain tensor, or what every process has of a DTensor."""
    if not hasattr(array, "device_mesh"):
        return array
    if not all(placement.is_replicate() for placement in array.placements):
        raise ValueError(
            f"{name} must be a plain tensor or replicated, got the placements {array.placements}"
        )
    return array.to_local()


# Operators. A graph that PyTorch traces holds them in place of a call, and runs the call by them.

_ARGUMENTS = (
    "Tensor[] table, str form, Tensor? positions, Tensor? seqlen_offsets, Tensor? cu_seqlens, "
    "SymInt? first, bool interleaved, str? layout, int? head_dim, int rotary_offset, "
    "bool conjugate, str out_of_range, int[]? mrope_section, bool mrope_interleaved"
)
_ROTATE, _NEW, _INTO = "rope_cupy::rotate", "rope_cupy::rotate_new", "rope_cupy::rotate_into"
for _name in (_ROTATE, _NEW):
    torch.library.define(_name, f"(Tensor[] xs, {_ARGUMENTS}) -> Tensor[]")
torch.library.define(_INTO, f"(Tensor[] xs, Tensor(a!)[] outs, {_ARGUMENTS}) -> ()")


def traced(
    names: tuple[str, ...],
    xs: tuple[Any, ...],
    table: Any,
    positions: tuple[Any, Any, Any],
    options: tuple[Any, ...],
    out: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    """Put an operator into the graph that is being traced.

    What is written in place where a gradient is recorded is written from a new result.
    """
    source = source_of(table)
    rows, first = _arrays_and_int(positions)
    if any([hasattr(x, "device_mesh") for x in xs]):
        there = {name: row for name, row in zip(_ROWS, rows, strict=True) if row is not None}
        options = check_options(*options)
        named = (*there,), (*there.values(),), first
        return sharded(calls.Given(names, xs, source, *named, options, out))
    arguments = list(source.arrays), source.form.__name__, *rows, first, *options
    records = torch.is_grad_enabled() and any([x.requires_grad for x in xs])
    if torch.is_grad_enabled() and any([part.requires_grad for part in source.arrays]):
        raise ValueError("table must not require a gradient, which is not recorded here")
    if out is not None and not records:
        torch.ops.rope_cupy.rotate_into(list(xs), list(out), *arguments)
        return out
    results = tuple(torch.ops.rope_cupy.rotate(list(xs), *arguments))
    if out is None:
        return results
    _check_in_place(names, xs, out)
    for y, result in zip(out, results, strict=True):
        y.copy_(result)
    return out


_ROWS = calls.Positions._fields


def _arrays_and_int(positions: tuple[Any, Any, Any]) -> tuple[list[torch.Tensor | None], Any]:
    """Return the tensors among what tells the positions of tokens, and what their ints add to."""
    if positions[1] is not None or positions[2] is not None:
        calls.check_counted(*positions, lambda each: isinstance(each, torch.Tensor))
    rows, ints = [], []
    for each in positions:
        is_tensor = isinstance(each, torch.Tensor)
        rows.append(each if is_tensor else None)
        if each is not None and not is_tensor:
            ints.append(each)
    return rows, sum(ints) if ints else None


def _apart(arguments: Sequence[Any]) -> tuple[Sequence[Any], int | None, Sequence[Any]]:
    """Return the tensors, the int and the options of an operator's last arguments."""
    num = len(_ROWS)
    return arguments[:num], arguments[num], arguments[num + 1 :]


def _run(
    xs: Sequence[torch.Tensor],
    outs: tuple[torch.Tensor, ...] | None,
    table: Sequence[torch.Tensor],
    form: str,
    positions: torch.Tensor | None,
    seqlen_offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    first: int | None,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    names = ("x",) if len(xs) == 1 else ("q", "k")
    source = TableSource(FORMS[form], tuple(table))
    rows = first if positions is None else positions, seqlen_offsets, cu_seqlens
    return calls.rotate(names, tuple(xs), source, rows, options, outs)


def _run_new(xs: Sequence[torch.Tensor], *arguments: Any) -> list[torch.Tensor]:
    return list(_run(xs, None, *arguments))


def _run_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], *arguments: Any) -> None:
    _run(xs, tuple(outs), *arguments)


def _fake_new(xs: Sequence[torch.Tensor], *arguments: Any) -> list[torch.Tensor]:
    """Return tensors like the results, which have no memory yet."""
    _check_fakes(xs, *arguments)
    return [torch.empty_like(x) for x in xs]


def _fake_into(xs: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], *arguments: Any) -> None:
    _check_fakes((*xs, *outs), *arguments)


def _check_fakes(
    arrays: Sequence[torch.Tensor],
    table: Sequence[torch.Tensor],
    form: str,
    *rows_and_options: Any,
) -> None:
    """Check what a trace will not change; a run checks the rest."""
    rows, _, options = _apart(rows_and_options)
    check_options(*options)
    device = arrays[0].device
    named = [("k or out", arrays), ("table", table)]
    named += [(name, [row]) for name, row in zip(_ROWS, rows, strict=True)]
    for name, others in named:
        for each in others:
            if each is not None and each.device != device:
                raise ValueError(f"{name} must be on x's or q's device {device}, got {each.device}")


def _rotate(xs: Sequence[torch.Tensor], *arguments: Any) -> Sequence[torch.Tensor]:
    """Be made of an operator that has no gradient, and of the gradient where one is wanted.

    A graph that is compiled holds that operator alone, which costs it one dispatch.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        return _TracedRotation.apply(arguments, *xs)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.rope_cupy.rotate_new(xs, *arguments)  # type: ignore[no-any-return]


class _TracedRotation(torch.autograd.Function):
    """A rotation in a graph, whose tensors may have no memory yet: see `_Rotation`."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *xs: Any) -> tuple[Any, ...]:
        """Rotate into new tensors."""
        table, form, *rest = arguments
        rows, first, options = _apart(rest)
        ctx.save_for_backward(*table, *rows)
        ctx.arguments = len(table), form, first, check_options(*options)
        ctx.set_materialize_grads(False)
        outs = tuple(torch.ops.rope_cupy.rotate_new(xs, *arguments))
        ctx.mark_non_differentiable(
            *(y for x, y in zip(xs, outs, strict=True) if not x.requires_grad)
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there."""
        num_parts, form, first, options = ctx.arguments
        table, rows = ctx.saved_tensors[:num_parts], ctx.saved_tensors[num_parts:]
        arguments = list(table), form, *rows, first, *_conjugate(options)
        there = [grad for grad in grads if grad is not None]
        turned = iter(torch.ops.rope_cupy.rotate(there, *arguments) if there else ())
        return None, *[None if grad is None else next(turned) for grad in grads]


torch.library.impl(_ROTATE, "CompositeImplicitAutograd", _rotate)
torch.library.impl(_NEW, "CompositeExplicitAutograd", _run_new)
torch.library.impl(_INTO, "CompositeExplicitAutograd", _run_into)
torch.library.register_fake(_NEW, _fake_new)
torch.library.register_fake(_INTO, _fake_into)
