"""Rotations with the gradients of the peers' functions: the gradient is the conjugate rotation."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ._shared import empty_like


class Rotate(Protocol):
    """A function that writes x rotated to out, which may be x."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *, conjugate: bool) -> None: ...


class RotateToNew(Protocol):
    """Return a new tensor, of x rotated."""

    def __call__(self, x: torch.Tensor, *, conjugate: bool) -> torch.Tensor: ...


def in_place(x: torch.Tensor, rotate: Rotate, *, reuse_gradient: bool = False) -> torch.Tensor:
    """Rotate x in place, even if it is a leaf, and return it, with a gradient if one is recorded.

    With `reuse_gradient` the backward pass overwrites the incoming gradient.
    """
    if getattr(x, "requires_grad", False) and torch.is_grad_enabled():
        y: torch.Tensor = _InPlace.apply(x, rotate, reuse_gradient)  # type: ignore[no-untyped-call]
        return y
    rotate(x, x, conjugate=False)
    return x


def contiguous(x: torch.Tensor, rotate: Rotate, conjugate: bool = False) -> torch.Tensor:
    """Return x rotated, in a new contiguous tensor, with a gradient if one is recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        y: torch.Tensor = _Contiguous.apply(x, rotate, conjugate)  # type: ignore[no-untyped-call]
        return y
    out: torch.Tensor = empty_like(x)
    rotate(x, out, conjugate=conjugate)
    return out


def with_gradient(rotate: RotateToNew, x: torch.Tensor) -> torch.Tensor:
    """Return x rotated, of which the gradient is rotated the other way where one is recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        y: torch.Tensor = _New.apply(x, rotate, False)  # type: ignore[no-untyped-call]
        return y
    return rotate(x, conjugate=False)


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rotate: Rotate, reuse_gradient: bool) -> torch.Tensor:
        rotate(x, x, conjugate=False)
        whole = x if x._base is None else x._base
        if not whole.is_leaf:  # autograd refuses to mark a leaf, but the peers write leaves
            ctx.mark_dirty(x)
        ctx.rotate, ctx.reuse_gradient = rotate, reuse_gradient
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if not (ctx.reuse_gradient and gradient.is_contiguous()):
            return contiguous(gradient, ctx.rotate, conjugate=True), None, None
        with torch.no_grad():
            ctx.rotate(gradient, gradient, conjugate=True)
        return gradient, None, None


class _Contiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rotate: Rotate, conjugate: bool) -> torch.Tensor:
        ctx.rotate, ctx.conjugate = rotate, conjugate
        out: torch.Tensor = empty_like(x)
        rotate(x, out, conjugate=conjugate)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return contiguous(gradient, ctx.rotate, not ctx.conjugate), None, None


class _New(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rotate: RotateToNew, conjugate: bool) -> torch.Tensor:
        ctx.rotate, ctx.conjugate, ctx.shape = rotate, conjugate, x.shape
        return rotate(x, conjugate=conjugate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.rotate(gradient, conjugate=not ctx.conjugate).reshape(ctx.shape), None, None
