"""Any array in, the same kind out: the only file that knows libraries."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from . import dlpack
from .environment import cupy, explained
from .memory import ACCESS_BYTES, ArraySpec, array_spec, cuda_index, ndarray_at, span
from .recall import keep

if TYPE_CHECKING:  # numpy.typing takes longer to import than any module here
    from numpy.typing import NDArray


LEGACY = 1  # the default stream's own handle, for which libraries also say 0
MAX_TYPES = 256  # that are known; a program may make any number of them


class Array(NamedTuple):
    """An array of any library: what it is, where it is, and what keeps it there."""

    spec: ArraySpec
    pointer: int
    library: Library
    owner: Any


class Library:
    """What rope_cupy asks of an array library."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        """Return the array as rope_cupy sees it. `name` is what the caller calls it.

        The work on it comes on `stream`; None is this library's current one. A producer of DLPack
        sees to it that the array is ready there; for others `let_wait` does.
        """
        raise NotImplementedError

    def glance(self, array: Any) -> tuple[int, Any] | None:
        """Return the address of an array, and all else that `describe` reads, unread.

        Where these are equal, and the alignment of the address is, descriptions are equal. None for
        an array that must be described every time.
        """
        return None

    def requires_grad(self, array: Any) -> bool:
        """Return whether the library wants a gradient of the array."""
        return False

    def pointers(self, arrays: tuple[Any, ...]) -> tuple[int, ...] | None:
        """Return the addresses of arrays, None if one of them is another library's."""
        return None

    def guard(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        """Return what tells that arrays are, in all but their addresses, what these are now.

        It is faster than to glance at them. None where there is no such thing.
        """
        return None

    def empty_like(self, array: Any) -> Any:
        """Return a new dense array whose axes lie in memory in the order of `array`'s."""
        raise NotImplementedError

    def private_view(self, array: Any) -> Any:
        """Return a view of which nothing but the values can change, None where there is none."""
        return None

    def result(self, array: Any, like: Any) -> Any:
        """Return what the caller gets for an array of `empty_like`, once work on it is launched."""
        return array

    @property
    def wrote(self) -> Callable[[tuple[Any, ...]], None]:
        """What tells the library that the elements of some of its arrays have been written."""
        return _tell_nobody

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        """Return what function(module, *arrays) makes of NumPy arrays, computed where `like` lies.

        The module is NumPy, CuPy or PyTorch, the arrays are its own on the device of `like`, and
        the results are returned as arrays of this library.
        """
        raise NotImplementedError

    def download(self, array: Any) -> NDArray[Any]:
        """Return an array as a NumPy array, copied from its device."""
        raise NotImplementedError

    def stream(self, device: int) -> int:
        """Return the handle of the current stream of this library."""
        return self.streams()(device)

    def streams(self) -> Callable[[int], int]:
        """Return what finds the handle of the current stream of a device."""
        raise NotImplementedError


class _NumPy(Library):
    attributes = attrgetter("dtype", "shape", "strides", "flags.writeable")

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{name} must be an array without a mask, got {type(array).__name__}")
        pointer, read_only = array.__array_interface__["data"]
        strides = _whole_strides(name, array)
        spec = array_spec(array.shape, strides, array.dtype.name, "cpu", pointer, not read_only)
        return Array(spec, pointer, self, array)

    def glance(self, array: Any) -> tuple[int, Any] | None:
        return array.__array_interface__["data"][0], self.attributes(array)

    def pointers(self, arrays: tuple[Any, ...]) -> tuple[int, ...] | None:
        try:
            return tuple([array.__array_interface__["data"][0] for array in arrays])
        except Exception:  # of an array of another library, which may raise anything
            return None

    def guard(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        return _guard_by(self.attributes, arrays)

    def empty_like(self, array: Any) -> Any:
        return np.empty_like(array)

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        return function(np, *arrays)

    def download(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)


class _CuPy(Library):
    attributes = attrgetter("dtype", "shape", "strides", "data.device_id")

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        pointer, device = array.data.ptr, f"cuda:{array.data.device_id}"
        if not pointer and array.size:  # such as of an array that several GPUs share
            raise TypeError(f"{name} must be an array in memory, got {type(array).__name__}")
        strides = _whole_strides(name, array)
        spec = array_spec(array.shape, strides, array.dtype.name, device, pointer, True)
        return Array(spec, pointer, self, array)

    def glance(self, array: Any) -> tuple[int, Any] | None:
        return array.data.ptr, self.attributes(array)

    def pointers(self, arrays: tuple[Any, ...]) -> tuple[int, ...] | None:
        try:
            return tuple([array.data.ptr for array in arrays])
        except Exception:  # of an array of another library, which may raise anything
            return None

    def guard(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        return _guard_by(self.attributes, arrays)

    def private_view(self, array: Any) -> Any:
        return array.view()

    def empty_like(self, array: Any) -> Any:
        with array.device:
            return sys.modules["cupy"].empty_like(array)

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        with like.device:
            return _computed(sys.modules["cupy"], function, arrays)

    def download(self, array: Any) -> NDArray[Any]:
        return array.get()  # type: ignore[no-any-return]

    def streams(self) -> Callable[[int], int]:
        current = cupy().cuda.get_current_stream
        return lambda device: current(device).ptr


class _Torch(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        torch_c = _torch_c()
        proxy = torch_c._TorchDispatchModeKey.PROXY
        if sys.modules["torch"].jit.is_tracing() or torch_c._get_dispatch_mode(proxy) is not None:
            raise TypeError(
                f"{name} must not be traced, for the launch is not recorded: got a trace"
            )
        _check_strided(name, array)
        device = _supported(name, str(array.device))
        pointer = _torch_pointer(name, array)
        dtype = _torch_dtype(array.dtype)
        spec = array_spec(tuple(array.shape), array.stride(), dtype, device, pointer, True)
        return Array(spec, pointer, self, array)

    def requires_grad(self, array: Any) -> bool:
        return array.requires_grad  # type: ignore[no-any-return]

    def glance(self, array: Any) -> tuple[int, Any] | None:
        at = self.pointers((array,))
        if at is None or _torch_c()._get_tracing_state() is not None:
            return None
        # The dispatch keys tell a sparse tensor, a lazily negated one, one of inference mode, ...
        keys = _torch_c()._dispatch_keys(array).raw_repr()
        try:
            return at[0], (keys, array.dtype, array.shape, array.stride(), array.device)
        except RuntimeError:  # for a nested tensor, which has no sizes
            return None

    def pointers(self, arrays: tuple[Any, ...]) -> tuple[int, ...] | None:
        # Modes change or record what is done, and so do traces, of which no guard approves.
        if self.num_modes() > 0 or self.forward_ad._current_level >= 0:
            return None
        try:
            # PyTorch's guards end the process when they are asked of a nested tensor's strides.
            if any([array.is_nested for array in arrays]):
                return None
            return tuple(map(self.address_of, arrays))
        # For another library's, and for functorch's tensors.
        except (AttributeError, TypeError, RuntimeError):
            return None

    @cached_property
    def num_modes(self) -> Callable[[], int]:
        return _torch_c()._len_torch_dispatch_stack  # type: ignore[no-any-return]

    @cached_property
    def forward_ad(self) -> Any:
        return sys.modules["torch"].autograd.forward_ad

    @cached_property
    def address_of(self) -> Callable[[Any], int]:
        return sys.modules["torch"].Tensor.data_ptr  # type: ignore[no-any-return]

    def guard(self, arrays: tuple[Any, ...]) -> Callable[..., bool] | None:
        # As torch.compile asks it, in one call and several times faster than by attributes.
        try:
            guards = _torch_c()._dynamo.guards.TensorGuards(
                *arrays,
                dynamic_dims_sizes=[list(array.shape) for array in arrays],
                dynamic_dims_strides=[list(array.stride()) for array in arrays],
            )
            return guards.check if guards.check(*arrays) else None
        except (AttributeError, TypeError, RuntimeError):  # which this PyTorch does not have
            return None

    def empty_like(self, array: Any) -> Any:
        return sys.modules["torch"].empty_like(array)

    @property
    def wrote(self) -> Callable[[tuple[Any, ...]], None]:
        return _increment_versions()  # a backward pass which saved the old elements finds out

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        module = sys.modules["torch"]
        # Copies, for PyTorch takes no negative strides and warns of what is read-only.
        copies = (module.from_numpy(np.array(array)) for array in arrays)
        with module.device(like.device):  # not on PyTorch's default device, whatever it is
            return function(module, *(copy.to(like.device) for copy in copies))

    def download(self, array: Any) -> NDArray[Any]:
        copy = array.detach().cpu()
        return (copy if copy.is_complex() else copy.double()).numpy()  # type: ignore[no-any-return]

    def streams(self) -> Callable[[int], int]:
        return _torch_c()._cuda_getCurrentRawStream  # type: ignore[no-any-return]


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

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        return library_of("like", like.words).computed(function, arrays, like.words)

    def download(self, array: Any) -> NDArray[Any]:
        return _of_words(library_of("x", array.words).download(array.words))

    def streams(self) -> Callable[[int], int]:
        return _CUPY.streams()


class _DLPack(Library):
    """Any other producer: read through DLPack, results made from a NumPy or CuPy buffer."""

    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        with _refusals_of(name, array):
            device = _supported(name, dlpack.device_of(name, array))
        consumer = None if device == "cpu" else self._consumer(name, device, stream)
        with _refusals_of(name, array):
            capsule = dlpack.capsule_of(array, consumer)
        pointer, shape, strides, dtype, lies_on, writable = dlpack.read(name, capsule)
        if lies_on != device:
            raise ValueError(f"{name} must be on {device}, as it says, got a capsule on {lies_on}")
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

    def computed(
        self, function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
    ) -> tuple[Any, ...]:
        with _module_of(dlpack.device_of("like", like)) as module:
            results = _computed(module, function, arrays)
            return tuple(map(like.__array_namespace__().from_dlpack, results))

    def download(self, array: Any) -> NDArray[Any]:
        device = dlpack.device_of("array", array)
        spec, pointer, _, owner = self.describe("array", array)
        if spec.dtype == "bfloat16":  # which NumPy and CuPy do not take
            if device == "cpu":
                return _of_words(ndarray_at(pointer, "u2", spec.shape, spec.strides))
            return _of_words(_words_of_gpu(spec, pointer, owner))
        with _module_of(device) as module:
            copy = module.from_dlpack(array)
            return copy if device == "cpu" else copy.get()  # type: ignore[no-any-return]

    def streams(self) -> Callable[[int], int]:
        return _CUPY.streams()

    def _consumer(self, name: str, device: str, stream: int | None) -> int:
        """Return DLPack's number of the stream, or -1, which asks for no wait."""
        runtime, number = cupy().cuda.runtime, cuda_index(device)
        if not 0 <= number < runtime.getDeviceCount():
            raise ValueError(f"{name} must be on a GPU that is here, got {device}")
        if stream is None:
            stream = self.stream(number)
        return -1 if runtime.streamIsCapturing(stream) else stream or LEGACY


class Outline:
    """What is known of a tensor of PyTorch that has no memory yet: see `outline`."""

    def __init__(self, spec: ArraySpec, pointer: int) -> None:
        self.spec, self.pointer = spec, pointer


class _Outlined(Library):
    def describe(self, name: str, array: Any, stream: int | None = None) -> Array:
        return Array(array.spec, array.pointer, self, array)


_CUPY, _TORCH = _CuPy(), _Torch()
_LIBRARIES: dict[tuple[str, str], Library] = {
    ("numpy", "ndarray"): _NumPy(),
    ("cupy", "ndarray"): _CUPY,
    ("torch", "Tensor"): _TORCH,
    ("rope_cupy", "Bfloat16"): _Bfloat16(),
    ("rope_cupy", "Outline"): _Outlined(),
}
_OTHER = _DLPack()


def describe(name: str, array: Any, stream: int | None = None) -> Array:
    """Return an array of any library as rope_cupy sees it: see `Library.describe`."""
    library = library_of(name, array)
    if library is _OTHER or _library_of_exact_type(type(array)):  # type: ignore[arg-type]
        return library.describe(name, array, stream)
    with _refusals_of(name, array):  # a subclass may do anything
        return library.describe(name, array, stream)


def outline(name: str, array: Any) -> Outline | None:
    """Return what is known of a tensor that is only traced, None where a size is unknown.

    Symbolic sizes are those of the call that is traced, of which this makes no guard. Tensors that
    share a storage lie in it as they will in memory.
    """
    _check_strided(name, array)
    numbers = *array.shape, *array.stride(), array.storage_offset()
    known = [each if isinstance(each, int) else each.node.hint for each in numbers]
    if None in known:
        return None
    num, (*sizes, offset) = array.ndim, known
    # Storages lie farther apart than any of them is long.
    pointer = (array.untyped_storage()._cdata << 64) + offset * array.itemsize
    shape, strides, dtype = (*sizes[:num],), (*sizes[num:],), _torch_dtype(array.dtype)
    return Outline(array_spec(shape, strides, dtype, str(array.device), pointer, True), pointer)


def like_dense(array: Array) -> Array:
    """Return what is known of a new array like this one, which lies nowhere yet."""
    strides = [math.prod(array.spec.shape[axis + 1 :]) for axis in range(len(array.spec.shape))]
    spec = array_spec(array.spec.shape, (*strides,), *array.spec[2:4], 0, True)
    return array._replace(spec=spec, pointer=-1)


def empty_like(name: str, array: Any) -> Any:
    """Return a new array like one of any library: see `Library.empty_like`."""
    library = library_of(name, array)
    if library is not _TORCH and not _library_of_exact_type(type(array)):  # type: ignore[arg-type]
        describe(name, array)  # refuses what cannot be read
    return library.empty_like(array)


def computed(
    function: Callable[..., tuple[Any, ...]], arrays: Sequence[NDArray[Any]], like: Any
) -> tuple[Any, ...]:
    """Compute with NumPy arrays where `like` lies, for its library: see `Library.computed`."""
    return describe("like", like).library.computed(function, arrays, like)


def placed(array: NDArray[Any], like: Any) -> Any:
    """Return a NumPy array where `like` lies, as an array of its library."""
    (there,) = computed(lambda _, array: (array,), (array,), like)
    return there


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


class Look:
    """Stands for all of some arrays but their addresses: equal where descriptions are equal.

    These are one object, which is compared and hashed as fast as can be.
    """

    __slots__ = ()


class Glance:
    """What is seen of arrays without describing them."""

    __slots__ = ("at", "guard", "kept", "look", "requires_grad")

    def __init__(self, at: tuple[int, ...], look: Look, requires_grad: bool) -> None:
        self.at, self.look = at, look  # their addresses, and all else
        self.requires_grad = requires_grad  # of one of them at least
        self.kept: dict[Any, Any] = {}  # by the caller, for arrays of this look at these addresses
        self.guard: Callable[..., bool] | None = None


_looks: dict[tuple[Any, ...], Look] = {}  # by the libraries, alignments and attributes of arrays
_glances: dict[tuple[int, ...], list[Glance]] = {}  # by the addresses of arrays, the last first
MAX_KEPT = 4096  # of each
MAX_LOOKS_AT = 4  # the same addresses


def glance(arrays: tuple[Any, ...]) -> Glance | None:
    """Return the addresses of arrays and their look.

    None where one of them must be described every time: see `Library.glance`. What has been glanced
    at twice at the same addresses is guarded from then on.
    """
    library = _library_of_exact_type(type(arrays[0]))  # type: ignore[arg-type]
    at = library.pointers(arrays) if library else None
    if library is None or at is None:
        return _glance_at_each(arrays)
    for before in _glances.get(at, ()):
        if before.guard and before.guard(*arrays):
            return before
    seen = _glance_at_each(arrays)
    if seen:
        glances = _glances.get(at) or keep(_glances, at, [], MAX_KEPT)
        for before in glances:
            if before.look is seen.look:
                before.guard = library.guard(arrays)
                return before
        glances[:] = seen, *glances[: MAX_LOOKS_AT - 1]
    return seen


def _glance_at_each(arrays: tuple[Any, ...]) -> Glance | None:
    pointers, attributes, requires_grad = [], [], False
    for array in arrays:
        library = _library_of_exact_type(type(array))  # type: ignore[arg-type]
        seen = library.glance(array) if library else None
        if library is None or seen is None or not seen[0]:
            return None  # at 0 lie no elements, or memory that has been given back
        pointer, attribute = seen
        pointers.append(pointer)
        attributes.append((library, pointer % ACCESS_BYTES, attribute))
        requires_grad = requires_grad or library.requires_grad(array)
    key = *attributes, requires_grad
    look = _looks.get(key)
    if look is None:
        look = keep(_looks, key, Look(), MAX_KEPT)
    return Glance(tuple(pointers), look, requires_grad)


def _guard_by(
    attributes: Callable[[Any], Any], arrays: tuple[Any, ...]
) -> Callable[..., bool] | None:
    """Return what tells that arrays of one type have the attributes that they have now."""
    kind, before = type(arrays[0]), [*map(attributes, arrays)]

    def unchanged(*now: Any) -> bool:
        for array, attributes_before in zip(now, before, strict=True):
            if type(array) is not kind or attributes(array) != attributes_before:
                return False
        return True

    return unchanged if {*map(type, arrays)} == {kind} else None


def private_view(array: Any) -> Any:
    """Return a view of which nothing but the values can change, None where there is none."""
    library = _library_of_exact_type(type(array))  # type: ignore[arg-type]
    return library.private_view(array) if library else None


def stream_of(array: Array) -> int | None:
    """Return the current stream of the library that owns the array, None on the CPU."""
    device = array.spec.device
    return None if device == "cpu" else array.library.stream(cuda_index(device))


def library_of(name: str, array: Any) -> Library:
    """Return the library that an array belongs to."""
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    if library is None and _is_tracer_of_jax(type(array)):
        raise TypeError(
            f"{name} must be an array in memory, as within jax.pure_callback, for no launch is "
            f"traced: got {type(array).__name__}"
        )
    if library is None:
        raise TypeError(
            f"{name} must be an array of CuPy, PyTorch, NumPy or another DLPack producer, got "
            f"{type(array).__name__}"
        )
    return library


@lru_cache(maxsize=MAX_TYPES)
def is_kind_of_array(kind: type) -> bool:
    """Return whether values of this type are arrays of any library, or stand for such."""
    return _library_of_type(kind) is not None or _is_tracer_of_jax(kind)


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


def is_distributed(array: Any) -> bool:
    """Return whether a tensor is PyTorch's DTensor, of which each process has a part."""
    return _library_of_type(type(array)) is _TORCH and hasattr(array, "device_mesh")  # type: ignore[arg-type]


def is_traced(array: Any) -> bool:
    """Return whether a tensor stands for one of a graph to come: fake, on "meta", or by make_fx."""
    if _library_of_type(type(array)) is not _TORCH:  # type: ignore[arg-type]
        return False
    torch_c = _torch_c()
    if torch_c._get_dispatch_mode(torch_c._TorchDispatchModeKey.PROXY) is not None:
        return True
    return array.is_meta or hasattr(array, "fake_mode")


def is_beside_real(array: Any) -> bool:
    """Return whether a tensor is fake, in a trace that takes real ones for constants."""
    return getattr(getattr(array, "fake_mode", None), "allow_non_fake_inputs", False)


def check_transform(name: str, array: Any) -> None:
    """Refuse a tensor that a transform has wrapped, or that has a tangent or no strides."""
    if _library_of_type(type(array)) is not _TORCH:  # type: ignore[arg-type]
        return
    functorch = _torch_c()._functorch
    if functorch.is_gradtrackingtensor(array) or functorch.is_batchedtensor(array):
        refuse_transform(name)
    if functorch.is_legacy_batchedtensor(array):  # of is_grads_batched
        refuse_transform(name)
    if functorch.is_functorch_wrapped_tensor(array):
        return  # a functional one, of a trace
    if sys.modules["torch"].autograd.forward_ad.unpack_dual(array).tangent is not None:
        raise ValueError(
            f"{name} must not carry a forward-mode tangent, which rope_cupy has no rule for, got a "
            "dual tensor"
        )
    _check_strided(name, array)  # before a new q is made of one that is not


def refuse_transform(name: str) -> NoReturn:
    """Refuse what a transform of functions wraps, of which each has a rule of its own."""
    raise TypeError(
        f"{name} must not come from a transform of torch.func (grad, vjp, jacrev, jvp, vmap, ...) "
        "or from is_grads_batched=True, for which rope_cupy has no rule: use torch.autograd.grad, "
        "and an axis of batches, got a tensor that a transform wraps"
    )


def records_gradients() -> bool:
    """Return whether PyTorch, which has been imported, records operations for gradients."""
    return _torch_c().is_grad_enabled()  # type: ignore[no-any-return]


def wants_gradient(array: Any) -> bool:
    """Return whether PyTorch wants a gradient of the array, a parameter or another subclass too."""
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    return library is not None and library.requires_grad(array) and records_gradients()


def check_gradient(name: str, array: Any) -> None:
    """Refuse an array whose gradient would be lost silently."""
    if wants_gradient(array):
        raise ValueError(
            f"{name} must not require a gradient, which is not recorded here: use torch.no_grad() "
            "or a detached tensor, got requires_grad=True"
        )


@lru_cache(maxsize=MAX_TYPES)
def _library_of_type(kind: type) -> Library | None:
    for base in kind.__mro__:
        if _full_name(base) in _LIBRARIES:
            return _LIBRARIES[_full_name(base)]
    return _OTHER if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__") else None


@lru_cache(maxsize=MAX_TYPES)
def _library_of_exact_type(kind: type) -> Library | None:
    """Return the library whose own type this is: a subclass may do anything."""
    return _LIBRARIES.get(_full_name(kind))


def _full_name(kind: type) -> tuple[str, str]:
    """Return the package of a type, which may lie in any module of it, and the type's name."""
    return str(kind.__module__).partition(".")[0], kind.__qualname__


def _is_tracer_of_jax(kind: type) -> bool:
    return any(_full_name(base) == ("jax", "Tracer") for base in kind.__mro__)


def _tell_nobody(arrays: tuple[Any, ...]) -> None:
    pass


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
def _refusals_of(name: str, array: Any) -> Iterator[None]:
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


@contextmanager
def _module_of(device: str) -> Iterator[Any]:
    """Give NumPy, or CuPy with the device current."""
    if device == "cpu":
        yield np
    else:
        with cupy().cuda.Device(cuda_index(device)):
            yield cupy()


def _computed(
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
        return tuple(map(module.asarray, function(np, *arrays)))


def _supported(name: str, device: str) -> str:
    if not device.startswith(("cpu", "cuda")):
        raise ValueError(f"{name} must be on the CPU or on a CUDA device, got {device}")
    return device


def _whole_strides(name: str, array: Any) -> tuple[int, ...]:
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


def _check_strided(name: str, array: Any) -> None:
    """Refuse a tensor of PyTorch that is not its elements at strides."""
    if array.layout is not sys.modules["torch"].strided or array.is_nested:
        kind = "nested" if array.is_nested else array.layout
        raise TypeError(f"{name} must be a strided tensor, got layout {kind}")
    if array.is_conj() or array.is_neg():
        raise ValueError(
            f"{name} must hold its own values, got a lazy view: call resolve_conj() or "
            "resolve_neg()"
        )


def _torch_pointer(name: str, array: Any) -> int:
    """Return the address of a tensor, which fake tensors do not have."""
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
def _increment_versions() -> Callable[[tuple[Any, ...]], None]:
    try:
        increment = _torch_c()._increment_version
        increment(())
        return increment  # type: ignore[no-any-return]
    except (AttributeError, TypeError, RuntimeError):  # which takes one, and none of inference mode

        def one_by_one(arrays: tuple[Any, ...]) -> None:
            for array in arrays:
                if not array.is_inference():
                    sys.modules["torch"].autograd.graph.increment_version(array)

        return one_by_one


@lru_cache(maxsize=MAX_TYPES)
def _torch_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
