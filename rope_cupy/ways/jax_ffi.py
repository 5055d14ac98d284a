"""The function that XLA calls when a compiled program rotates: XLA's FFI, through ctypes.

The structures are those of xla/ffi/api/c_api.h (`jax.ffi.include_dir()`), version 0. Each begins
with its size and grows at its end. A smaller structure or another version is refused when JAX
registers the function, and a program that is traced then raises an error with the reason.

The kernel is launched on XLA's stream, and the host does not wait for it. XLA's threads call the
function too, so it takes Python's lock. It never says that it can be captured in a command buffer
(a CUDA graph): the first launch of a kernel loads it, which a capture forbids.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import time
from ast import literal_eval
from collections.abc import Sequence
from contextlib import suppress
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
    string_at,
)
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from .. import eager
from ..bounded import put
from ..call import MAX_KINDS, Call, Kind, kind_of_text, text_of
from ..environment import cupy
from ..memory import ndarray_at
from ..prepared import Prepared
from ..table_forms import TableSource

TARGET = "rope_cupy_rotate"
ATTRIBUTE = "call"  # all of a call but its arrays
PLATFORMS = "cpu", "CUDA"
MAJOR = 0  # the version of the structures below
METADATA = 1  # the type of an extension that asks for the version
STRING = 4  # the type of an attribute
INVALID_ARGUMENT, INTERNAL = 3, 13  # codes of errors
QUIET_SECONDS = 0.02
DTYPES: dict[int, np.dtype[Any]] = {  # by XLA's numbers
    1: np.dtype(np.bool_),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.uint8),
    7: np.dtype(np.uint16),
    8: np.dtype(np.uint32),
    9: np.dtype(np.uint64),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    12: np.dtype(np.float64),
    15: np.dtype(np.complex64),
    16: np.dtype(ml_dtypes.bfloat16),
    18: np.dtype(np.complex128),
}


class _Extension(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)]


class _Version(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("major", c_int),
        ("minor", c_int),
    ]


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32)]


class _MetadataExtension(ctypes.Structure):
    _fields_ = [("base", _Extension), ("metadata", POINTER(_Metadata))]


class _Api(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("error_create", c_void_p),
        ("error_details", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("items", POINTER(c_void_p)),
    ]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", POINTER(c_void_p)),
        ("items", POINTER(c_void_p)),
    ]


class _Frame(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class _Text(ctypes.Structure):
    _fields_ = [("start", c_void_p), ("size", c_size_t)]


class _ErrorArguments(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("message", c_char_p),
        ("code", c_int),
    ]


class _StreamArguments(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("context", c_void_p),
        ("stream", c_void_p),
    ]


Buffer = tuple[int, int, tuple[int, ...]]  # an address, XLA's number of a dtype, and a shape


class Words(NamedTuple):
    """The dtype and shape of a 64-bit constant, which a program holds as words of 32 bits.

    JAX would narrow the constant itself.
    """

    dtype: str
    shape: tuple[int, ...]


class Program(NamedTuple):
    """All of a call but its arrays: the xs, then the arrays of the table, then the extra ones."""

    kind: Kind
    position_offset: int | None
    words: tuple[Words | None, ...]  # of each array, None where it has its own dtype

    @property
    def text(self) -> str:
        """The program as a text, which a compiled program keeps, also in another process."""
        words = [each and tuple(each) for each in self.words]
        return repr((text_of(self.kind), self.position_offset, words))


@lru_cache(maxsize=MAX_KINDS)
def _program_of(text: bytes) -> Program:
    """Return the program of a text. Its options are checked again."""
    kind_text, offset, words = literal_eval(text.decode())
    kind, _ = kind_of_text(kind_text)
    return Program(kind, offset, tuple([each and Words(*each) for each in words]))


def call_ffi(program: Program, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Add a rotation to the program that JAX traces; return its results, like the xs."""
    xs = arrays[: len(program.kind.names)]
    results = [jax.typeof(x).update(weak_type=False) for x in xs]
    function = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    return tuple(function(*arrays, **{ATTRIBUTE: program.text}))


class _UnknownError(Exception):
    """The version or a structure is not a known one."""


_calls = [0]  # the number of calls so far
_refused: list[str] = []  # reasons of platforms to refuse the function
_known: dict[Any, Prepared] = {}  # by a program, a device, and all of buffers but addresses


@lru_cache(maxsize=1)
def register() -> str | None:
    """Register the function with JAX for each platform; return why that is impossible, or None."""
    jax.local_devices()  # so that platforms ask for the version now, not when they compile
    try:
        for platform in PLATFORMS:
            capsule = jax.ffi.pycapsule(_handlers[platform])  # type: ignore[no-untyped-call]
            jax.ffi.register_ffi_target(TARGET, capsule, platform=platform)
    except Exception as error:  # whatever JAX raises
        _refused.append(str(error).partition("\n")[0])
    atexit.register(_wait_for_programs)  # runs before JAX, imported earlier, destroys its devices
    return _refused[0] if _refused else None


def _wait_for_programs() -> None:
    """Wait for programs that still run, because they cannot call Python after it has ended.

    A device runs the programs of a thread in their order, so one more comes behind those of this
    thread, whether their results have been kept or not.
    """
    for platform in PLATFORMS:
        with suppress(Exception):  # of a platform that JAX does not have
            for device in jax.local_devices(backend=platform.lower()):
                (jax.device_put(0, device) + 1).block_until_ready()
    for array in jax.live_arrays():  # type: ignore[no-untyped-call]
        with suppress(Exception):  # of a program that has failed
            array.block_until_ready()
    before = -1
    while before != _calls[0]:  # of other threads' programs whose results have not been kept
        before = _calls[0]
        time.sleep(QUIET_SECONDS)


def _handle(platform: str, pointer: Any) -> int | None:
    """Run one call; return None, or an error of XLA.

    No exception may pass through XLA, not even an interrupt.
    """
    frame: _Frame = pointer[0]
    try:
        if frame.extension and frame.extension[0].type == METADATA:
            _report_version(frame)
        else:
            _calls[0] += 1
            _rotate(platform, frame)
    except BaseException as error:
        return _error(frame, error)
    return None


# XLA keeps their addresses for as long as the process lives, and so does this module.
_handlers = {
    each: CFUNCTYPE(c_void_p, POINTER(_Frame))(partial(_handle, each)) for each in PLATFORMS
}


def _report_version(frame: _Frame) -> None:
    """Report the version of the function to XLA, or refuse a version that is not known."""
    try:
        if not frame.api:
            raise _UnknownError("a frame without functions of XLA's FFI")
        api = frame.api[0]
        if api.version.major != MAJOR:
            raise _UnknownError(f"version {api.version.major}.{api.version.minor} of XLA's FFI")
        _check_size(frame)
        _check_size(api)
        extension = ctypes.addressof(frame.extension[0])
        metadata = _MetadataExtension.from_address(extension).metadata[0]
        _check_size(metadata)
    except _UnknownError as error:
        _refused.append(f"{error} is not known")
        raise
    metadata.version.major, metadata.version.minor = api.version.major, api.version.minor
    metadata.traits = 0  # no command buffer


def _check_size(structure: Any) -> None:
    """Refuse a structure that ends before the last of the fields that are read."""
    kind = type(structure)
    last = getattr(kind, kind._fields_[-1][0])
    if structure.struct_size < last.offset + last.size:
        size = structure.struct_size
        raise _UnknownError(f"a structure {kind.__name__} of {size} bytes of XLA's FFI")


def _error(frame: _Frame, error: BaseException) -> int | None:
    """Return an error of XLA, which XLA will destroy."""
    if not frame.api:
        return None  # no version has been reported, which XLA refuses
    is_of_caller = isinstance(error, TypeError | ValueError)
    try:
        message = str(error) if is_of_caller else repr(error)
    except Exception:  # of an exception that has no text
        message = type(error).__name__
    arguments = _ErrorArguments(
        ctypes.sizeof(_ErrorArguments),
        None,
        f"rope_cupy: {message}".encode(errors="replace"),
        INVALID_ARGUMENT if is_of_caller else INTERNAL,
    )
    create = CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))(frame.api[0].error_create)
    found: int | None = create(ctypes.byref(arguments))
    return found


def _rotate(platform: str, frame: _Frame) -> None:
    text = _attribute(frame.attributes)
    outs = _read(frame.results)
    found = _read(frame.arguments) + outs
    if platform == "cpu":
        _run(text, None, found)
        return
    written = [pointer for pointer, _, shape in outs if 0 not in shape]
    if not written:
        return
    cuda = cupy().cuda
    device = cuda.runtime.pointerGetAttributes(written[0]).device
    stream = _Stream(_stream(frame))
    with cuda.Device(device), cuda.Stream.from_external(stream):  # the current one of that device
        _run(text, device, found)


def _run(text: bytes, device: int | None, found: list[Buffer]) -> None:
    """Rotate buffers of a GPU, or of the CPU: arguments, then results.

    A program that has run before is found by all but their addresses, and no array is made.
    """
    program, at = _program_of(text), tuple([pointer for pointer, *_ in found])
    key = text, device, *[each[1:] for each in found]
    prepared = _known.get(key)
    if prepared is not None and prepared.fits(at):
        prepared.write(at, program.position_offset)
        return
    call = _call(program, device, found)
    eager.rotate(call)
    prepared, *_ = eager.find(call)
    if prepared is not None:
        put(_known, key, prepared, eager.MAX_PREPARED)


def _call(program: Program, device: int | None, found: list[Buffer]) -> Call:
    """Return the call of arrays of NumPy or CuPy at the addresses of buffers."""
    shaped = [(pointer, _dtype(number), shape) for pointer, number, shape in found]
    for i, words in enumerate(program.words):
        if words:
            shaped[i] = shaped[i][0], np.dtype(words.dtype), words.shape
    array = _on_cpu if device is None else partial(_on_gpu, device)
    arrays = [array(*each) for each in shaped]
    kind = program.kind
    num_xs, num_extra = len(kind.names), len(kind.extra_names)
    begin = len(arrays) - num_xs  # of the results, of which there are as many as xs
    xs, outs = (*arrays[:num_xs],), (*arrays[begin:],)
    parts, extra = (*arrays[num_xs : begin - num_extra],), (*arrays[begin - num_extra : begin],)
    table = TableSource(kind.form, parts)
    return Call(kind, xs, table, extra, program.position_offset, outs)


def _attribute(attributes: _Attributes) -> bytes:
    """Return the text of the program."""
    for i in range(attributes.size):
        if attributes.types[i] == STRING and _text_at(attributes.names[i]) == ATTRIBUTE.encode():
            return _text_at(attributes.items[i])
    raise ValueError(f"{TARGET} must have the attribute {ATTRIBUTE!r}, a string, got none")


def _text_at(address: int) -> bytes:
    text = _Text.from_address(address)
    return string_at(text.start, text.size)


def _read(buffers: _Buffers) -> list[Buffer]:
    """Read buffers of XLA. Their elements are contiguous, in the order of their axes."""
    read = map(_Buffer.from_address, buffers.items[: buffers.size])
    return [(each.data or 0, each.dtype, (*each.dims[: each.rank],)) for each in read]


def _dtype(number: int) -> np.dtype[Any]:
    dtype = DTYPES.get(number)
    if dtype is None:
        raise TypeError(f"an array must have a dtype that is known, got XLA's {number}")
    return dtype


def _on_cpu(pointer: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Return an array of NumPy at an address."""
    size = math.prod(shape) * dtype.itemsize
    return ndarray_at(pointer, "u1", (size,), (1,)).view(dtype).reshape(shape)


def _on_gpu(device: int, pointer: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """Return an array of CuPy at an address."""
    cuda, size = cupy().cuda, math.prod(shape) * dtype.itemsize
    memory = cuda.UnownedMemory(pointer, size, None, device)
    return cupy().ndarray(shape, dtype, cuda.MemoryPointer(memory, 0))


class _Stream(NamedTuple):
    """A stream of XLA, for CuPy."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle  # the version of the protocol


def _stream(frame: _Frame) -> int:
    """Return the handle of XLA's stream."""
    arguments = _StreamArguments(ctypes.sizeof(_StreamArguments), None, frame.context, None)
    get = CFUNCTYPE(c_void_p, POINTER(_StreamArguments))(frame.api[0].stream_get)
    if get(ctypes.byref(arguments)):
        raise RuntimeError("XLA must have a stream for a call on a GPU, got an error")
    return arguments.stream or 0
