"""Classes of modules whose methods call rope_cupy, each a subclass of a model's own class."""

from __future__ import annotations

import copyreg
import inspect
import re
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch

from ._transformers_calls import stand_in
from ._transformers_forms import Probed, parameters_of, probe
from ._transformers_norms import NormKind, deferring, value
from ._transformers_source import Rewrite, global_names, read, rewritten

MAX_CLASSES = 512  # of modules that are remembered
ROTARY_NAME = re.compile(r"apply.*(rotary|rope)")  # of functions that the report should name


class Recipe(NamedTuple):
    """What a class is switched by; it can be pickled."""

    original: type[torch.nn.Module]
    rounding: str
    norms: tuple[tuple[str, NormKind], ...]  # that methods defer


class RotaryCall(NamedTuple):
    """A global function that a method of a class calls."""

    method: Any
    name: str  # of the method
    is_reached: bool  # by this name, from a module of the class
    called: str  # the name that the method calls the function by
    function: Callable[..., Any]


class MethodSwitch(NamedTuple):
    """What is replaced in a method of a class."""

    rewrite: Rewrite
    probed: dict[str, Probed]  # by the names that the method calls the functions by


class ClassPlan(NamedTuple):
    """What can be switched in a class of modules, and what cannot, and why."""

    methods: dict[str, MethodSwitch]
    left: dict[str, str]


class Switched:
    """The base of the classes of modules that are switched, beside the original class."""

    _rope_cupy: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        made = cast(Any, super().__reduce_ex__(protocol))
        if made[0] is not vars(copyreg)["__newobj__"]:
            return made
        return _made_again, tuple(self._rope_cupy), *made[2:]


def _made_again(*recipe: Any) -> torch.nn.Module:
    """Return a module of a switched class, without its state, for pickle and deepcopy."""
    cls: Any = switched_class(Recipe(*recipe))
    return cls.__new__(cls)  # type: ignore[no-any-return]


def full_name(function: Any) -> str:
    """Return the name of a function, or of the type of something else, with its module's.

    A module that a function has been made has the function's.
    """
    if isinstance(function, torch.nn.Module) and isinstance(function.forward, MethodType):
        within = inspect.getclosurevars(function.forward).nonlocals.values()
        function = next((each for each in within if isinstance(each, FunctionType)), function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def plan_of(cls: type[torch.nn.Module], rounding: str) -> ClassPlan:
    """Return what can be switched in a class, by the functions that its module has now."""
    return _plan_of(cast(Hashable, cls), rounding, tuple(_rotary_calls(cls)))


def switched_class(recipe: Recipe) -> type[torch.nn.Module]:
    """Return the subclass of a class whose methods call rope_cupy; without any, the class."""
    cls = _switched_class(recipe, tuple(_rotary_calls(recipe.original)))
    return cast(type[torch.nn.Module], cls)


def _rotary_calls(cls: type) -> Iterator[RotaryCall]:
    for base in cls.__mro__[: cls.__mro__.index(torch.nn.Module)]:
        for name, method in vars(base).items():
            if not isinstance(method, FunctionType):
                continue
            is_reached = getattr(cls, name, None) is method
            for called, function in global_names(method).items():
                if _is_rotary(called, function):
                    yield RotaryCall(method, name, is_reached, called, function)


def _is_rotary(name: str, each: Any) -> bool:
    if not isinstance(each, Hashable) or not callable(each) or isinstance(each, type):
        return False
    return parameters_of(each) is not None or ROTARY_NAME.search(name) is not None


@lru_cache(MAX_CLASSES)
def _plan_of(cls: Any, rounding: str, calls: tuple[RotaryCall, ...]) -> ClassPlan:
    plan, known = ClassPlan({}, {}), dict[Any, dict[str, Probed]]()
    for call in calls:
        probed = probe(call.function)
        if probed is None:
            plan.left[full_name(call.function)] = "no form of rope_cupy's calls gives its results"
        elif rounding == "eager" and probed.float32_table is None:
            plan.left[full_name(call.function)] = 'rounding="eager" does not give its bits'
        else:
            known.setdefault(call.method, {})[call.called] = probed
    for method, name in dict.fromkeys((c.method, c.name) for c in calls if c.is_reached):
        rewrite = read(method, frozenset(known[method])) if method in known else ""
        if isinstance(rewrite, Rewrite):
            plan.methods[name] = MethodSwitch(rewrite, known[method])
        elif rewrite:
            plan.left[full_name(method)] = rewrite
    for call in calls:
        if call.method in known and not call.is_reached and call.name not in plan.methods:
            plan.left[full_name(call.method)] = "a subclass overrides it"
    return plan


@lru_cache(MAX_CLASSES)
def _switched_class(recipe: Recipe, calls: tuple[RotaryCall, ...]) -> Any:
    cls: Any = recipe.original
    plan = _plan_of(cls, recipe.rounding, calls)
    if not plan.methods:
        return cls
    body: dict[str, Any] = {"_rope_cupy": recipe}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    kinds = dict(recipe.norms)
    defer = deferring(kinds)
    for name, switch in plan.methods.items():
        stand_ins = {
            called: stand_in(probed, recipe.rounding) for called, probed in switch.probed.items()
        }
        norms = tuple(norm for norm in switch.rewrite.norms if norm in kinds)
        body[name] = rewritten(switch.rewrite, stand_ins, norms, defer, value)
    return type(cls)(cls.__name__, (Switched, cls), body)
