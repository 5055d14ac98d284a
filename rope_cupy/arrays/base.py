"""What rope_cupy asks of an array library, and what it then knows of an array."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..environment import cupy, explained
from ..memory import ArraySpec, array_spec

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

LEGACY = 1  # the default stream's own handle, for which libraries also say 0


class Array(NamedTuple):
    """An array of any library: what it is, where it is, and what keeps it there."""

    spec: ArraySpec
    pointer: int
    library: Library
    owner: Any


class Library:
    """What rope_cupy asks of an array library. What answers here is true of most of them."""

    may_lack_memory = False  # arrays may stand for those of a graph, or of several processes
    names_refusals = False  # whether `describe` names the argument whatever an array may raise

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Return the array as rope_cupy sees it. `name` is what the caller calls it.

        The work on it comes on `stream`; None is this library's current one. A producer of DLPack
        sees to it that the array is ready there; for others `let_wait` does.
        """
        raise NotImplementedError

    def attributes(self, array: Any) -> Any:
        """Return all that `describe` reads of an array but its address, unread.

        Where these are equal, and the alignment of the address is, descriptions are equal. None for
        an array that must be described every time.
        """
        return None

    def addresses(self, arrays: Sequence[Any]) -> tuple[int, ...] | None:
        """Return the addresses of arrays, None if one of them must be described every time.

        Arrays of another library are such, unless `attributes` tells of both.
        """
        return None

    def matcher(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        """Return what tells whether arrays have the attributes that these have now, or None.

        It may only be asked of arrays that have `addresses`.
        """
        return None

    def requires_grad(self, array: Any) -> bool:
        """Return whether the library wants a gradient of the array where it records any."""
        return False

    def wants_gradient(self, array: Any) -> bool:
        """Return whether the library now records operations for a gradient of the array."""
        return False

    def is_distributed(self, array: Any) -> bool:
        """Return whether each of several processes has a part of the array."""
        return False

    def is_traced(self, array: Any) -> bool:
        """Return whether the array stands for one of a graph to come, and has no memory yet."""
        return False

    def is_beside_real(self, array: Any) -> bool:
        """Return whether the trace of a traced array takes arrays in memory for constants."""
        return False

    def check_transform(self, name: str, array: Any) -> None:
        """Refuse an array that stands for others, by a transform of functions."""

    def lasting(self, array: Any) -> Any:
        """Return an array that keeps its shape and place, as a table wants it, where there is one.

        PyTorch can move the data of a tensor (`share_memory_`, `resize_`, an assignment to
        `.data`), and so is every array looked at in every call.
        """
        return array

    def empty_like(self, array: Any) -> Any:
        """Return a new dense array whose axes lie in memory in the order of `array`'s."""
        raise NotImplementedError

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return what `empty_like` does, but with another size of one axis."""
        raise NotImplementedError

    def part(self, array: Any, axis: int, start: int, stop: int) -> Any:
        """Return a view of an array from one index of an axis to another."""
        return array[(*[slice(None)] * axis, slice(start, stop))]

    def result(self, array: Any, like: Any) -> Any:
        """Return what the caller gets for an array of `empty_like`, once work on it is launched."""
        return array

    def mark_written(self, arrays: tuple[Any, ...]) -> None:
        """Tell the library that the elements of some of its arrays have been written."""

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Return what function(module, *arrays) makes of NumPy arrays, computed where `like` lies.

        The arrays may also be this library's own ones on the device of `like`.
        The module is NumPy, CuPy or PyTorch, the arrays are its own on the device of `like`, and
        the results are returned as arrays of this library.
        """
        raise NotImplementedError

    def download(self, array: Any) -> NDArray[Any]:
        """Return an array as a NumPy array, copied from its device."""
        raise NotImplementedError

    def in_float64(self, array: Any) -> Any:
        """Return an array in float64, where it is, for `computed`; None where that takes NumPy."""
        return None

    def stream(self, device: int) -> int:
        """Return the handle of the current stream of this library."""
        return self.streams()(device)

    def streams(self) -> Callable[[int], int]:
        """Return what finds the handle of the current stream of a device."""
        raise NotImplementedError


class Outline:
    """What is known of an array that has no memory yet."""

    def __init__(self, spec: ArraySpec, pointer: int) -> None:
        self.spec, self.pointer = spec, pointer


class OutlineLibrary(Library):
    """The library of arrays that have no memory yet, which can be checked and not rotated."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Return what is known."""
        return Array(array.spec, array.pointer, self, array)


def like_dense(array: Array) -> Array:
    """Return what is known of a new array like this one, which lies nowhere yet."""
    strides = [math.prod(array.spec.shape[axis + 1 :]) for axis in range(len(array.spec.shape))]
    spec = array_spec(array.spec.shape, (*strides,), *array.spec[2:4], 0, True)
    return array._replace(spec=spec, pointer=-1)


def memory_order(strides: Sequence[int]) -> list[int]:
    """Return the axes of an array as they lie in memory, the outermost first."""
    return sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))


def resized(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    """Return a shape with another size of one axis."""
    return (*shape[:axis], size, *shape[axis + 1 :])


def let_wait(device: int, stream: int, earlier: int) -> None:
    """Let what comes onto a stream wait for what is on another one; the host does not.

    Not across the border of a stream capture, as DLPack has it: what is captured is ordered by
    whoever replays it.
    """
    runtime = cupy().cuda.runtime
    if (stream or LEGACY) == (earlier or LEGACY):
        return
    if runtime.streamIsCapturing(stream) or runtime.streamIsCapturing(earlier):
        return
    with cupy().cuda.Device(device):
        event = runtime.eventCreateWithFlags(runtime.eventDisableTiming)
        try:
            runtime.eventRecord(event, earlier)
            runtime.streamWaitEvent(stream, event)
        finally:
            runtime.eventDestroy(event)  # which CUDA does once it is of no more use


def cupy_streams() -> Callable[[int], int]:
    """Return what asks CuPy for its current stream of a device."""
    current = cupy().cuda.get_current_stream
    return lambda device: current(device).ptr


def check_device(name: str, device: str) -> str:
    """Return a device that arrays may lie on."""
    if not device.startswith(("cpu", "cuda")):
        raise ValueError(f"{name} must be on the CPU or on a CUDA device, got {device}")
    return device


def whole_strides(name: str, array: Any) -> tuple[int, ...]:
    """Return the strides of a NumPy or CuPy array in elements instead of bytes."""
    if not array.dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, got {array.dtype.str}")
    strides = []
    for size, stride in zip(array.shape, array.strides, strict=True):
        elements, rest = divmod(stride, array.itemsize or 1)
        if rest and size > 1:
            raise ValueError(
                f"{name} must have strides of whole elements of {array.itemsize} bytes, got "
                f"{array.strides} bytes"
            )
        strides.append(elements)
    return tuple(strides)


def attribute_matcher(
    attributes: Callable[[Any], Any], arrays: tuple[Any, ...]
) -> Callable[..., bool] | None:
    """Return what tells whether arrays have the types and attributes that these have now."""
    types, before = [*map(type, arrays)], [*map(attributes, arrays)]

    def match(*now: Any) -> bool:
        return [*map(type, now)] == types and [*map(attributes, now)] == before

    return None if None in before else match


def computed_by(
    module: Any, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]]
) -> tuple[Any, ...]:
    """Compute with NumPy or CuPy, on its current device: see `Library.computed`.

    CuPy compiles what it computes with, by way of a cache on the disk. Where the disk fails, NumPy
    takes its place.
    """
    try:
        with explained():
            return function(module, *map(module.asarray, arrays))
    except OSError:
        downloaded = [array.get() if hasattr(array, "get") else array for array in arrays]
        return tuple(map(module.asarray, function(np, *downloaded)))


@contextmanager
def refusals_of(name: str, array: Any) -> Iterator[None]:
    """Name the argument where its library does not hand it over, or tell what it is."""
    try:
        yield
    except Exception as error:  # anything, for this is the code of others
        if isinstance(error, TypeError | ValueError) and str(error).startswith(f"{name} must "):
            raise
        said = "it was deleted or donated" if _is_deleted(array) else str(error).partition("\n")[0]
        raise TypeError(
            f"{name} must be an array that can be read, got {type(array).__name__} ({said})"
        ) from error


def _is_deleted(array: Any) -> bool:
    """Return whether this is an array of JAX whose memory has been given away."""
    try:
        return array.is_deleted() is True
    except Exception:  # of another library, and it may raise anything
        return False
