"""Arrays of any library. The modules of this package are the only ones that know libraries.

Each is imported when the first array of its library is seen, so none is imported uninvited.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..memory import cuda_index
from .base import Array, Library, Outline, let_wait, like_dense, memory_order, refusals_of, resized

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

__all__ = ["Array", "Library", "Outline", "let_wait", "like_dense", "memory_order", "resized"]

MAX_TYPES = 256  # of arrays that are known; a program may make any number of them
_LIBRARIES = {  # a type of arrays, in any module of its package, and what knows it
    ("numpy", "ndarray"): ("numpy", "NumPy"),
    ("cupy", "ndarray"): ("cupy", "CuPy"),
    ("torch", "Tensor"): ("torch", "Torch"),
    ("rope_cupy", "Bfloat16"): ("dlpack", "Bfloat16Library"),
    ("rope_cupy", "Outline"): ("base", "OutlineLibrary"),
}
# Why an array that JAX traces is refused.
NO_PROGRAM = "as within jax.pure_callback, because this function cannot be traced by JAX"
NO_CACHES = "because caches are written in place, which cannot be traced by JAX"
# Subclasses may do anything, but for those that are known to be what their base is.
_PLAIN = {("torch", "Parameter"): ("torch", "Tensor")}


def library_of(name: str, array: Any) -> Library:
    """Return the library that an array belongs to."""
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    if library is None and is_traced_by_jax(array):
        refuse_tracer(name, array)
    if library is None:
        raise TypeError(
            f"{name} must be an array of CuPy, PyTorch, NumPy or another DLPack producer, got "
            f"{type(array).__name__}"
        )
    return library


def refuse_tracer(name: str, array: Any, because: str = NO_PROGRAM) -> NoReturn:
    """Refuse an array that JAX traces."""
    raise TypeError(f"{name} must be an array in memory, {because}, got {type(array).__name__}")


def is_traced_by_jax(array: Any) -> bool:
    """Return whether this is a tracer: it stands for an array of a program that JAX traces."""
    return _is_tracer_of_jax(type(array))  # type: ignore[arg-type]


def asked_of(array: Any) -> Library:
    """Return the library that knows about an array, or about what no library calls an array."""
    return _library_of_type(type(array)) or _NONE  # type: ignore[arg-type]


def describe(name: str, array: Any, stream: int | None = None) -> Array:
    """Return an array of any library as rope_cupy sees it: see `Library.describe`."""
    library = library_of(name, array)
    if library.names_refusals or _exact_library(type(array)):  # type: ignore[arg-type]
        return library.describe(name, array, stream)
    with refusals_of(name, array):  # a subclass may do anything
        return library.describe(name, array, stream)


def attributes_and_addresses(arrays: Sequence[Any]) -> tuple[Any, tuple[int, ...]] | None:
    """Return all that `describe` reads of arrays: attributes that can be hashed, and addresses.

    None where one of them must be described every time.
    """
    attributes: list[Any] = []
    addresses: list[int] = []
    libraries = [_exact_library(type(array)) for array in arrays]  # type: ignore[arg-type]
    groups = [(libraries[0], arrays)]
    if {*libraries} != {libraries[0]}:
        groups = [(library, [array]) for library, array in zip(libraries, arrays, strict=True)]
    for library, group in groups:
        at = library.addresses(group) if library else None
        # At 0 lie no elements, or memory that has been given back.
        if library is None or at is None or 0 in at:
            return None
        about = [library.attributes(array) for array in group]
        if None in about:
            return None
        attributes += library, *about
        addresses += at
    return (*attributes,), (*addresses,)


def library_of_all(arrays: Sequence[Any]) -> Library | None:
    """Return the library of the first array, where it is no subclass that may do anything."""
    return _exact_library(type(arrays[0]))  # type: ignore[arg-type]


def empty_like(name: str, array: Any) -> Any:
    """Return a new array like one of any library: see `Library.empty_like`.

    It is the first output of a call that writes caches.
    """
    if is_traced_by_jax(array):
        refuse_tracer(name, array, NO_CACHES)
    library = library_of(name, array)
    if not (_exact_library(type(array)) or library.may_lack_memory):  # type: ignore[arg-type]
        describe(name, array)  # refuses what cannot be read
    return library.empty_like(array)


def shape_of(name: str, array: Any) -> tuple[int, ...]:
    """Return the shape of an array of any library, or of one that is only traced."""
    try:
        shape = getattr(array, "shape", None)
    except RuntimeError:  # of a nested tensor, which is refused by its name
        shape = None
    return describe(name, array).spec.shape if shape is None else tuple(shape)


def computed(
    function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
) -> tuple[Any, ...]:
    """Compute with NumPy arrays where `like` lies, for its library: see `Library.computed`."""
    if is_traced_by_jax(like):  # its program takes them as constants
        return function(np, *arrays)
    return describe("like", like).library.computed(function, arrays, like)


def in_float64_beside(array: Any, like: Any) -> Any:
    """Return an array in float64 if it is on the GPU of `like` and of its library, or else None."""
    there, other = describe("angles", array), describe("like", like)
    apart = there.spec.device != other.spec.device or type(there.library) is not type(other.library)
    return None if apart or there.spec.device == "cpu" else there.library.in_float64(array)


def placed(array: NDArray[Any], like: Any) -> Any:
    """Return a NumPy array where `like` lies, as an array of its library."""
    (there,) = computed(lambda _, array: (array,), (array,), like)
    return there


def stream_of(array: Array) -> int | None:
    """Return the current stream of the library that owns the array, None on the CPU."""
    device = array.spec.device
    return None if device == "cpu" else array.library.stream(cuda_index(device))


def check_gradient(name: str, array: Any) -> None:
    """Refuse an array whose gradient would be lost silently."""
    if asked_of(array).wants_gradient(array):
        raise ValueError(
            f"{name} must not require a gradient, which is not recorded here: use torch.no_grad() "
            "or a detached tensor, got requires_grad=True"
        )


def records_gradients() -> bool:
    """Return whether a library may record what is done now. PyTorch alone does."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_grad_enabled()


def is_compiling(array: Any) -> bool:
    """Return whether this is not run, but traced by torch.compile or torch.export.

    It is traced itself, and so asks not for sys.modules: PyTorch 2.11 would walk through them all.
    """
    if not hasattr(array, "requires_grad"):  # no tensor of PyTorch, which may not be there
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.compiler.is_compiling()


@lru_cache(maxsize=MAX_TYPES)
def is_kind_of_array(kind: type) -> bool:
    """Return whether values of this type are arrays of any library, or stand for such."""
    return _library_of_type(kind) is not None or _is_tracer_of_jax(kind)


@lru_cache(maxsize=MAX_TYPES)
def _library_of_type(kind: type) -> Library | None:
    for base in kind.__mro__:
        if _full_name(base) in _LIBRARIES:
            return _library(*_LIBRARIES[_full_name(base)])
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _library("dlpack", "DLPack")
    return None


@lru_cache(maxsize=MAX_TYPES)
def _exact_library(kind: type) -> Library | None:
    """Return the library whose own type this is."""
    name = _full_name(kind)
    known = _LIBRARIES.get(_PLAIN.get(name, name))
    return _library(*known) if known else None


@lru_cache(maxsize=len(_LIBRARIES) + 1)
def _library(module: str, name: str) -> Library:
    known: type[Library] = getattr(import_module(f"{__name__}.{module}"), name)
    return known()


def _full_name(kind: type) -> tuple[str, str]:
    """Return the package of a type, which may lie in any module of it, and the type's name."""
    return str(kind.__module__).partition(".")[0], kind.__qualname__


@lru_cache(maxsize=MAX_TYPES)
def _is_tracer_of_jax(kind: type) -> bool:
    return any(_full_name(base) == ("jax", "Tracer") for base in kind.__mro__)


_NONE = Library()
