"""From the sources in kernels/ to a launch: CuPy compiles at first use and caches on disk."""

from __future__ import annotations

import ctypes
import struct
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from .environment import cache_fault, cupy, driver, explained, load_nvrtc
from .plan import LaunchPlan
from .recall import keep

_kernels: dict[tuple[str, int], Any] = {}  # by C++ name and device
_locks: dict[tuple[str, int], threading.Lock] = {}
MAX_STREAMS = 64  # that a plan is kept ready for
_not_warned = threading.Lock()  # acquired for good by the one who warns that nothing is cached


@cache
def sources() -> Path:
    """Return the folder of the kernels, to which a checkout has a link in the package."""
    folder = Path(__file__).parent / "kernels"
    if not (folder / "rotary.cu").is_file():
        raise ImportError(f"rope_cupy's kernels are missing: {folder} must hold rotary.cu")
    return folder


def compile_options() -> tuple[str, ...]:
    """Return NVRTC's options. CuPy's cache key knows no headers: a digest stands for them."""
    import hashlib  # slow to import, and needed for the first kernel only

    digest = hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(sources().glob("*.cu*")))
    ).hexdigest()
    return ("-std=c++17", f"-I{sources()}", f"-DROPE_CUPY_SOURCES=0x{digest[:16]}")


def kernel(name: str, device: int) -> Any:
    """Return the kernel of this C++ name, loaded on `device`, which must be the current one.

    Threads that ask for one at once wait while it is compiled, once; later calls take no lock.
    """
    key = name, device
    if key not in _kernels:
        with _locks.setdefault(key, threading.Lock()), explained():
            if key not in _kernels:
                _kernels[key] = _compiled(name)
    return _kernels[key]


def _compiled(name: str) -> Any:
    """Return a kernel by way of CuPy's cache on the disk, past it where the disk fails."""
    code, options = (sources() / "rotary.cu").read_text(encoding="utf-8"), compile_options()
    load_nvrtc()
    try:
        module = cupy().RawModule(code=code, options=options, name_expressions=[name])
        return module.get_function(name).kernel
    except OSError as error:
        if _not_warned.acquire(blocking=False):
            warnings.warn(RuntimeWarning(cache_fault(error)), stacklevel=2)
    cuda = cupy().cuda
    options += ("-ftz=true",)  # which RawModule adds
    cubin, mangled = cuda.compiler.compile_using_nvrtc(
        code, options, name_expressions=[name], cache_in_memory=True
    )
    module = cuda.function.Module()
    module.load(cubin)
    return module.get_function(mangled[name])


class _Thread(threading.local):
    """What CUDA knows of a thread."""

    has_context = False


_thread = _Thread()


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of the driver."""

    _fields_ = (("id", ctypes.c_int64), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig of the driver."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 6),  # grid x, y, z, block x, y, z
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: kernels/pdl.cuh is its other side.
_MAY_START_EARLY = _Attribute(6, (1,))


class Launcher:
    """A plan on a device: what its launches have in common, whatever their arguments.

    `stream_of` finds the handle of the stream to launch on, the current one of that device. What
    the driver is handed is written once, and never again, so that threads may share it.
    """

    def __init__(self, plan: LaunchPlan, device: int, stream_of: Callable[[int], int]) -> None:
        self.plan, self.device, self.stream_of = plan, device, stream_of
        self.current_device = cupy().cuda.runtime.getDevice
        self.launch = _cu_launch_kernel_ex()
        self.ready: dict[int, tuple[_Config, int, int]] = {}  # by stream; with two addresses

    def prepared(self, stream: int) -> tuple[_Config, int, int]:
        """Return the launch's configuration, its address, and that of the kernel."""
        if (self.plan.kernel, self.device) not in _kernels:
            _check_not_captured(stream)
        function = kernel(self.plan.kernel, self.device)
        sizes = (ctypes.c_uint * 6)(*self.plan.grid, 1, *self.plan.block, 1)
        early = ctypes.pointer(_MAY_START_EARLY)
        config = _Config(sizes, 0, stream, early, int(_starts_early(self.device)))
        ready = config, ctypes.addressof(config), function.ptr
        return keep(self.ready, stream, ready, MAX_STREAMS)

    def with_arguments(self, argument_block: bytes) -> Callable[[], None]:
        """Return what launches with these arguments, as often as wanted, in any thread."""
        # The driver is given the address of the address of the block, which lies behind it.
        parameters = ctypes.create_string_buffer(bytes(8) + argument_block)
        address = ctypes.addressof(parameters)
        struct.pack_into("Q", parameters, 0, address + 8)
        # A launch looks for nothing that can be found before, and so for no attribute.
        current_device, own_device, stream_of = self.current_device, self.device, self.stream_of
        ready, prepared, launch = self.ready.get, self.prepared, self.launch

        def launch_here(_kept: Any = parameters) -> None:
            device = current_device()
            if not _thread.has_context:
                # Which the driver needs, and the runtime does by itself.
                cupy().cuda.runtime.setDevice(device)
                _thread.has_context = True
            if device != own_device:
                with cupy().cuda.Device(own_device):
                    return launch_here()
            stream = stream_of(device)
            _, config, function = ready(stream) or prepared(stream)
            status = launch(config, function, address, None)  # which has read the arguments then
            if status:
                cupy().cuda.driver.check_status(status)

        return launch_here


def _check_not_captured(stream: int) -> None:
    """Refuse to load a kernel where CUDA would give up the capture for it."""
    if cupy().cuda.runtime.streamIsCapturing(stream):
        raise RuntimeError(
            "a kernel cannot be loaded while a stream is captured, and this call is the first that "
            "needs this one: make the call once before the capture"
        )


@cache
def _cu_launch_kernel_ex() -> Any:
    """Return the driver's function, which CuPy lacks: it alone lets a kernel start early."""
    function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_void_p,) * 4
    return function


@cache
def _starts_early(device: int) -> bool:
    """Return whether a kernel may start while the one before it ends, in a captured graph too."""
    capability = int(cupy().cuda.Device(device).compute_capability)
    return capability >= 90 and driver() >= 12030
