"""The way of a call whose gradients PyTorch records: in memory and in a graph alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .. import eager
from ..call import Call
from ..checks import described
from ..choices import LAYER_NORM, TOKEN_NORM
from ..options import Norm, Options, axis_names
from ..private_torch import base_of, may_not_be_written
from ..problem import OF_POSITIONS, OF_WEIGHTS, out_names
from ..table_forms import TableSource, frequencies, no_table
from . import weights_of, without_norm

Run = Callable[[Call], tuple[Any, ...]]  # rotates into new tensors, and records nothing


def rotate(call: Call, run: Run) -> tuple[Any, ...]:
    """Rotate into new tensors by `run`, and record how where a gradient is wanted."""
    weights = [weight for _, weight in call.weights]
    if not any([wants_gradient(each) for each in (*call.xs, *weights)]):
        return run(call)
    outs: tuple[Any, ...] = _Rotation.apply(call, run, *call.xs, *weights)  # type: ignore[no-untyped-call]
    return outs


def record(call: Call, run: Run) -> tuple[Any, ...]:
    """Rotate tensors in memory, some of which want a gradient; return `out`, or new tensors.

    `run` rotates tensors of any kind, as a backward pass may have them.
    """
    check(call)
    if call.out is None:
        return rotate(call, run)
    ready = eager.ready(call, *eager.find(call))  # which keeps the memory till it is written
    _rotate_in_place(call, run, ready.write)
    return call.out


def check(call: Call) -> None:
    """Refuse a call on tensors in memory of which no gradient can be recorded."""
    check_recordable(call)
    if call.out is not None:
        check_in_place(call)
    for name, x in call.named:
        if not isinstance(x, torch.Tensor) and name not in OF_POSITIONS:
            raise TypeError(
                f"{name} must be a tensor where a gradient is recorded, got {type(x).__name__}"
            )
    if call.out is not None:
        for name, x in zip(call.names, call.xs, strict=True):
            _check_may_be_written(name, x)


def _rotate_in_place(call: Call, run: Run, write: Callable[[], None]) -> None:
    """Rotate the inputs themselves by `write`, and record how; gradients are rotated by `run`.

    What has been checked is written before the first history moves on.
    """
    written: list[bool] = []

    def write_once(call: Call) -> tuple[Any, ...]:
        if not written:
            write()  # where this raises, nothing has been recorded
            written.append(True)
        return call.xs

    if any([base_of(x) is not None for x in call.xs]):  # of which autograd takes one at a time
        groups: list[tuple[tuple[str, ...], tuple[Any, ...]]] = [
            ((name,), (x,)) for name, x in zip(call.names, call.xs, strict=True)
        ]
    else:
        groups = [(call.names, call.xs)]
    for names, xs in groups:
        part = call.of_kind(names=names)._replace(xs=xs, out=xs)
        _Rotation.apply(part, (run, write_once), *xs)  # type: ignore[no-untyped-call]


def check_recordable(call: Call) -> None:
    """Refuse a call whose gradients would be lost."""
    for part in call.table.arrays:
        if wants_gradient(part):
            raise ValueError(
                "table must not require a gradient, which is not recorded here: use "
                "torch.no_grad() or a detached tensor, got requires_grad=True"
            )
    for name, array in call.named:
        if call.options.cache is not None and wants_gradient(array):
            raise ValueError(
                f"{name} must not require a gradient, which is not recorded where a cache is "
                "written: use torch.no_grad() or a detached tensor, got requires_grad=True"
            )
        if call.options.norm is not None and call.out is not None and wants_gradient(array):
            raise ValueError(
                "out must be None when the norm needs gradients (its backward pass uses the "
                f"input), got a tensor, and {name} requires a gradient"
            )


def wants_gradient(array: Any) -> bool:
    """Return whether PyTorch now records operations for a gradient of the array."""
    return isinstance(array, torch.Tensor) and array.requires_grad and torch.is_grad_enabled()


def check_in_place(call: Call) -> None:
    """Refuse outputs of which no gradient can be recorded."""
    for name, x, y in zip(out_names(call.names), call.xs, call.out or (), strict=True):
        if y is not x:
            raise ValueError(
                f"{name} must be its input itself, or a new array, where a gradient is recorded, "
                f"got another {described(y)}"
            )


def _check_may_be_written(name: str, x: Any) -> None:
    """Refuse what autograd lets no one write in place, before its history moves on."""
    if not isinstance(x, torch.Tensor) or not x.requires_grad:
        return
    base = base_of(x)
    origin = x if base is None else base
    if origin.is_leaf and origin.requires_grad:
        raise ValueError(
            f"{name} must not be a leaf that requires a gradient, or a view of one, to be written "
            "in place: use a copy, or torch.no_grad(), got a leaf"
        )
    if base is not None and may_not_be_written(x):
        raise ValueError(
            f"{name} must not be one of several views that one operation returned, or a view that "
            "was made where gradients are off, to be written in place: take it by an index, got "
            "such a view"
        )


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the conjugate rotation of the results' gradients.

    It is linear, so a second derivative is recorded as the first is. A norm before it, or after it,
    has PyTorch's gradient.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, run: Any, *xs_and_weights: Any) -> tuple[Any, ...]:
        """Rotate into new tensors by `run`; or the inputs themselves, by the second of two."""
        xs, weights = xs_and_weights[: len(call.xs)], xs_and_weights[len(call.xs) :]
        if call.out is not None:
            run, write = run
            outs = write(call)
            ctx.mark_dirty(*outs)
        else:
            outs = run(call)
        call = _unchanging(call)
        parts = (*call.table.arrays, *(array for _, array in call.position_arrays))
        is_tensor = [isinstance(part, torch.Tensor) for part in parts]
        kept = [part for part in parts if isinstance(part, torch.Tensor)]
        ctx.save_for_backward(*(xs_and_weights if call.options.norm else ()), *kept)
        ctx.others = [None if there else part for part, there in zip(parts, is_tensor, strict=True)]
        ctx.call = call._replace(
            xs=(), out=None, table=call.table._replace(arrays=()), extra_arrays=()
        )
        ctx.num_parts, ctx.run = len(call.table.arrays), run
        ctx.weights = [name for name in call.extra_names if name in OF_WEIGHTS]
        ctx.set_materialize_grads(False)
        named = dict(zip(ctx.weights, weights, strict=True))
        constant = [
            y
            for name, x, y in zip(call.names, xs, outs, strict=True)
            if not any(part.requires_grad for part in (x, *weights_of(name, named).values()))
        ]
        if constant:
            ctx.mark_non_differentiable(*constant)
        return outs  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Rotate the gradients back, those that are there and are asked for."""
        saved = ctx.saved_tensors  # raises where one of them has been written since
        call: Call = ctx.call
        names_asked = dict(zip((*call.names, *ctx.weights), ctx.needs_input_grad[2:], strict=True))
        asked = {
            name: grad
            for name, grad in zip(call.names, grads, strict=True)
            if grad is not None
            and any(names_asked[each] for each in (name, *weights_of(name, names_asked)))
        }
        found: dict[str, Any] = {}
        if asked:
            norm = call.options.norm
            kept = iter(saved[len(names_asked) if norm else 0 :])
            parts = [next(kept) if other is None else other for other in ctx.others]

            def rotated(xs: dict[str, Any], conjugate: bool) -> dict[str, Any]:
                """Return tensors rotated, back for a gradient, where there is a table."""
                if call.table.form is no_table:
                    return xs
                plain = call.of_kind(
                    names=tuple(f"{name}_grad" for name in xs),
                    extra_names=tuple(name for name in call.extra_names if name in OF_POSITIONS),
                    options=without_norm(call.options, conjugate),
                )._replace(
                    xs=(*xs.values(),),
                    table=TableSource(call.table.form, tuple(parts[: ctx.num_parts])),
                    extra_arrays=tuple(parts[ctx.num_parts :]),
                )
                return dict(zip(xs, rotate(plain, ctx.run), strict=True))

            inputs = dict(zip(names_asked, saved, strict=False)) if norm else {}
            if norm and norm.after:
                with torch.enable_grad():  # for what is normalised has a gradient of its own
                    inputs |= rotated(
                        {name: _wide(inputs[name]) for name in asked}, conjugate=False
                    )
                asked = _through_norm(asked, names_asked, inputs, call.options, norm)
            back = {name: grad for name, grad in asked.items() if name in call.names}
            found = asked | (rotated(back, conjugate=True) if back else {})
            if norm and not norm.after:
                found = _through_norm(found, names_asked, inputs, call.options, norm)
        return None, None, *[found.get(name) for name in names_asked]


def _unchanging(call: Call) -> Call:
    """Return a call with copies of what is no tensor, whose changes PyTorch does not see.

    Of a table by position they are the rows that tokens have, where no array says which.
    """
    parts, form = call.table.arrays, call.table.form
    if all([isinstance(each, torch.Tensor) for each in (*parts, *call.extra_arrays)]):
        return call
    used, offset = slice(None), call.position_offset
    by_position = len(call.table.view(None).specs[0].shape) == 2 and form is not frequencies
    if by_position and not call.position_arrays:
        x, start = call.xs[0], offset or 0
        num_tokens = x.shape[axis_names(x.ndim, call.options).index("s")]
        used, offset = slice(start, start + num_tokens), None
    return call._replace(
        table=TableSource(form, tuple([_copied(part, used) for part in parts])),
        extra_arrays=tuple([_copied(array, slice(None)) for array in call.extra_arrays]),
        position_offset=offset,
    )


def _copied(array: Any, used: slice) -> Any:
    """Return a part of an array, in memory of its own where this is no tensor of PyTorch."""
    if isinstance(array, torch.Tensor):
        return array[used]
    if isinstance(array, np.ndarray):
        return array[used].copy()
    return torch.utils.dlpack.from_dlpack(array)[used].clone()


def _through_norm(
    grads: dict[str, torch.Tensor],
    asked: dict[str, bool],
    given: dict[str, torch.Tensor],
    options: Options,
    norm: Norm,
) -> dict[str, torch.Tensor]:
    """Return the gradients of what is normalised, and of weights and biases, from the results'.

    What is given is asked for, or not, by its name.
    """
    with torch.enable_grad():
        # Each in its own right: one weight may be given for q and for k.
        inputs = {name: part.view_as(part) for name, part in given.items()}
    found: dict[str, torch.Tensor] = {}
    for name, grad in grads.items():
        weights = weights_of(name, inputs)
        wanted = [each for each in (name, *weights) if asked[each]]
        with torch.enable_grad():
            y = _normalised(_wide(inputs[name]), weights, options, norm)
            grad = grad.to(y.dtype)
        parts = torch.autograd.grad(
            y, [inputs[each] for each in wanted], grad, create_graph=torch.is_grad_enabled()
        )
        found |= dict(zip(wanted, parts, strict=True))
    return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return float16 as float32, in which a kernel holds what float16 may not reach: rotated
    elements before they are normalised, and weights.
    """
    return x.float() if x.dtype == torch.float16 else x


def _normalised(x: Any, weights: dict[str, Any], options: Options, norm: Norm) -> Any:
    """Return x with its heads normalised, by PyTorch's own function."""
    heads = x if options.head_dim is None else x.unflatten(-1, (-1, options.head_dim))
    at = axis_names(x.ndim, options).index("h")
    if options.packed is None:
        of_norm = {name.rpartition("_")[2]: each for name, each in weights.items()}
        return _norm_of(heads, of_norm.get("weight"), of_norm.get("bias"), at, norm).reshape(
            x.shape
        )
    num_heads, num_kv_heads = options.packed
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), at)
    q = _norm_of(q, weights.get("q_weight"), weights.get("q_bias"), at, norm)
    k = _norm_of(k, weights.get("k_weight"), weights.get("k_bias"), at, norm)
    return torch.cat((q, k, v), at).reshape(x.shape)


def _norm_of(heads: Any, weight: Any, bias: Any, at: int, norm: Norm) -> Any:
    if weight is not None:
        wide = weight.to(torch.promote_types(weight.dtype, heads.dtype))
        weight = (wide + norm.weight_offset).to(heads.dtype)
    by_token = heads.movedim(at, -2)
    flat = by_token.flatten(-2) if norm.kind == TOKEN_NORM else heads
    # A whole number: PyTorch 2.11 takes a symbolic one for its address.
    size = (int(flat.shape[-1]),)
    if norm.kind == LAYER_NORM:
        # PyTorch loses second gradients of its function with a bias and no weight.
        flat = torch.nn.functional.layer_norm(flat, size, weight, None, norm.eps)
        return flat if bias is None else flat + bias.to(heads.dtype)
    flat = torch.nn.functional.rms_norm(flat, size, weight, norm.eps)
    return flat.view(by_token.shape).movedim(-2, at) if norm.kind == TOKEN_NORM else flat
