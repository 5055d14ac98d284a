"""What PyTorch adds: gradients. The only file that imports it, once its tensors have come in."""

from __future__ import annotations

from typing import Any

import torch

from . import calls
from .checks import described
from .problem import out_names
from .tensor import check_gradient


def recorded(given: calls.Given) -> tuple[Any, ...]:
    """Rotate tensors of which PyTorch wants gradients, and record how.

    In place, what autograd refuses (a leaf, a view of several) is refused before anything is
    written.
    """
    xs, out = given.xs, given.out
    for part in given.table.arrays:
        check_gradient("table", part)
    if out is None:
        return _apply(given, xs)
    for name, x, y in zip(out_names(given.names), xs, out, strict=True):
        if y is not x:
            raise ValueError(
                f"{name} must be its input itself, or a new array, where a gradient is recorded, "
                f"got another {described(y)}"
            )
    with torch.no_grad():
        ready = calls.checked(given)
    if any(isinstance(x, torch.Tensor) and x._is_view() for x in xs):
        for x, name in zip(xs, given.names, strict=True):  # of which autograd takes one at a time
            _apply(given._replace(names=(name,), xs=(x,), out=(x,)), (x,))
    else:
        _apply(given, xs)
    ready.write()
    return out


def _apply(given: calls.Given, xs: tuple[Any, ...]) -> tuple[Any, ...]:
    outs: tuple[Any, ...] = _Rotation.apply(given, *xs)  # type: ignore[no-untyped-call]
    return outs


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the conjugate rotation of the results' gradients.

    It is linear, so a second derivative is recorded as the first is.
    """

    @staticmethod
    def forward(ctx: Any, given: calls.Given, *xs: Any) -> tuple[Any, ...]:
        """Rotate into new tensors; of inputs to be written later, note that they will be."""
        kept = *given.table.arrays, *given.positions
        ctx.save_for_backward(*(each for each in kept if isinstance(each, torch.Tensor)))
        ctx.given = given._replace(xs=(), out=None)
        ctx.set_materialize_grads(False)
        if given.out is None:
            outs = _rotate(given, given.names, xs)
        else:
            ctx.mark_dirty(*xs)
            outs = xs
        constant = (y for x, y in zip(xs, outs, strict=True) if not x.requires_grad)
        ctx.mark_non_differentiable(*constant)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Turn the gradients back, those that are there and are asked for."""
        tuple(ctx.saved_tensors)  # raises where one of them has been written since
        given = ctx.given
        options = given.options._replace(conjugate=not given.options.conjugate)
        asked = [
            i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[1 + i]
        ]
        turned: list[Any] = [None] * len(grads)
        if asked:
            names = tuple(f"{given.names[i]}_grad" for i in asked)
            given = given._replace(options=options)
            results = _rotate(given, names, tuple(grads[i] for i in asked))
            for i, result in zip(asked, results, strict=True):
                turned[i] = result
        return None, *turned


def _rotate(
    given: calls.Given, names: tuple[str, ...], xs: tuple[torch.Tensor, ...]
) -> tuple[Any, ...]:
    """Rotate other tensors as a call was asked to, into new ones."""
    positions = given.positions[0] if given.positions else given.first
    return calls.rotate(names, xs, given.table, positions, given.options, None)
