"""CuPy's arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import cupy

from ..memory import array_spec
from .base import (
    Array,
    Library,
    attribute_matcher,
    computed_by,
    cupy_streams,
    resized,
    whole_strides,
)

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

_attributes = attrgetter("dtype", "shape", "strides", "data.device_id")


class CuPy(Library):
    """CuPy's arrays, which lie on a GPU."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Refuse an array that lies on several GPUs, and describe all others."""
        pointer, device = array.data.ptr, f"cuda:{array.data.device_id}"
        if not pointer and array.size:  # such as of an array that several GPUs share
            raise TypeError(f"{name} must be an array in memory, got {type(array).__name__}")
        strides = whole_strides(name, array)
        spec = array_spec(array.shape, strides, array.dtype.name, device, pointer, True)
        return Array(spec, pointer, self, array)

    def attributes(self, array: Any) -> Any:
        """Return what is read of an array."""
        return _attributes(array)

    def addresses(self, arrays: Sequence[Any]) -> tuple[int, ...] | None:
        """Return the addresses of the arrays' memory."""
        if {*map(type, arrays)} != {cupy.ndarray}:
            return None
        return tuple([array.data.ptr for array in arrays])

    def matcher(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        """Compare the attributes one by one."""
        return attribute_matcher(_attributes, arrays)

    def lasting(self, array: Any) -> Any:
        """Return a view, whose shape no one else can assign to."""
        return array.view()

    def empty_like(self, array: Any) -> Any:
        """Return a new array on the array's device."""
        with array.device:
            return cupy.empty_like(array)

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return a new array on the array's device."""
        with array.device:
            return cupy.empty_like(array, shape=resized(array.shape, axis, size))

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Compute with CuPy on the device of `like`."""
        with like.device:
            return computed_by(cupy, function, arrays)

    def in_float64(self, array: Any) -> Any:
        """Return the array, or a copy on its device."""
        with array.device:
            return array.astype("float64", copy=False)

    def download(self, array: Any) -> NDArray[Any]:
        """Return a copy on the CPU."""
        return array.get()  # type: ignore[no-any-return]

    def streams(self) -> Callable[[int], int]:
        """Return what asks CuPy for its current stream."""
        return cupy_streams()
