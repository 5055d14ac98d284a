"""ArraySpec, what is known of an array but its address, and which bytes it touches. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .choices import CACHE_DTYPES

ITEMSIZE = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "int32": 4,
    "int64": 8,
    "complex64": 8,
    "complex128": 16,
    "frequency": 8,  # of kernels/angles.cuh
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
FLOATS_8 = CACHE_DTYPES  # of 8 bits, in caches alone
ACCESS_BYTES = 16  # the widest load and store of a thread; kernels/vec.cuh says the same


class ArraySpec(NamedTuple):
    """An array but for its address. Strides count elements, 0 along an axis of one element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str  # "cpu" or "cuda:0"
    alignment: int  # bytes: the largest power of two, up to 16, that divides the address
    writable: bool


def array_spec(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    device: str,
    pointer: int,
    writable: bool,
) -> ArraySpec:
    used = tuple([stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)])
    return ArraySpec(shape, used, dtype, device, alignment(pointer), writable)


def cuda_index(device: str) -> int:
    """Return the number of a device such as "cuda:0"."""
    return int(device.removeprefix("cuda:"))


def alignment(pointer: int) -> int:
    """Return the largest power of two, up to 16, that divides the address."""
    return min(pointer & -pointer, ACCESS_BYTES) or ACCESS_BYTES


class _Memory:
    """An array interface over any address: NumPy may reason about it, and cpu.py may use it."""

    def __init__(
        self, pointer: int, typestr: str, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (pointer, False),
            "typestr": typestr,
            "shape": shape,
            "strides": strides,
        }


def ndarray_at(
    pointer: int, typestr: str, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """View an address as a NumPy array; strides count elements. The caller keeps the memory."""
    itemsize = np.dtype(typestr).itemsize
    if 0 in shape:
        return np.empty(shape, typestr)
    return np.asarray(
        _Memory(pointer, typestr, shape, tuple(stride * itemsize for stride in strides))
    )


def may_overlap_itself(spec: ArraySpec) -> bool:
    """Return whether an axis steps over less than the axes below it span."""
    if 0 in spec.shape:
        return False
    reach = 0
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(spec.strides, spec.shape, strict=True)
    ):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def overlap(a: ArraySpec, a_pointer: int, b: ArraySpec, b_pointer: int) -> bool:
    """Return whether two arrays share a byte. Side-by-side views of one buffer do not."""
    if a.device != b.device or 0 in a.shape or 0 in b.shape:
        return False
    a_low, a_high = span(a)
    b_low, b_high = span(b)
    if a_pointer + a_high <= b_pointer + b_low or b_pointer + b_high <= a_pointer + a_low:
        return False
    return _share_a_byte(a._replace(alignment=1), b._replace(alignment=1), b_pointer - a_pointer)


def span(spec: ArraySpec) -> tuple[int, int]:
    """Return the first byte and the byte behind the last, from the address of element 0."""
    itemsize = ITEMSIZE[spec.dtype]
    ends = [
        stride * (size - 1) * itemsize
        for stride, size in zip(spec.strides, spec.shape, strict=True)
    ]
    return sum(end for end in ends if end < 0), sum(end for end in ends if end > 0) + itemsize


@lru_cache(maxsize=1024)
def _share_a_byte(a: ArraySpec, b: ArraySpec, distance: int) -> bool:
    # Nothing is read there: NumPy solves the Diophantine equation of the two sets of addresses.
    base = 1 << 60
    views = [
        ndarray_at(base + offset, f"V{ITEMSIZE[spec.dtype]}", spec.shape, spec.strides)
        for spec, offset in ((a, 0), (b, distance))
    ]
    try:
        return np.shares_memory(views[0], views[1], max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True  # strides so odd that no answer is found in time are refused, not risked
