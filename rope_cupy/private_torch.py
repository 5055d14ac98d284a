"""All that rope_cupy uses of PyTorch's private parts, and what it does where one is missing.

Each was seen in PyTorch 2.11 and 2.13. A part that is missing makes calls slower, or leaves a check
to PyTorch; it makes no result wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.autograd import forward_ad

MAX_PARTS = 64  # that are remembered; this module asks for fewer
MISSING = AttributeError, ImportError, TypeError, RuntimeError  # of a part that has changed


@lru_cache(maxsize=MAX_PARTS)
def found(*path: str) -> Any:
    """Return a private part by the names that lead to it from `torch`, None where it is missing."""
    part: Any = torch
    for name in path:
        part = getattr(part, name, None)
    return part


def modes_and_tangents() -> Callable[[], bool]:
    """Return what tells whether a mode changes or records operations, or tensors have tangents.

    Without it every call is described anew.
    """
    num_modes = found("_C", "_len_torch_dispatch_stack")
    if num_modes is None or found("autograd", "forward_ad", "_current_level") is None:
        return lambda: True
    levels: Any = forward_ad
    return lambda: num_modes() > 0 or levels._current_level >= 0


def is_traced_by_jit() -> bool:
    """Return whether torch.jit.trace records what is done."""
    state = found("_C", "_get_tracing_state")
    jit: Any = torch.jit
    return bool(jit.is_tracing()) if state is None else state() is not None


def is_traced_by_make_fx() -> bool:
    """Return whether make_fx records what is done. Without it such a trace meets fake tensors."""
    mode, keys = found("_C", "_get_dispatch_mode"), found("_C", "_TorchDispatchModeKey")
    return mode is not None and keys is not None and mode(keys.PROXY) is not None


def keys_of(tensor: Any) -> Any:
    """Return what tells a view that is lazily negated, a tensor of inference mode, and so on.

    Without it all of that is asked one by one.
    """
    keys = found("_C", "_dispatch_keys")
    if keys is not None:
        return keys(tensor).raw_repr()
    return tensor.layout, tensor.is_conj(), tensor.is_neg(), tensor.is_inference()


def matcher(tensors: tuple[Any, ...]) -> Callable[..., bool] | None:
    """Return the check of tensors that torch.compile makes before it runs a graph.

    It takes one call and a fifth of the time of attributes, which are compared without it. It takes
    no tensor twice, and ends the process where a tensor is nested.
    """
    guards = found("_C", "_dynamo", "guards", "TensorGuards")
    try:
        check: Callable[..., bool] = guards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        ).check
        return check if check(*tensors) else None
    except MISSING:
        return None


def version_counter() -> Callable[[tuple[Any, ...]], None]:
    """Return what counts the versions of several tensors on. Without it, one after the other."""
    increment = found("_C", "_increment_version")
    try:
        increment(())  # a single tensor is all that an older one takes
        return increment  # type: ignore[no-any-return]
    except MISSING:
        return _count_one_by_one


def _count_one_by_one(tensors: tuple[Any, ...]) -> None:
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def raw_stream() -> Callable[[int], int]:
    """Return what finds the handle of a device's current stream. Without it, by an object."""
    found_stream = found("_C", "_cuda_getCurrentRawStream")
    return found_stream or (lambda device: torch.cuda.current_stream(device).cuda_stream)


def is_wrapped_by_transform(tensor: Any) -> bool:
    """Return whether a transform of torch.func, or is_grads_batched, wraps a tensor.

    Without it such a tensor is refused for want of an address.
    """
    names = "is_gradtrackingtensor", "is_batchedtensor", "is_legacy_batchedtensor"
    asked = [found("_C", "_functorch", name) for name in names]
    return any([each(tensor) for each in asked if each])


def is_functional(tensor: Any) -> bool:
    """Return whether a tensor stands for others in a trace, once no transform wraps it."""
    wrapped = found("_C", "_functorch", "is_functorch_wrapped_tensor")
    return bool(wrapped and wrapped(tensor))


def base_of(tensor: Any) -> Any:
    """Return the tensor that another is a view of, None for no view."""
    return tensor._base


def may_not_be_written(view: Any) -> bool:
    """Return whether autograd lets no one write a view. Without it PyTorch's own error says so."""
    meta = found("_C", "_autograd", "CreationMeta")
    of = found("_C", "_autograd", "_get_creation_meta")
    return bool(meta and of and of(view) != meta.DEFAULT)


def storage_number(tensor: Any) -> int:
    """Return a number that tensors of one storage share, though it has no memory."""
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def run_untraced(function: Any) -> None:
    """Let torch.compile trace nothing of a function that it runs where its graph has a break.

    Without it a graph break makes more graphs.
    """
    frames = found("_C", "_dynamo", "eval_frame")
    try:
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        frames.set_code_exec_strategy(function.__code__, skip)
    except MISSING:
        pass


def is_schema(known: Any, wanted: str) -> bool:
    """Return whether an operator's schema is another one's. Without it all are taken for that."""
    parse = found("_C", "parse_schema")
    return parse is None or known == parse(wanted)


def no_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode changes what is done. Without it modes stay."""
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except MISSING:
        return nullcontext()
    return _disable_current_modes()
