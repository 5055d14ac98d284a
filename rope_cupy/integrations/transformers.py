"""Switch the models of transformers to rope_cupy, and back.

    from rope_cupy.integrations.transformers import disable, enable

    print(enable(model))
    disable(model)

No model is known by name. `enable` runs the rotary functions that a model's methods call on a few
numbers. It replaces each by the call of rope_cupy that gives the same results, in any layout, also
where only a part of a head is rotated. Where modules of the attention normalise q and k before the
rotation, the norm and the rotation become one call.

Only the given model is switched. All models of a class call their rotary function by the same
global name of a module, so that name must not change. Instead a switched module gets a subclass of
its class, with the same name, as torch.nn.utils.parametrize and FSDP do. In this subclass the
methods are compiled again from their source, with another global name for the rotary function,
which the module gets beside its own. torch.compile traces these methods, and copies and replicas
keep them. A pickle has the original class and the options; a program that loads it probes the
functions again. Weights are read at each call. `disable` gives every module its class back.

The model's own function is still called in some cases. The report names functions that the probe
does not recognise. The logger "rope_cupy" reports, at the level DEBUG, calls with arguments that
the probe has not covered, such as other layouts or dtypes, tensor subclasses, and tensors within
torch.func.vmap. A step of one token in a compiled graph is left to the compiler, which makes norms
and rotation a part of kernels that it launches anyway. A norm that has hooks, has been replaced, is
not followed by the rotation, stands in a `with` block, or whose value or input is written into is
called as the model calls it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch

from ..choices import ROUNDINGS, Rounding
from ._transformers_classes import Recipe, Switched, full_name, plan_of, switched_class
from ._transformers_norms import NormKind, probe_norm

__all__ = ["Report", "disable", "enable"]


class Report(NamedTuple):
    """What `enable` has switched, what it has left to the model, and why.

    Attributes:
        functions: the rotary functions that are replaced, and the form of each.
        modules: the methods that call them, and in how many modules.
        norms: the norms that are one call with the rotation, and in how many modules.
        left: the functions, methods and norms that are left to the model, and why.
    """

    functions: dict[str, str]
    modules: dict[str, int]
    norms: dict[str, int]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name}: {form}" for name, form in self.functions.items()]
        lines += [f"{name}: switched in {count} modules" for name, count in self.modules.items()]
        lines += [f"{name}: one call with the rotation" for name in self.norms]
        lines += [f"{name}: left to the model, because {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no rotary function"


def enable(
    model: torch.nn.Module, norm: bool = True, rounding: Rounding = "once", strict: bool = True
) -> Report:
    """Switch the rotary embeddings of a model to rope_cupy, in place, and report what was switched.

    Gradients of inputs and weights, gradient checkpointing, autocast, generate() with its caches,
    torch.compile with fullgraph=True, copy.deepcopy, pickle and torch.save work as before. A copy
    of an enabled model is enabled. Within autocast, where cosines are float32, q and k are returned
    in autocast's dtype, in which attention takes them.

    Args:
        model: a model of transformers, a part of one, or any torch.nn.Module that calls rotary
            functions in the same way. An enabled model is switched again, with these options.
        norm: whether RMSNorms of q and k before the rotation become one call with it.
        rounding: "once" rounds at the end of a call. "eager" rounds where the operations of the
            model do. With ``norm=False`` its results have the model's bits; with norms they do too,
            except for elements that depend on the order of a float32 sum. A function whose bits
            "eager" does not give is left to the model.
        strict: whether to raise if no rotary function of the model can be replaced, instead of
            returning a report that says so. If some functions are replaced, others that are left
            to the model are no error. The report names them.

    Returns:
        a `Report`, which prints as a few lines.

    Raises:
        TypeError, ValueError: the message says what was wanted and what came. The model has not
            changed.
    """
    _check(model)
    if not isinstance(norm, bool) or not isinstance(strict, bool):
        raise TypeError(f"norm and strict must be True or False, got {norm!r} and {strict!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f'rounding must be "once" or "eager", got {rounding!r}')
    report = Report({}, {}, {}, {})
    switches = []
    for module in model.modules():
        kinds = _switch(module, norm, rounding, report)
        if kinds is not None:
            recipe = Recipe(_original(module), rounding, tuple(kinds.items()))
            switches.append((module, recipe))
    if strict and not switches:
        raise ValueError(
            "model must have a rotary function that can be replaced (or strict=False), got "
            f"{report.left or 'none at all'}"
        )
    classes = [(module, switched_class(recipe)) for module, recipe in switches]  # may raise
    disable(model)
    for module, cls in classes:
        _set_class(module, cls)
    return report


def disable(model: torch.nn.Module) -> None:
    """Restore the rotary embeddings and norms of a model. Modules that are not enabled are kept.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: something has since changed the class of an enabled module. Nothing was changed.
    """
    _check(model)
    enabled = [module for module in model.modules() if isinstance(module, Switched)]
    for module in enabled:
        if "_rope_cupy" not in vars(type(module)):
            raise ValueError(
                "model must have the classes that enable gave its modules, got a subclass of one, "
                f"{type(module).__name__}, which must be undone before"
            )
    for module in enabled:
        _set_class(module, _original(module))


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _original(module: Any) -> type[torch.nn.Module]:
    cls: type[torch.nn.Module] = type(module)
    return module._rope_cupy.original if isinstance(module, Switched) else cls


def _switch(module: Any, norm: bool, rounding: str, report: Report) -> dict[str, NormKind] | None:
    """Return the norms that a module's methods will defer, or None if nothing is switched."""
    cls, kinds = _original(module), dict[str, NormKind]()
    plan = plan_of(cls, rounding)
    report.left.update(plan.left)
    for name in plan.methods:
        if not _calls_its_class(module, name):
            report.left[f"{cls.__name__}.{name}"] = "a module has a method of its own in its place"
            return None
    for name, switch in plan.methods.items():
        _count(report.modules, f"{cls.__name__}.{name}")
        for probed in switch.probed.values():
            report.functions[full_name(probed.original)] = str(probed.form)
        for attribute in switch.rewrite.norms if norm else ():
            kind = probe_norm(getattr(module, attribute, None), rounding)
            if isinstance(kind, NormKind):
                kinds[attribute] = kind
                _count(report.norms, f"{cls.__name__}.{attribute}")
            elif kind:
                report.left[f"{cls.__name__}.{attribute}"] = kind
    return kinds if plan.methods else None


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _calls_its_class(module: Any, name: str) -> bool:
    """Return whether a module calls this method of its class, also by a hook that wraps it."""
    method = getattr(type(module), name)
    bound = [each.__func__ for each in vars(module).values() if isinstance(each, MethodType)]
    return name not in vars(module) or method in bound


def _set_class(module: Any, cls: type) -> None:
    """Change the class of a module, and of the bound methods that hooks have stored in it."""
    before = type(module)
    module.__class__ = cls
    for name, each in list(vars(module).items()):
        if isinstance(each, MethodType) and each.__self__ is module:
            if getattr(before, each.__name__, None) is each.__func__:
                vars(module)[name] = MethodType(getattr(cls, each.__name__), module)
