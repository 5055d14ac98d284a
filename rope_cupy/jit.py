"""From the sources in kernels/ to a launch: CuPy compiles at first use and caches on disk."""

from __future__ import annotations

import ctypes
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .bounded import put
from .environment import cache_fault, cupy, driver, explained, load_nvrtc
from .plan import LaunchPlan

_kernels: dict[tuple[str, int], Any] = {}  # by C++ name and device
_locks: dict[tuple[str, int], threading.Lock] = {}
MAX_STREAMS = 64  # for which a plan keeps what the driver is handed
POINTER_BYTES = 8
MAX_BLOCK_BYTES = 4096 - POINTER_BYTES  # of a kernel's argument, as CUDA has it
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
        kernel = _compiled_in_memory(name, code, options)
        if kernel is None:
            raise RuntimeError(cache_fault(error)) from error
        if _not_warned.acquire(blocking=False):
            warnings.warn(RuntimeWarning(cache_fault(error)), stacklevel=2)
        return kernel


def _compiled_in_memory(name: str, code: str, options: tuple[str, ...]) -> Any:
    """Return a kernel without the disk, None where CuPy has not what that takes.

    These parts of CuPy are private; they were seen in CuPy 14.2.
    """
    compiler = getattr(cupy().cuda.compiler, "compile_using_nvrtc", None)
    module_of = getattr(cupy().cuda.function, "Module", None)
    if compiler is None or module_of is None:
        return None
    options += ("-ftz=true",)  # which RawModule adds
    cubin, mangled = compiler(code, options, name_expressions=[name], cache_in_memory=True)
    module = module_of()
    module.load(cubin)
    return module.get_function(mangled[name])


_thread = threading.local()  # its `parameters` are those of `_parameters`


def _parameters() -> tuple[Any, int]:
    """Return what a thread hands to the driver, and its address, for this thread's first launch.

    It is the address of a kernel's one argument, then the argument. The driver has read both when a
    launch returns, so that the next one may write them. The driver needs a context too, which the
    runtime makes by itself.
    """
    runtime = cupy().cuda.runtime
    runtime.setDevice(runtime.getDevice())
    buffer = ctypes.create_string_buffer(POINTER_BYTES + MAX_BLOCK_BYTES)
    address = ctypes.addressof(buffer)
    struct.pack_into("Q", buffer, 0, address + POINTER_BYTES)
    _thread.parameters = buffer, address
    return buffer, address


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

    `stream_of` finds the handle of the stream to launch on, the current one of that device; `take`
    takes the argument block's items from the values that a launch is given.
    Threads may share a launcher: what the driver is handed for a stream is never written again.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        device: int,
        stream_of: Callable[[int], int],
        take: Callable[[tuple[Any, ...]], Sequence[Any]],
    ) -> None:
        if plan.packer.size > MAX_BLOCK_BYTES:
            raise ValueError(
                f"an argument block must fit {MAX_BLOCK_BYTES} bytes, got {plan.packer.size}"
            )
        self.plan, self.device, self.stream_of, self.take = plan, device, stream_of, take
        self.configs: dict[int, tuple[_Config, int, int]] = {}  # by stream: see `config_for`
        self.launch = self._launch_function()

    def config_for(self, stream: int) -> tuple[_Config, int, int]:
        """Return the launch's configuration on a stream, its address, and that of the kernel."""
        if (self.plan.kernel, self.device) not in _kernels:
            _check_not_captured(stream)
        function = kernel(self.plan.kernel, self.device)
        sizes = (ctypes.c_uint * 6)(*self.plan.grid, 1, *self.plan.block, 1)
        early = ctypes.pointer(_MAY_START_EARLY)
        config = _Config(sizes, 0, stream, early, int(_starts_early(self.device)))
        return put(
            self.configs, stream, (config, ctypes.addressof(config), function.ptr), MAX_STREAMS
        )

    def _launch_function(self) -> Callable[[tuple[Any, ...]], None]:
        """Return what launches with the values that `take` takes from, in any thread."""
        # A launch looks for nothing that can be found before, and so for no attribute.
        current_device, cu_launch = cupy().cuda.runtime.getDevice, _cu_launch_kernel_ex()
        own_device, stream_of, take = self.device, self.stream_of, self.take
        config_of, config_for = self.configs.get, self.config_for
        pack_into = self.plan.packer.pack_into

        def launch(values: tuple[Any, ...]) -> None:
            try:
                buffer, address = _thread.parameters
            except AttributeError:
                buffer, address = _parameters()
            device = current_device()
            if device != own_device:
                with cupy().cuda.Device(own_device):
                    return launch(values)
            stream = stream_of(device)
            _, config, function = config_of(stream) or config_for(stream)
            pack_into(buffer, POINTER_BYTES, *take(values))
            status = cu_launch(config, function, address, None)
            if status:
                cupy().cuda.driver.check_status(status)

        return launch


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
