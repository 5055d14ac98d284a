"""What XLA calls when a compiled program comes to a rotation: its FFI, reached by ctypes.

The records are those of xla/ffi/api/c_api.h (`jax.ffi.include_dir()`), version 0. Each begins with
its size, and grows at its end: a smaller one, or another version, is refused when JAX registers
the function, and the caller is told so where the program is traced.

The kernel is launched on XLA's stream. Nothing is claimed of command buffers: the first launch of a
kernel loads it, which a capture forbids.
"""

from __future__ import annotations

import atexit
import ctypes
import time
from ast import literal_eval
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p, cast
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from .. import eager
from ..call import MAX_KINDS, Call, Kind, kind_of_text, text_of
from ..environment import cupy
from ..memory import ndarray_at
from ..table_forms import TableSource

TARGET = "rope_cupy_rotate"
ATTRIBUTE = "call"  # all of a call but its arrays
PLATFORMS = "cpu", "CUDA"
MAJOR = 0  # of the version whose records these are
METADATA = 1  # what an extension of a frame asks for
STRING = 4  # of attributes
QUIET_SECONDS = 0.02
INVALID_ARGUMENT, INTERNAL = 3, 13  # codes of errors
DTYPES = {
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


class Words(NamedTuple):
    """What words of 32 bits stand for, which a program has for a dtype that JAX would narrow."""

    dtype: str
    shape: tuple[int, ...]


class Program(NamedTuple):
    """All of a call but its arrays, of which the last are those of the table, then the extra."""

    kind: Kind
    position_offset: int | None
    words: tuple[Words | None, ...]  # for each array, None for one that is what it is

    @property
    def text(self) -> str:
        """A text, by which a stored program has this in another process too."""
        words = [each and tuple(each) for each in self.words]
        return repr((text_of(self.kind), self.position_offset, words))


@lru_cache(maxsize=MAX_KINDS)
def _program_of(text: bytes) -> Program:
    """Return what a text stands for. Options are checked again."""
    kind_text, offset, words = literal_eval(text.decode())
    kind, _ = kind_of_text(kind_text)
    return Program(kind, offset, tuple([each and Words(*each) for each in words]))


def call_ffi(program: Program, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Put a rotation into the program that JAX traces, of arrays of its own."""
    xs = arrays[: len(program.kind.names)]
    results = [jax.typeof(x).update(weak_type=False) for x in xs]
    function = jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")
    return tuple(function(*arrays, **{ATTRIBUTE: program.text}))


class _UnknownError(Exception):
    """The records are not the known ones."""


_calls = [0]  # how many there have been
_refused: list[str] = []  # why a platform has not taken the function


@lru_cache(maxsize=1)
def register() -> str | None:
    """Let JAX know the function on each of its platforms; return why it cannot, or None."""
    jax.local_devices()  # platforms ask for the version now, and not when a program is compiled
    try:
        for platform in PLATFORMS:
            capsule = jax.ffi.pycapsule(_handlers[platform])  # type: ignore[no-untyped-call]
            jax.ffi.register_ffi_target(TARGET, capsule, platform=platform)
    except Exception as error:  # whatever JAX raises
        _refused.append(str(error).partition("\n")[0])
    atexit.register(_let_end)  # before JAX, which was imported earlier, clears its devices
    return _refused[0] if _refused else None


def _let_end() -> None:
    """Let programs that still run come to their end, while they may call Python.

    JAX waits for them without letting go of Python when the interpreter ends.
    """
    for array in jax.live_arrays():  # type: ignore[no-untyped-call]
        with suppress(Exception):  # of a program that has failed
            array.block_until_ready()
    before = -1
    while before != _calls[0]:  # others have results that no one has kept
        before = _calls[0]
        time.sleep(QUIET_SECONDS)


def _handle(platform: str, pointer: Any) -> int | None:
    """Rotate what a frame tells; return None, or the error of XLA that says what is wrong."""
    frame: _Frame = pointer[0]
    try:
        if frame.extension and frame.extension[0].type == METADATA:
            _tell_version(frame)
        else:
            _calls[0] += 1
            _rotate(platform, frame)
    except BaseException as error:  # none may go through XLA, not even an interrupt
        return _error(frame, error)
    return None


_handlers = {
    each: CFUNCTYPE(c_void_p, POINTER(_Frame))(partial(_handle, each)) for each in PLATFORMS
}


def _tell_version(frame: _Frame) -> None:
    """Tell XLA that the function knows this version, where it does."""
    try:
        if not frame.api:
            raise _UnknownError("a frame without functions of XLA's FFI")
        api = frame.api[0]
        if api.version.major != MAJOR:
            raise _UnknownError(f"version {api.version.major}.{api.version.minor} of XLA's FFI")
        _check_size(frame)
        _check_size(api)
        metadata = cast(frame.extension, POINTER(_MetadataExtension))[0].metadata[0]
        _check_size(metadata)
    except _UnknownError as error:
        _refused.append(f"{error} is not known")
        raise
    metadata.version.major, metadata.version.minor = api.version.major, api.version.minor
    metadata.traits = 0


def _check_size(record: Any) -> None:
    """Refuse a record that ends before the last of the fields that are read."""
    kind = type(record)
    last = getattr(kind, kind._fields_[-1][0])
    if record.struct_size < last.offset + last.size:
        raise _UnknownError(f"a record {kind.__name__} of {record.struct_size} bytes of XLA's FFI")


def _error(frame: _Frame, error: BaseException) -> int | None:
    if not frame.api:
        return None  # of no version, which XLA refuses
    is_of_caller = isinstance(error, TypeError | ValueError)
    message = f"rope_cupy: {error}" if is_of_caller else f"rope_cupy: {error!r}"
    arguments = _ErrorArguments(
        ctypes.sizeof(_ErrorArguments),
        None,
        message.encode(),
        INVALID_ARGUMENT if is_of_caller else INTERNAL,
    )
    create = CFUNCTYPE(c_void_p, POINTER(_ErrorArguments))(frame.api[0].error_create)
    found: int | None = create(ctypes.byref(arguments))
    return found


def _rotate(platform: str, frame: _Frame) -> None:
    program = _program_of(_attribute(frame.attributes))
    found = [_buffer(item) for item in frame.arguments.items[: frame.arguments.size]]
    results = [_buffer(item) for item in frame.results.items[: frame.results.size]]
    for i, words in enumerate(program.words):
        if words:
            found[i] = found[i][0], np.dtype(words.dtype), words.shape
    if platform == "cpu":
        _run(program, [*map(_on_cpu, found)], [*map(_on_cpu, results)])
        return
    known = [pointer for pointer, _, _ in (*results, *found) if pointer]
    if not known:  # not one element
        return
    device = cupy().cuda.runtime.pointerGetAttributes(known[0]).device
    with ExitStack() as stack:
        for each in _contexts(device, _stream(frame)):
            stack.enter_context(each)
        on_gpu = partial(_on_gpu, device)
        _run(program, [*map(on_gpu, found)], [*map(on_gpu, results)])


def _run(program: Program, given: list[Any], outs: list[Any]) -> None:
    kind = program.kind
    num_xs, num_extra = len(kind.names), len(kind.extra_names)
    end = len(given) - num_extra
    table = TableSource(kind.form, (*given[num_xs:end],))
    xs, extra = (*given[:num_xs],), (*given[end:],)
    eager.rotate(Call(kind, xs, table, extra, program.position_offset, (*outs,)))


def _attribute(attributes: _Attributes) -> bytes:
    """Return the text that tells the call."""
    for i in range(attributes.size):
        name = cast(attributes.names[i], POINTER(_Text))[0]
        if ctypes.string_at(name.start, name.size).decode() == ATTRIBUTE:
            text = cast(attributes.items[i], POINTER(_Text))[0]
            return ctypes.string_at(text.start, text.size)
    raise ValueError("the program must tell what is rotated, got no such attribute")


Buffer = tuple[int, "np.dtype[Any]", tuple[int, ...]]  # an address, dtype and shape


def _buffer(item: int) -> Buffer:
    """Return what is known of a buffer, whose elements lie in the order of its axes."""
    buffer = cast(item, POINTER(_Buffer))[0]
    dtype = DTYPES.get(buffer.dtype)
    if dtype is None:
        raise TypeError(f"an array must have a dtype that is known, got XLA's {buffer.dtype}")
    return buffer.data or 0, dtype, (*buffer.dims[: buffer.rank],)


def _on_cpu(buffer: Buffer) -> Any:
    """View a buffer as an array of NumPy."""
    pointer, dtype, shape = buffer
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return ndarray_at(pointer, "u1", (size,), (1,)).view(dtype).reshape(shape)


def _on_gpu(device: int, buffer: Buffer) -> Any:
    """View a buffer as an array of CuPy."""
    pointer, dtype, shape = buffer
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = cupy().cuda.UnownedMemory(pointer, size, None, device)
    return cupy().ndarray(shape, dtype, cupy().cuda.MemoryPointer(memory, 0))


def _stream(frame: _Frame) -> int:
    """Return the handle of the stream that XLA wants the work on."""
    arguments = _StreamArguments(ctypes.sizeof(_StreamArguments), None, frame.context, None)
    get = CFUNCTYPE(c_void_p, POINTER(_StreamArguments))(frame.api[0].stream_get)
    if get(ctypes.byref(arguments)):
        raise RuntimeError("XLA must tell its stream, got an error")
    return arguments.stream or 0


def _contexts(device: int, stream: int) -> tuple[AbstractContextManager[Any], ...]:
    """Return what makes a device and a stream CuPy's current ones."""
    cuda = cupy().cuda
    return cuda.Device(device), cuda.ExternalStream(stream, device)
