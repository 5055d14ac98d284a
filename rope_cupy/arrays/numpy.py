"""NumPy's arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..memory import array_spec
from .base import Array, Library, attribute_matcher, resized, whole_strides

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray

_attributes = attrgetter("dtype", "shape", "strides", "flags.writeable")


class NumPy(Library):
    """NumPy's arrays, which lie on the CPU and may be read-only."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Refuse masks, which are no arrays of elements, and describe all others."""
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name} must be an array without a mask, got {type(array).__name__}")
        pointer, read_only = array.__array_interface__["data"]
        strides = whole_strides(name, array)
        spec = array_spec(array.shape, strides, array.dtype.name, "cpu", pointer, not read_only)
        return Array(spec, pointer, self, array)

    def attributes(self, array: Any) -> Any:
        """Return what is read of an array."""
        return _attributes(array)

    def addresses(self, arrays: Sequence[Any]) -> tuple[int, ...] | None:
        """Return the addresses that the array interface tells."""
        if {*map(type, arrays)} != {np.ndarray}:
            return None
        return tuple([array.__array_interface__["data"][0] for array in arrays])

    def matcher(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        """Compare the attributes one by one."""
        return attribute_matcher(_attributes, arrays)

    def empty_like(self, array: Any) -> Any:
        """Return a new array."""
        return np.empty_like(array)

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return a new array."""
        return np.empty_like(array, shape=resized(array.shape, axis, size))

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Compute with NumPy."""
        return function(np, *arrays)

    def download(self, array: Any) -> NDArray[Any]:
        """Return the array."""
        return np.asarray(array)
