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
from .options import TOKEN_NORM, Norm, Options, axis_names, check_options, checked_parts
from .problem import OF_POSITIONS, OF_WEIGHTS, out_names
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
    _check_recordable(given.options, out)
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


def _check_recordable(options: Options, out: tuple[Any, ...] | None) -> None:
    if options.cache:
        raise ValueError(
            "q, k and v must not require a gradient, which is not recorded where a cache is "
            "written: use torch.no_grad() or detached tensors, got requires_grad=True"
        )
    if options.norm and out is not None:
        raise ValueError(
            "out must be None where a gradient of a norm is recorded, which needs what it is of, "
            "got some"
        )


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
    weights = [row for name, row in given.named_rows if name in OF_WEIGHTS]
    for name, row in given.named_rows:
        if name in OF_WEIGHTS and not isinstance(row, torch.Tensor):
            raise TypeError(
                f"{name} must be a tensor where a gradient is recorded, got {type(row).__name__}"
            )
    outs: tuple[Any, ...] = _Rotation.apply(  # type: ignore[no-untyped-call]
        given, key, seen, *given.xs, *weights
    )
    return outs


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the conjugate rotation of the results' gradients.

    It is linear, so a second derivative is recorded as the first is. A norm before it has
    PyTorch's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, given: calls.Given, key: Any, seen: Glance | None, *xs_and_weights: Any
    ) -> tuple[Any, ...]:
        """Rotate into new tensors; of inputs to be written later, note that they will be."""
        names, table, out = given.names, given.table, given.out
        xs = xs_and_weights[: len(names)]
        kept = [each for each in (*table.arrays, *given.rows) if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(*(xs_and_weights if given.options.norm else ()), *kept)
        ctx.call = names, table, given.positions, given.options
        ctx.weights = [name for name in given.row_names if name in OF_WEIGHTS]
        ctx.set_materialize_grads(False)
        if out is not None:
            ctx.mark_dirty(*xs)
            outs = xs
        elif seen is not None:
            outs = calls.rotate_seen(given, key, seen)
        else:
            outs = calls.rotate_unseen(given)
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
        names_asked = dict(zip((*names, *ctx.weights), ctx.needs_input_grad[3:], strict=True))
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
        return None, None, None, *[found.get(name) for name in names_asked]


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
    inputs = dict(zip(asked, saved, strict=False))
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


@cache
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

_ARGUMENTS = (
    "Tensor[] table, str form, Tensor? positions, Tensor? seqlen_offsets, Tensor? cu_seqlens, "
    "SymInt? first, str[] names, Tensor[] more, bool interleaved, str? layout, int? head_dim, "
    "int rotary_offset, bool conjugate, str out_of_range, int[]? mrope_section, "
    "bool mrope_interleaved, str rounding, str? norm, float eps, float weight_offset, "
    "str round_norm, int[]? packed, str? cache_layout, str? cache_dtype, float? k_scale, "
    "float? v_scale"
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
    more: tuple[tuple[str, Any], ...] = (),
) -> tuple[Any, ...]:
    """Put an operator into the graph that is being traced.

    What is written in place where a gradient is recorded is written from a new result.
    """
    source = source_of(table)
    if options[0] is None:
        options = source.interleaved, *options[1:]
    rows, first = _arrays_and_int(positions)
    if any([hasattr(x, "device_mesh") for x in xs]):
        there = {name: row for name, row in zip(_ROWS, rows, strict=True) if row is not None}
        options = check_options(*options[:-3], *checked_parts(*options[-3:]))
        there |= dict(more)
        named = (*there,), (*there.values(),), first
        return sharded(calls.Given(names, xs, source, *named, options, out))
    named_more = [name for name, _ in more], [array for _, array in more]
    how = *rows, first, *named_more, *_flat(options)
    # Inductor gives no complex numbers to an operator that writes: they go as pairs.
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in source.arrays]
    arguments = parts, source.form.__name__, *how
    asking = [*xs, *(array for name, array in more if name in OF_WEIGHTS)]
    asking += [y for y in out or () if y is not None]
    records = torch.is_grad_enabled() and any([each.requires_grad for each in asking])
    if torch.is_grad_enabled() and any([part.requires_grad for part in source.arrays]):
        raise ValueError("table must not require a gradient, which is not recorded here")
    if out is not None and not records:
        out = tuple([torch.empty_like(x) if y is None else y for x, y in zip(xs, out, strict=True)])
        torch.ops.rope_cupy.rotate_into(list(xs), list(out), *arguments)
        return out
    if records:
        _check_recordable(Options(*options), out)
    results = tuple(torch.ops.rope_cupy.rotate(list(xs), *arguments))
    if out is None:
        return results
    _check_in_place(names, xs, out)
    for y, result in zip(out, results, strict=True):
        y.copy_(result)
    return out


def _flat(options: Sequence[Any]) -> tuple[Any, ...]:
    """Return options as an operator takes them: the fields of their parts one by one."""
    *plain, norm, packed, cache = options
    last = None if packed is None else list(packed), *(cache or (None,) * 4)
    *of_norm, round_norm = norm or (None, 0.0, 0.0, False)
    return *plain, *of_norm, str(round_norm), *last


def _options(flat: Sequence[Any]) -> Options:
    """Return the options that an operator has been given, checked."""
    plain, (*norm, packed), cache = flat[:-9], flat[-9:-4], flat[-4:]
    norm[-1] = {"True": True, "False": False}.get(norm[-1], norm[-1])
    parts = checked_parts(
        None if norm[0] is None else norm, packed, None if cache[0] is None else cache
    )
    return check_options(*plain, *parts)


_ROWS = calls.Positions._fields
COMPLEX = "_complex"  # of FORMS, whose array an operator has as pairs of real numbers


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


class _Last(NamedTuple):
    """An operator's last arguments, behind the table and its form."""

    rows: Sequence[Any]
    first: int | None
    more: tuple[tuple[str, Any], ...]
    options: Options


def _last(arguments: Sequence[Any]) -> _Last:
    num = len(_ROWS)
    first, names, more, *flat = arguments[num:]
    named = tuple(zip(names, more, strict=True))
    return _Last(arguments[:num], first, named, _options(flat))


def _run(
    xs: Sequence[torch.Tensor],
    outs: tuple[torch.Tensor, ...] | None,
    table: Sequence[torch.Tensor],
    form: str,
    *arguments: Any,
) -> tuple[torch.Tensor, ...]:
    (positions, seqlen_offsets, cu_seqlens), first, more, options = _last(arguments)
    names: tuple[str, ...] = ("q", "k", "v")[: len(xs)]
    if len(xs) == 1:
        names = ("qkv",) if options.packed else ("x",)
    if form == COMPLEX:
        table = [torch.view_as_complex(part) for part in table]
    source = TableSource(FORMS[form], tuple(table))
    rows = first if positions is None else positions, seqlen_offsets, cu_seqlens
    return calls.rotate(names, tuple(xs), source, rows, options, outs, more)


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
    rows, _, more, _ = _last(rows_and_options)
    device = arrays[0].device
    named = [("k or out", arrays), ("table", table)]
    named += [(name, [row]) for name, row in (*zip(_ROWS, rows, strict=True), *more)]
    for name, others in named:
        for each in others:
            if each is not None and each.device != device:
                raise ValueError(f"{name} must be on x's or q's device {device}, got {each.device}")


def _rotate(xs: Sequence[torch.Tensor], *arguments: Any) -> Sequence[torch.Tensor]:
    """Be made of an operator that has no gradient, and of the gradient where one is wanted.

    A graph that is compiled holds that operator alone, which costs it one dispatch.
    """
    more = _last(arguments[2:]).more
    weights = [array for name, array in more if name in OF_WEIGHTS]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*xs, *weights)):
        return _TracedRotation.apply(arguments, len(xs), *xs, *weights)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.rope_cupy.rotate_new(xs, *arguments)  # type: ignore[no-any-return]


class _TracedRotation(torch.autograd.Function):
    """A rotation in a graph, whose tensors may have no memory yet: see `_Rotation`."""

    @staticmethod
    def forward(
        ctx: Any, arguments: tuple[Any, ...], num_xs: int, *xs_and_weights: Any
    ) -> tuple[Any, ...]:
        """Rotate into new tensors."""
        table, form, *rest = arguments
        rows, first, more, options = _last(rest)
        xs = xs_and_weights[:num_xs]
        ctx.names = [*(("q", "k") if num_xs > 1 else ("qkv",) if options.packed else ("x",))]
        ctx.names += [name for name, _ in more if name in OF_WEIGHTS]
        ctx.save_for_backward(*(xs_and_weights if options.norm else ()), *table, *rows)
        ctx.arguments = len(table), form, first, options
        ctx.set_materialize_grads(False)
        outs = tuple(torch.ops.rope_cupy.rotate_new(xs, *arguments))
        named = dict(zip(ctx.names, xs_and_weights, strict=True))
        ctx.mark_non_differentiable(
            *(
                y
                for name, x, y in zip(ctx.names[:num_xs], xs, outs, strict=True)
                if not any(part.requires_grad for part in (x, *_weights_of(name, named).values()))
            )
        )
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there."""
        num_parts, form, first, options = ctx.arguments
        behind = ctx.saved_tensors[len(ctx.names) if options.norm else 0 :]
        table, rows = behind[:num_parts], behind[num_parts:]
        arguments = list(table), form, *rows, first, [], [], *_flat(_conjugate(options))
        there = {
            name: grad for name, grad in zip(ctx.names, grads, strict=False) if grad is not None
        }
        found: dict[str, Any] = {}
        if there:
            turned = torch.ops.rope_cupy.rotate([*there.values()], *arguments)
            found = dict(zip(there, turned, strict=True))
        if options.norm:
            asked = dict(zip(ctx.names, ctx.needs_input_grad[2:], strict=True))
            found = _through_norm(found, asked, ctx.saved_tensors, options, options.norm)
        return None, None, *[found.get(name) for name in ctx.names]


torch.library.impl(_ROTATE, "CompositeImplicitAutograd", _rotate)
torch.library.impl(_NEW, "CompositeExplicitAutograd", _run_new)
torch.library.impl(_INTO, "CompositeExplicitAutograd", _run_into)
torch.library.register_fake(_NEW, _fake_new)
torch.library.register_fake(_INTO, _fake_into)
