"""Norms that stand before a rotation: a value that is not computed until it is asked for.

Within a method that has been compiled again, the norm of q or k gives a `Deferred`. The rotation
takes what the norm was given, and its weight, and makes one call of both. Wherever else the method
uses the value, it asks for that of the model's own module: no `Deferred` leaves the method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.modules import module as hooks

from rope_cupy import RotaryTable, apply_norm_rotary

EPS_NAMES = "variance_epsilon", "eps", "norm_eps", "epsilon"
TENSORS = torch.Tensor, torch.nn.Parameter  # a subclass may mean something else by an operation
WIDTH, ROWS = 16, 64  # of a probe
TOLERANCE = 1e-5  # of float32 numbers near 1
MOST_ASTRAY = 0.01  # of a probe's elements, by the order in which squares are added
Value = TypeVar("Value")


def constant(value: Value) -> Callable[[], Value]:
    """Return a function that returns a value which never changes.

    A compiled graph asks before every run whether all is as it was traced: each attribute, closure
    and item that was read. Of what comes from this function it does not ask.
    """

    def get() -> Value:
        return value

    return torch.compiler.assume_constant_result(get)  # type: ignore[no-any-return, no-untyped-call]


class About(NamedTuple):
    """What a graph is traced for of a tensor; of anything else its type."""

    type: type
    ndim: int = 0
    dtype: Any = None
    device: Any = None
    requires_grad: bool = False


def about(x: Any) -> tuple[Any, ...]:
    """Return the fields of About."""
    if isinstance(x, torch.Tensor):
        return type(x), x.ndim, x.dtype, x.device, x.requires_grad
    return (type(x),)


class NormKind(NamedTuple):
    """How rope_cupy says what a norm's module does."""

    module: type[torch.nn.Module]
    eps_name: str
    has_weight: bool
    weight_offset: float
    round_norm: bool | str  # with rounding="eager"; None where it does not give the module's bits
    keeps_dtype: bool  # the result has the dtype of x, whatever that of the weight


def probe_norm(module: Any, rounding: str) -> NormKind | str:
    """Return the kind of a norm's module, or why it is none that can be deferred.

    What is probed is a copy of the module with a weight of its own: the model's own weight is not
    read, so it may be on any device, or nowhere yet.
    """
    eps_name = next((name for name in EPS_NAMES if hasattr(module, name)), None)
    if not isinstance(module, torch.nn.Module) or eps_name is None:
        return ""  # no norm at all, such as a projection
    if type(getattr(module, eps_name)) is not float:
        return "its eps is no float"
    weight, others = getattr(module, "weight", None), dict(module.named_parameters())
    others.pop("weight", None)
    if others or (weight is not None and getattr(weight, "ndim", 0) != 1):
        return "it is no RMSNorm"
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(ROWS + 1, WIDTH, generator=generator, device="cpu", dtype=torch.float32)
    sizes = torch.logspace(-4, 1, ROWS, device="cpu", dtype=torch.float32)  # eps matters to some
    x, weights = numbers[:ROWS] * sizes[:, None], None if weight is None else numbers[ROWS]
    for offset in (0.0,) if weight is None else (0.0, 1.0):
        kind = NormKind(type(module), eps_name, weight is not None, offset, True, False)
        if not _agrees(module, kind, x, weights):
            continue
        half, half_weights = x.bfloat16(), None if weights is None else weights.bfloat16()
        mixed = _result(module, half, weights)
        kind = kind._replace(keeps_dtype=mixed is not None and mixed.dtype == half.dtype)
        if rounding != "eager":  # one rounding in all, at the store
            return kind._replace(round_norm=False)
        for round_norm in ("before_weight", True):
            kind = kind._replace(round_norm=round_norm)
            if _agrees(module, kind, half, half_weights, MOST_ASTRAY):
                return kind
        return 'it rounds in a way that rounding="eager" does not have'
    return "it is no RMSNorm"


def _agrees(
    module: torch.nn.Module, kind: NormKind, x: Any, weight: Any, astray: float | None = None
) -> bool:
    """Whether a kind gives a module's results: within rounding, or all bits but a share."""
    wanted = _result(module, x, weight)
    if wanted is None or wanted.shape != x.shape:
        return False
    cos = torch.ones(1, 1, dtype=x.dtype, device="cpu")
    table = RotaryTable(cos.expand(len(x), 1), 0 * cos.expand(len(x), 1))
    options: dict[str, Any] = options_of(module, kind, "head")
    options |= {"rounding": "eager", "layout": "shd"}
    found: torch.Tensor = apply_norm_rotary(x[:, None], weight, table, **options)[:, 0]
    if astray is None:
        return bool(torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE))
    astray_ones = int((found != wanted).sum())
    return bool(wanted.dtype == x.dtype and astray_ones <= astray * x.numel())


def _result(module: torch.nn.Module, x: Any, weight: Any) -> torch.Tensor | None:
    """Return what a copy of a module with this weight gives, None where it refuses."""
    probed = copy.copy(module)
    own = dict(module._parameters)
    if weight is not None:
        own["weight"] = torch.nn.Parameter(weight)
    probed.__dict__ |= {"_parameters": own}
    if isinstance(getattr(module, "normalized_shape", None), tuple):  # of PyTorch's RMSNorm
        probed.__dict__["normalized_shape"] = (WIDTH,)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            result = type(module).forward(probed, x)
    except Exception:  # of the model's code: any error says that it takes no such arguments
        return None
    return result if isinstance(result, torch.Tensor) else None


def options_of(module: Any, kind: NormKind, norm: str) -> dict[str, Any]:
    """Return the options of a call of rope_cupy, as the module has them now."""
    eps = getattr(module, kind.eps_name)
    return {
        "eps": eps,
        "norm": norm,
        "weight_offset": kind.weight_offset,
        "round_norm": kind.round_norm,
    }


def deferring(kinds: dict[str, NormKind]) -> Callable[[Any, str, Any], Any]:
    """Return what defers the norms of a module that are of these kinds."""
    known = constant(kinds)

    def defer(owner: Any, name: str, x: Any) -> Deferred:
        return Deferred(getattr(owner, name), known()[name], x, x, (), [])

    return defer


def _is_as_probed(norm: Any, kind: NormKind) -> bool:
    """Whether a norm's module is what `enable` has seen, and nothing is attached to it."""
    return type(norm) is kind.module and not _has_hooks(norm) and "forward" not in norm.__dict__


def _has_hooks(norm: Any) -> bool:
    return bool(
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def is_plain(kind: type) -> bool:
    """Whether a type is that of tensors, or of what stands for them in a graph."""
    if kind in TENSORS:
        return True
    return issubclass(kind, torch.Tensor) and kind.__module__.startswith("torch._subclasses.")


def value(x: Any) -> Any:
    """Return a tensor, that of the model's own norm where it was deferred."""
    return x.value() if isinstance(x, Deferred) else x


class Deferred:
    """The value of a norm that has not been computed, and the views that were made of it.

    Once someone has asked for it, it is a tensor, into which they may have written: from then on
    the rotation and all views take that.
    """

    def __init__(
        self, norm: Any, kind: NormKind, source: Any, x: Any, views: Any, made: list[Any]
    ) -> None:
        self.norm, self.kind, self.source, self.x, self.views = norm, kind, source, x, views
        self.made = made  # what the norm has given, if it was asked; one list for all views
        self.result: Any = None

    def value(self) -> Any:
        """Return the value, by the model's own module."""
        if self.result is None:
            if not self.made:
                self.made.append(self.norm(self.source))
            self.result = self.made[0]
            for name, arguments in self.views:
                self.result = getattr(self.result, name)(*arguments)
        return self.result

    def _viewed(self, name: str, arguments: tuple[Any, ...], x: Any) -> Any:
        views = (*self.views, (name, arguments))
        return Deferred(self.norm, self.kind, self.source, x, views, self.made)

    def view(self, *shape: Any, **named: Any) -> Any:
        """Return a view in which each row that is normalised is a row still, or is split."""
        return self._shaped("view", shape, named)

    def reshape(self, *shape: Any, **named: Any) -> Any:
        """Return a view, as `view`."""
        return self._shaped("reshape", shape, named)

    def _shaped(self, name: str, shape: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not named and not self.made:
            x = getattr(self.x, name)(*shape)
            if x.shape[-1] == self.x.shape[-1] or x.shape[:-2] == self.x.shape[:-1]:
                return self._viewed(name, shape, x)
        return getattr(self.value(), name)(*shape, **named)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Return a view with other axes than the last exchanged."""
        last = self.x.ndim - 1
        if self.made or dim0 % self.x.ndim == last or dim1 % self.x.ndim == last:
            return self.value().transpose(dim0, dim1)
        return self._viewed("transpose", (dim0, dim1), self.x.transpose(dim0, dim1))

    @property
    def shape(self) -> Any:
        """The shape of the value."""
        return self.x.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the value."""
        return self.x.ndim  # type: ignore[no-any-return]

    @property
    def device(self) -> Any:
        """The device of the value."""
        return self.x.device

    def size(self, dim: int | None = None) -> Any:
        """Return the shape of the value, or the size of an axis."""
        return self.x.size() if dim is None else self.x.size(dim)

    def dim(self) -> int:
        """Return the number of axes of the value."""
        return self.x.dim()  # type: ignore[no-any-return]


def fused_options(deferred: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]] | None:
    """Return the weights and options of one call that normalises and rotates, or None."""
    weights, all_options = [], []
    for each in deferred:
        norm, kind, rows = each.norm, each.kind, each.source.shape[-1]
        if each.made or not _is_as_probed(norm, kind):
            return None
        weight = norm.weight if kind.has_weight else None
        if weight is not None:
            if not _fits(kind.keeps_dtype, about(each.x), about(weight)):
                return None
            if weight.shape[0] != rows:
                return None
        options = options_of(norm, kind, "head" if rows == each.x.shape[-1] else "heads")
        if type(options["eps"]) is not float:
            return None
        weights.append(weight)
        all_options.append(options)
    if any([options != all_options[0] for options in all_options]):
        return None
    return weights, all_options[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fits(keeps_dtype: bool, of_x: tuple[Any, ...], of_weight: tuple[Any, ...]) -> bool:
    """Whether a weight is one that a call takes, and the result has the dtype of x."""
    x, weight = About(*of_x), About(*of_weight)
    if not is_plain(weight.type) or weight.ndim != 1 or weight.device != x.device:
        return False
    return keeps_dtype or not promotes(x, weight)


def promotes(x: About, other: About) -> bool:
    """Return whether an operation of two tensors gives another dtype than x's, which matters.

    Within autocast it does not: what takes the result makes it of autocast's dtype again.
    """
    if torch.promote_types(x.dtype, other.dtype) == x.dtype:
        return False
    device_type = x.device.type
    return not (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == x.dtype
    )
