"""Any array in, the same kind out: the only file that knows libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import dlpack
from .environment import cupy
from .memory import ACCESS_BYTES, ArraySpec, array_spec, cuda_index


class Array(NamedTuple):
    """An array of any library: what it is, where it is, and what keeps it there."""

    spec: ArraySpec
    pointer: int
    library: Library
    owner: Any
    requires_grad: bool = False


class Library:
    """What rope_cupy asks of an array library."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Return the array as rope_cupy sees it. `name` is what the caller calls it.

        The work on it comes on `stream`; None is this library's current one.
        """
        raise NotImplementedError

    def glance(self, array: Any) -> tuple[int, Any] | None:
        """Return the address of an array, and all else that `describe` reads, unread.

        Where these are equal, and the alignment of the address is, descriptions are equal. None for
        an array that must be described every time.
        """
        return None

    def empty_like(self, array: Any) -> Any:
        """Return a new dense array whose axes lie in memory in the order of `array`'s."""
        raise NotImplementedError

    def result(self, array: Any, like: Any) -> Any:
        """Return what the caller gets for an array of `empty_like`, once work on it is launched."""
        return array

    def wrote(self, array: Any) -> None:
        """Tell the library that the elements of its array have been written."""

    def upload(self, array: NDArray[Any], like: Any) -> Any:
        """Return a NumPy array as one of this library on the device of `like`."""
        raise NotImplementedError

    def download(self, array: Any) -> NDArray[Any]:
        """Return an array as a NumPy array, copied from its device."""
        raise NotImplementedError

    def stream(self, device: int) -> int:
        """Return the handle of the current stream of this library."""
        raise NotImplementedError


class _NumPy(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name} must be an array without a mask, got {type(array).__name__}")
        if not array.dtype.isnative:
            raise TypeError(f"{name} must be in native byte order, got {array.dtype.str}")
        pointer, read_only = array.__array_interface__["data"]
        strides = _whole_strides(name, array)
        spec = array_spec(array.shape, strides, array.dtype.name, "cpu", pointer, not read_only)
        return Array(spec, pointer, self, array)

    def glance(self, array: Any) -> tuple[int, Any] | None:
        kind = array.dtype, array.shape, array.strides, array.flags.writeable
        return array.ctypes.data, kind

    def empty_like(self, array: Any) -> Any:
        return np.empty_like(array)

    def upload(self, array: NDArray[Any], like: Any) -> Any:
        return array

    def download(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)


class _CuPy(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        pointer = array.data.ptr
        device = f"cuda:{array.device.id}"
        spec = array_spec(
            array.shape, _whole_strides(name, array), array.dtype.name, device, pointer, True
        )
        return Array(spec, pointer, self, array)

    def glance(self, array: Any) -> tuple[int, Any] | None:
        memory = array.data
        return memory.ptr, (array.dtype, array.shape, array.strides, memory.device_id)

    def empty_like(self, array: Any) -> Any:
        with array.device:
            return sys.modules["cupy"].empty_like(array)

    def upload(self, array: NDArray[Any], like: Any) -> Any:
        with like.device:
            return sys.modules["cupy"].asarray(array)

    def download(self, array: Any) -> NDArray[Any]:
        return array.get()  # type: ignore[no-any-return]

    def stream(self, device: int) -> int:
        return cupy().cuda.get_current_stream(device).ptr  # type: ignore[no-any-return]


class _Torch(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        torch = sys.modules["torch"]
        proxy = torch._C._TorchDispatchModeKey.PROXY
        if torch.jit.is_tracing() or torch._C._get_dispatch_mode(proxy) is not None:
            raise TypeError(
                f"{name} must not be traced, for the launch is not recorded: got a trace"
            )
        if array.layout is not torch.strided or array.is_nested:
            kind = "nested" if array.is_nested else array.layout
            raise TypeError(f"{name} must be a strided tensor, got layout {kind}")
        if array.is_conj() or array.is_neg():
            raise ValueError(
                f"{name} must hold its own values, got a lazy view: call resolve_conj() or "
                "resolve_neg()"
            )
        if torch.autograd.forward_ad.unpack_dual(array).tangent is not None:
            raise ValueError(f"{name} must not carry a forward-mode tangent, got a dual tensor")
        device = _supported(name, str(array.device))
        pointer = _torch_pointer(name, array)
        dtype = _torch_dtype(array.dtype)
        spec = array_spec(tuple(array.shape), array.stride(), dtype, device, pointer, True)
        return Array(spec, pointer, self, array, array.requires_grad)

    def glance(self, array: Any) -> tuple[int, Any] | None:
        if array.requires_grad:
            return None
        # The dispatch keys tell a sparse tensor, a lazily negated one, one of inference mode, ...
        keys = _torch_c()._dispatch_keys(array).raw_repr()
        try:
            pointer = array.data_ptr()
        except RuntimeError:  # of functorch
            return None
        if not pointer:  # of no elements, or of memory that has been given back
            return None
        return pointer, (keys, array.dtype, array.shape, array.stride(), array.device)

    def empty_like(self, array: Any) -> Any:
        return sys.modules["torch"].empty_like(array, requires_grad=False)

    def wrote(self, array: Any) -> None:
        # So that a backward pass which saved the old elements finds out.
        if not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)

    def upload(self, array: NDArray[Any], like: Any) -> Any:
        return sys.modules["torch"].from_numpy(array).to(like.device)

    def download(self, array: Any) -> NDArray[Any]:
        return array.detach().cpu().double().numpy()  # type: ignore[no-any-return]

    def stream(self, device: int) -> int:
        return sys.modules["torch"]._C._cuda_getCurrentRawStream(device)  # type: ignore[no-any-return]


class Bfloat16:
    """A uint16 buffer whose words are bfloat16 numbers, a dtype that NumPy and CuPy lack."""

    def __init__(self, words: Any) -> None:
        self.words = words

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.words.__dlpack__(**options)
        dlpack.set_bfloat16(capsule)
        return capsule

    def __dlpack_device__(self) -> Any:
        return self.words.__dlpack_device__()


class _Bfloat16(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        words = describe(name, array.words, stream)
        return words._replace(spec=words.spec._replace(dtype="bfloat16"), library=self)

    def empty_like(self, array: Any) -> Any:
        return Bfloat16(library_of("x", array.words).empty_like(array.words))

    def stream(self, device: int) -> int:
        return _CUPY.stream(device)


class _DLPack(Library):
    """Any other producer: read through DLPack, results made from a NumPy or CuPy buffer."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        device = _supported(name, dlpack.device_of(array))
        consumer = None if device == "cpu" else self._consumer(device, stream)
        capsule = dlpack.capsule_of(array, consumer)
        pointer, shape, strides, dtype, device, writable = dlpack.read(name, capsule)
        spec = array_spec(shape, strides, dtype, device, pointer, writable)
        return Array(spec, pointer, self, (array, capsule))

    def empty_like(self, array: Any) -> Any:
        if not hasattr(array, "__array_namespace__"):
            raise TypeError(
                "out must be an array where the input's library has no __array_namespace__ to "
                f"make one, got None for {type(array).__name__}"
            )
        spec = self.describe("x", array).spec
        order = sorted(range(len(spec.shape)), key=lambda axis: -abs(spec.strides[axis]))
        dtype = "uint16" if spec.dtype == "bfloat16" else spec.dtype
        with _module_of(spec.device) as module:
            buffer = module.empty([spec.shape[axis] for axis in order], dtype)
        dense = buffer.transpose([order.index(axis) for axis in range(len(order))])
        return Bfloat16(dense) if spec.dtype == "bfloat16" else dense

    def result(self, array: Any, like: Any) -> Any:
        return like.__array_namespace__().from_dlpack(array)

    def upload(self, array: NDArray[Any], like: Any) -> Any:
        with _module_of(dlpack.device_of(like)) as module:
            return like.__array_namespace__().from_dlpack(module.asarray(array))

    def download(self, array: Any) -> NDArray[Any]:
        device = dlpack.device_of(array)
        with _module_of(device) as module:
            copy = module.from_dlpack(array)
            return copy if device == "cpu" else copy.get()  # type: ignore[no-any-return]

    def stream(self, device: int) -> int:
        return _CUPY.stream(device)

    def _consumer(self, device: str, stream: int | None) -> int:
        """Return DLPack's number of the stream: 1 is the default one, -1 asks for no wait."""
        if stream is None:
            stream = self.stream(cuda_index(device))
        return -1 if cupy().cuda.runtime.streamIsCapturing(stream) else stream or 1


_CUPY = _CuPy()
_LIBRARIES: dict[tuple[str, str], Library] = {
    ("numpy", "ndarray"): _NumPy(),
    ("cupy", "ndarray"): _CUPY,
    ("torch", "Tensor"): _Torch(),
    ("rope_cupy", "Bfloat16"): _Bfloat16(),
}
_OTHER = _DLPack()


def describe(name: str, array: Any, stream: int | None = None) -> Array:
    """Return an array of any library as rope_cupy sees it: see `Library.describe`."""
    return library_of(name, array).describe(name, array, stream)


def glance(arrays: tuple[Any, ...]) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """Return the addresses of arrays, and all else that `describe` reads of them, unread.

    None where one of them must be described every time: see `Library.glance`.
    """
    if _torch_records():
        return None
    pointers, looks = [], []
    for array in arrays:
        library = _library_of_exact_type(type(array))  # type: ignore[arg-type]
        seen = library.glance(array) if library else None
        if seen is None:
            return None
        pointer, look = seen
        pointers.append(pointer)
        looks.append((library, pointer % ACCESS_BYTES, look))
    return tuple(pointers), tuple(looks)


def stream_of(array: Array) -> int | None:
    """Return the current stream of the library that owns the array, None on the CPU."""
    device = array.spec.device
    return None if device == "cpu" else array.library.stream(cuda_index(device))


def library_of(name: str, array: Any) -> Library:
    """Return the library that an array belongs to."""
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    if library is None:
        raise TypeError(
            f"{name} must be an array of CuPy, PyTorch, NumPy or another DLPack producer, got "
            f"{type(array).__name__}"
        )
    return library


def is_array(value: Any) -> bool:
    """Return whether `value` is an array of any library."""
    return _library_of_type(type(value)) is not None  # type: ignore[arg-type]


def check_gradient(name: str, requires_grad: bool) -> None:
    """Refuse what would lose a gradient silently, while PyTorch records operations."""
    if requires_grad and sys.modules["torch"].is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, which is not recorded here: use torch.no_grad() "
            "or a detached tensor, got requires_grad=True"
        )


@cache
def _library_of_type(kind: type) -> Library | None:
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if (package, base.__qualname__) in _LIBRARIES:
            return _LIBRARIES[package, base.__qualname__]
    return _OTHER if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") else None


@cache
def _library_of_exact_type(kind: type) -> Library | None:
    """Return the library whose own type this is: a subclass may do anything."""
    return _LIBRARIES.get((kind.__module__.partition(".")[0], kind.__qualname__))


def _torch_records() -> bool:
    """Return whether PyTorch records or changes what is done: a trace, a mode, dual tensors."""
    torch = sys.modules.get("torch")
    return torch is not None and (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


@contextmanager
def _module_of(device: str) -> Iterator[Any]:
    """Give NumPy, or CuPy with the device current."""
    if device == "cpu":
        yield np
    else:
        with cupy().cuda.Device(cuda_index(device)):
            yield cupy()


def _supported(name: str, device: str) -> str:
    if not device.startswith(("cpu", "cuda")):
        raise ValueError(f"{name} must be on the CPU or on a CUDA device, got {device}")
    return device


def _whole_strides(name: str, array: Any) -> tuple[int, ...]:
    """Return the strides of a NumPy or CuPy array in elements instead of bytes."""
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


def _torch_pointer(name: str, array: Any) -> int:
    """Return the address of a tensor, which fake and functorch's tensors do not have."""
    try:
        pointer: int = array.data_ptr()
    except RuntimeError as error:
        raise TypeError(f"{name} must be a tensor in memory, got {type(array).__name__}") from error
    if not pointer and array.numel():
        raise TypeError(f"{name} must be a tensor in memory, got {type(array).__name__}")
    return pointer


@cache
def _torch_c() -> Any:
    return sys.modules["torch"]._C


@cache
def _torch_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
