"""DLPack capsules, read by ctypes: bfloat16 and read-only flags, refused by others, are plain here.

The structures are those of the DLPack specification, 0.8 (unversioned) and 1.x (versioned).
"""

from __future__ import annotations

import ctypes
from operator import index
from typing import Any, NamedTuple

import numpy as np

from ..checks import described

_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # host, CUDA, CUDA pinned host, CUDA managed
_BFLOAT = 4
_READ_ONLY = 1
_CONSUMED = b"used_dltensor", b"used_dltensor_versioned"
MOST_AXES = 64  # of NumPy's arrays, and no library has more
NAMES = b"dltensor", b"dltensor_versioned"  # of capsules that no one has consumed


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


class Contents(NamedTuple):
    """What a capsule says. Strides count elements."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str
    # Only where a versioned capsule says so: immutable arrays often come unversioned.
    writable: bool


def capsule_of(producer: Any, stream: int | None) -> Any:
    """Return the producer's capsule; its data is ready for work on `stream` (None on the CPU)."""
    try:
        return producer.__dlpack__(stream=stream, max_version=(1, 0))
    except TypeError:  # written before version 1
        return producer.__dlpack__(stream=stream)


def device_of(name: str, producer: Any) -> str:
    """Return "cpu", "cuda:0" or another device's DLPack number."""
    device = producer.__dlpack_device__()
    try:
        kind, number = map(index, device)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must give two ints for __dlpack_device__(), got {device!r}"
        ) from error
    return _device(kind, number)


def read(name: str, capsule: Any) -> Contents:
    """Read a capsule without consuming it. What it points to lives as long as the capsule."""
    tensor, writable = _tensor_of(name, capsule)
    if not 0 <= tensor.ndim <= MOST_AXES or (tensor.ndim and not tensor.shape):
        raise TypeError(
            f"{name} must have at most {MOST_AXES} axes and a shape, got a capsule of "
            f"{tensor.ndim} axes"
        )
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} must have sizes of 0 or more, got a capsule of shape {shape}")
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:
        strides = _contiguous(shape)
    pointer = (tensor.data or 0) + tensor.byte_offset
    if 0 not in shape and not (tensor.data and _has_addresses(tensor, pointer, shape, strides)):
        raise TypeError(
            f"{name} must be an array in memory, got a capsule whose elements have no address"
        )
    dtype = f"{_KINDS.get(tensor.code, f'type code {tensor.code} with bits ')}{tensor.bits}"
    if tensor.lanes != 1:
        dtype += f"x{tensor.lanes}"
    device = _device(tensor.device_type, tensor.device_id)
    return Contents(pointer, shape, strides, dtype, device, writable)


def set_bfloat16(capsule: Any) -> None:
    """Say that a capsule's elements, of 16 bits, are bfloat16 numbers."""
    tensor, _ = _tensor_of("the buffer", capsule)
    if (tensor.bits, tensor.lanes) != (16, 1):
        raise TypeError(f"the buffer must have elements of 16 bits, got {tensor.bits}")
    tensor.code = _BFLOAT


def _has_addresses(
    tensor: _DLTensor, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bool:
    """Return whether the first and the last element lie where 64 bits can point to."""
    ends = [stride * (size - 1) for stride, size in zip(strides, shape, strict=True)]
    itemsize: int = -(-tensor.bits * tensor.lanes // 8)
    first = pointer + itemsize * sum(end for end in ends if end < 0)
    last = pointer + itemsize * sum(end for end in ends if end > 0)
    return first > 0 and last + itemsize <= 2**63


def _device(kind: int, number: int) -> str:
    name = _DEVICES.get(kind, f"device type {kind}")
    return name if name == "cpu" else f"{name}:{number}"


def _tensor_of(name: str, capsule: Any) -> tuple[_DLTensor, bool]:
    if type(capsule) is not _CAPSULE:
        raise TypeError(f"{name} must give a capsule for __dlpack__(), got {described(capsule)}")
    kind = _capsule_name(capsule)
    if kind not in NAMES:
        got = "one that has been consumed" if kind in _CONSUMED else f"one named {kind!r}"
        raise TypeError(f"{name} must give a capsule named {NAMES[0].decode()!r}, got {got}")
    address = _capsule_pointer(capsule, kind)
    if kind == b"dltensor_versioned":
        managed = _DLManagedTensorVersioned.from_address(address)
        if managed.major != 1:
            raise TypeError(
                f"{name} must come as DLPack version 1, got {managed.major}.{managed.minor}"
            )
        return managed.tensor, not managed.flags & _READ_ONLY
    return _DLTensor.from_address(address), False


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype = ctypes.c_char_p
_capsule_name.argtypes = (ctypes.py_object,)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_CAPSULE = type(np.empty(0).__dlpack__())
