"""Models of transformers, switched to rope_cupy and back: `enable(model)` and `disable(model)`.

    from rope_cupy.integrations import transformers as rope

    print(rope.enable(model))
    rope.disable(model)

No model is known by name. The rotary functions that the methods of a model call are run on a few
numbers, and each is replaced by the form of rope_cupy's calls that gives the same results, in any
layout and for a part of a head too. Where norms of q and k stand before it, as modules of the
attention, the method hands over what they would be given, and norm and rotation are one call.

How one model is switched, and no other of its class: a method calls its rotary function by a global
name of its module, which all models share. So a module that is switched gets a subclass of its
class (as torch.nn.utils.parametrize and FSDP give it one), of the same name, in which these methods
are compiled again from their source, with the rotary function as a free variable. Nothing global is
changed. Methods of a class are what torch.compile traces and what copies and replicas keep. Pickle
keeps the original class and the options; where it is loaded, the functions are probed anew. Weights
are read when a call is made. `disable` gives every module its class back.

What is not recognised calls the original: a function that the probe does not find, which the report
names, and when a call is made all arguments that the probe has not covered, such as those of other
layouts or dtypes, tensor subclasses, and tensors within torch.func.vmap: the logger "rope_cupy"
names them at the level DEBUG. So does, in a graph that is compiled, a step of one token: there the
compiler makes norms and rotation a part of kernels that it launches anyway. A norm that is not
followed by the rotation, has hooks or has been replaced is called as the model calls it.
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
    """What `enable` has switched, and what it has left to the model, and why."""

    functions: dict[str, str]  # rotary functions that are replaced, and their form
    modules: dict[str, int]  # methods that call these, and of how many modules
    norms: dict[str, int]  # norms that are one call with the rotation, and of how many modules
    left: dict[str, str]  # functions, methods and norms that are the model's own, and why

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
    torch.compile with fullgraph=True, copy.deepcopy, pickle and torch.save go on as before, and a
    copy of an enabled model is enabled. Within autocast, where cosines are float32, q and k come
    back in autocast's dtype, in which attention takes them.

    Args:
        model: a model of transformers, a part of one, or any torch.nn.Module that calls rotary
            functions as they do. A model that is enabled is switched anew, by these options.
        norm: whether RMSNorms of q and k that stand before the rotation are one call with it.
        rounding: "once", at the end of a call, or "eager", where the operations of the model round:
            with ``norm=False`` the results have the model's bits, and with norms all but those of
            elements that the order of a float32 sum decides. A function whose bits "eager" does not
            give is left to the model.
        strict: whether to raise where no rotary function of the model can be replaced, instead of
            returning a report that says so. What is left to the model beside functions that are
            replaced is no error in either case: the report names it, and it computes what it did.

    Returns:
        a `Report`, which prints as a few lines.

    Raises:
        TypeError, ValueError: say what was wanted and what came; the model is as it was then.
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
    disable(model)
    for module, recipe in switches:
        _set_class(module, switched_class(recipe))
    return report


def disable(model: torch.nn.Module) -> None:
    """Give a model its own rotary embeddings and norms back; others than enabled ones keep theirs.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: something has changed the class of an enabled module since. Nothing is changed.
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
    """Return the norms that a module's methods are to defer, None where nothing is switched."""
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
    """Whether a module has no method in place of its class's, or a hook that calls that one."""
    method = getattr(type(module), name)
    bound = [each.__func__ for each in vars(module).values() if isinstance(each, MethodType)]
    return name not in vars(module) or method in bound


def _set_class(module: Any, cls: type) -> None:
    """Change the class of a module, and that of its methods which hooks have kept in it."""
    before = type(module)
    module.__class__ = cls
    for name, each in list(vars(module).items()):
        if isinstance(each, MethodType) and each.__self__ is module:
            if getattr(before, each.__name__, None) is each.__func__:
                vars(module)[name] = MethodType(getattr(cls, each.__name__), module)
