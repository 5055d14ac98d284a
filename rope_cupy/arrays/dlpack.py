"""Any other producer of DLPack, and bfloat16 numbers that NumPy and CuPy hold as words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..environment import cupy
from ..memory import ArraySpec, array_spec, cuda_index, ndarray_at, span
from . import capsules
from .base import (
    LEGACY,
    Array,
    Library,
    check_device,
    computed_by,
    cupy_streams,
    memory_order,
    refusals_of,
    resized,
)
from .numpy import NumPy

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray


class Bfloat16:
    """A uint16 buffer whose words are bfloat16 numbers, a dtype that NumPy and CuPy lack."""

    def __init__(self, words: Any) -> None:
        self.words = words

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.words.__dlpack__(**options)
        capsules.set_bfloat16(capsule)
        return capsule

    def __dlpack_device__(self) -> Any:
        return self.words.__dlpack_device__()


class Bfloat16Library(Library):
    """The library of `Bfloat16`, whose words are NumPy's or CuPy's."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Describe the words as what they stand for."""
        words = _library_of_words(array).describe(name, array.words, stream)
        return words._replace(spec=words.spec._replace(dtype="bfloat16"), library=self)

    def empty_like(self, array: Any) -> Any:
        """Return new words."""
        return Bfloat16(_library_of_words(array).empty_like(array.words))

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return new words."""
        return Bfloat16(_library_of_words(array).empty_sized(array.words, axis, size))

    def part(self, array: Any, axis: int, start: int, stop: int) -> Any:
        """Return a view of the words."""
        return Bfloat16(_library_of_words(array).part(array.words, axis, start, stop))

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Compute with the library of the words."""
        return _library_of_words(like).computed(function, arrays, like.words)

    def download(self, array: Any) -> NDArray[Any]:
        """Return the numbers."""
        return _of_words(_library_of_words(array).download(array.words))

    def streams(self) -> Callable[[int], int]:
        """Return what asks CuPy for its current stream."""
        return cupy_streams()


class DLPack(Library):
    """Any other producer: read through DLPack, results made from a NumPy or CuPy buffer."""

    names_refusals = True

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Read a capsule, which the owner keeps."""
        with refusals_of(name, array):
            device = check_device(name, capsules.device_of(name, array))
        consumer = None if device == "cpu" else self._consumer(name, device, stream)
        with refusals_of(name, array):
            capsule = capsules.capsule_of(array, consumer)
        pointer, shape, strides, dtype, lies_on, writable = capsules.read(name, capsule)
        if lies_on != device:
            raise ValueError(f"{name} must be on {device}, as it says, got a capsule on {lies_on}")
        spec = array_spec(shape, strides, dtype, device, pointer, writable)
        return Array(spec, pointer, self, (array, capsule))

    def empty_like(self, array: Any) -> Any:
        """Return a buffer of NumPy or CuPy, of which `result` makes an array."""
        if not hasattr(array, "__array_namespace__"):
            raise TypeError(
                "out must be an array where the input's library has no __array_namespace__ to "
                f"make one, got None for {type(array).__name__}"
            )
        return self._empty(self.describe("x", array).spec)

    def empty_sized(self, array: Any, axis: int, size: int) -> Any:
        """Return a buffer of NumPy or CuPy, of which `result` makes an array."""
        if not hasattr(array, "__array_namespace__"):
            return self.empty_like(array)  # which refuses it
        spec = self.describe("x", array).spec
        return self._empty(spec._replace(shape=resized(spec.shape, axis, size)))

    def part(self, array: Any, axis: int, start: int, stop: int) -> Any:
        """Refuse what may be a copy."""
        raise TypeError(
            "out must be arrays of CuPy, PyTorch or NumPy, of which parts are views, got "
            f"{type(array).__name__}"
        )

    @staticmethod
    def _empty(spec: ArraySpec) -> Any:
        order = memory_order(spec.strides)
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        with _module_of(spec.device) as module:
            buffer = module.empty([spec.shape[axis] for axis in order], dtype)
        dense = buffer.transpose([order.index(axis) for axis in range(len(order))])
        return Bfloat16(dense) if spec.dtype == "bfloat16" else dense

    def result(self, array: Any, like: Any) -> Any:
        """Return an array of the producer's own library."""
        found = like.__array_namespace__().from_dlpack(array)
        device = getattr(like, "device", None)  # which may be one of several on the CPU
        return found if device is None or found.device == device else found.to_device(device)

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Compute with NumPy or CuPy."""
        with _module_of(capsules.device_of("like", like)) as module:
            results = computed_by(module, function, arrays)
            return tuple(map(like.__array_namespace__().from_dlpack, results))

    def download(self, array: Any) -> NDArray[Any]:
        """Return the array by way of DLPack."""
        device = capsules.device_of("array", array)
        spec, pointer, _, owner = self.describe("array", array)
        if spec.dtype == "bfloat16":  # which NumPy and CuPy do not take
            if device == "cpu":
                return _of_words(ndarray_at(pointer, "u2", spec.shape, spec.strides))
            return _of_words(_words_of_gpu(spec, pointer, owner))
        with _module_of(device) as module:
            copy = module.from_dlpack(array)
            return copy if device == "cpu" else copy.get()  # type: ignore[no-any-return]

    def streams(self) -> Callable[[int], int]:
        """Return what asks CuPy for its current stream."""
        return cupy_streams()

    def _consumer(self, name: str, device: str, stream: int | None) -> int:
        """Return DLPack's number of the stream, or -1, which asks for no wait."""
        runtime, number = cupy().cuda.runtime, cuda_index(device)
        if not 0 <= number < runtime.getDeviceCount():
            raise ValueError(f"{name} must be on a GPU that is here, got {device}")
        if stream is None:
            stream = self.stream(number)
        return -1 if runtime.streamIsCapturing(stream) else stream or LEGACY


def _library_of_words(array: Bfloat16) -> Library:
    """Return the library of the buffer that holds the words."""
    if isinstance(array.words, np.ndarray):
        return NumPy()
    from .cupy import CuPy

    return CuPy()


def _of_words(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the numbers of words that are bfloat16."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def _words_of_gpu(spec: ArraySpec, pointer: int, owner: Any) -> NDArray[np.uint16]:
    """Return words of 16 bits that lie on a GPU, copied from there."""
    module, (low, high) = cupy(), span(spec)
    with module.cuda.Device(cuda_index(spec.device)):
        memory = module.cuda.UnownedMemory(pointer + low, high - low, owner)
        start = module.cuda.MemoryPointer(memory, -low)
        strides = [2 * stride for stride in spec.strides]
        return module.ndarray(spec.shape, "uint16", start, strides).get()  # type: ignore[no-any-return]


@contextmanager
def _module_of(device: str) -> Iterator[Any]:
    """Give NumPy, or CuPy with the device current."""
    if device == "cpu":
        yield np
    else:
        with cupy().cuda.Device(cuda_index(device)):
            yield cupy()
