"""StandIn: takes the place of an attention processor, and asks it where it knows no better."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ._diffusers_prologue import Norms, UnknownCallError, norms_of, why_norm_is_unknown

logger = logging.getLogger(__name__)

_classes: dict[tuple[type[Any], type[Any]], type[StandIn]] = {}  # as many as are known


class StandIn:
    """A processor in the place of another one, its original.

    `attend` computes what the original does, by the same parameters, or raises UnknownCallError
    before it has changed anything. It reads weights of the attention when it is called. Attributes
    other than its own are the original's: reading and setting one goes there.
    """

    original: Any
    stands_for: ClassVar[type]
    norms: ClassVar[tuple[str, ...]] = ()  # attributes of the attention, in pairs of q and k
    says_cross: ClassVar[bool] = True  # cross-attention says of itself that it is
    cross: ClassVar[tuple[str, ...]] = ()  # names of cross-attention that does not say so

    def __init__(self, original: Any = None) -> None:
        # Loaders of diffusers make a new processor of the class of one that they take off.
        self.__dict__["original"] = type(self).stands_for() if original is None else original

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original would, or raise UnknownCallError."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return stand_in_of, (type(self).__mro__[1], self.original)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} in place of {self.original!r}>"

    def check_call(self, x: torch.Tensor) -> None:
        """Leave to the original what is unlike an ordinary call on the hidden states x."""
        if type(x) is not torch.Tensor or x.device.type not in ("cpu", "cuda"):
            raise UnknownCallError("its tokens are no plain tensor of the CPU or of CUDA")
        if getattr(self.original, "_parallel_config", None) is not None:
            raise UnknownCallError("its sequence is shared by several processes")
        if torch.is_autocast_enabled(x.device.type):
            raise UnknownCallError("autocast is on")
        if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():  # type: ignore[no-untyped-call, attr-defined]
            raise UnknownCallError("it is exported")

    def norms_in(
        self, attn: Any, dtype: torch.dtype | None, q_name: str = "norm_q", k_name: str = "norm_k"
    ) -> Norms | None:
        """Return the norms that an attention has by these names, for q and k of a dtype."""
        return norms_of(getattr(attn, q_name, None), getattr(attn, k_name, None), dtype)

    def dispatch(self, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> torch.Tensor:
        """Return the attention of (b, s, heads, d), as diffusers computes it, with heads joined."""
        if hasattr(self.stands_for, "_attention_backend"):
            options["backend"] = self.original._attention_backend
            options["parallel_config"] = self.original._parallel_config
        return dispatch_attention_fn(q, k, v, attn_mask=mask, **options).flatten(2, 3).to(q.dtype)


def stand_in_of(kind: type[StandIn], original: Any) -> StandIn:
    """Return a stand-in of a kind for a processor."""
    return class_of(kind, type(original))(original)


def class_of(kind: type[StandIn], stands_for: type) -> type[StandIn]:
    """Return the class of a kind's stand-ins for one class of processors, with their signature."""
    known = _classes.get((kind, stands_for))
    if known is not None:
        return known
    names = frozenset([name for name, *_ in parameters_of(kind.attend)])

    def __call__(self: StandIn, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if not names.issuperset(kwargs):
            return self.original(*args, **kwargs)
        try:
            return self.attend(*args, **kwargs)
        except UnknownCallError as unknown:
            if not torch.compiler.is_compiling():
                logger.debug("left to %s: %s", stands_for.__name__, unknown)
        return self.original(*args, **kwargs)

    __call__.__signature__ = inspect.signature(stands_for.__call__)  # type: ignore[attr-defined]
    name = f"RopeCupy{stands_for.__name__}"
    made = type(name, (kind,), {"__call__": __call__, "stands_for": stands_for})
    _let_layers_be_skipped(made, stands_for)
    _classes[kind, stands_for] = made
    return made


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Return the names, kinds and defaults of a function's parameters, but the first."""
    _, *parameters = inspect.signature(function).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters]


def why_left(kind: type[StandIn], original: Any, attn: Any, name: str) -> str:
    """Return why an attention of a name keeps its processor, or nothing where it need not.

    What can change from call to call is asked at every call.
    """
    if parameters_of(type(original).__call__) != parameters_of(kind.attend):
        return "its parameters are not those that are known"
    says_cross = kind.says_cross and getattr(attn, "is_cross_attention", False)
    if says_cross or name in kind.cross:
        return "it is cross-attention, which rotates nothing"
    pairs = [
        (getattr(attn, q_name, None), getattr(attn, k_name, None))
        for q_name, k_name in zip(kind.norms[::2], kind.norms[1::2], strict=True)
    ]
    reasons = [
        why_norm_is_unknown(module) for pair in pairs if pair != (None, None) for module in pair
    ]
    return next(filter(None, reasons), "")


def _let_layers_be_skipped(made: type[StandIn], stands_for: type) -> None:
    """Tell the hooks of diffusers that skip layers what they know of the original's class."""
    try:
        from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

        Registry.register(made, Registry.get(stands_for))
    except (ImportError, AttributeError, ValueError):  # nothing is known of it
        return
