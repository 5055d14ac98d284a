"""From the sources in kernels/ to a launch: CuPy compiles at first use and caches on disk."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from .environment import cache_fault, cupy, explained
from .plan import LaunchPlan

_kernels: dict[tuple[str, int], Any] = {}  # by C++ name and device
_locks: dict[tuple[str, int], threading.Lock] = {}
_not_warned = threading.Lock()  # acquired for good by the one who warns that nothing is cached


@cache
def sources() -> Path:
    """Return the folder of the kernels: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "rotary.cu").is_file():
            return folder
    raise ImportError(
        f"rope_cupy's kernels are missing: no kernels/rotary.cu in {package} or beside it"
    )


def compile_options() -> tuple[str, ...]:
    """Return NVRTC's options. CuPy's cache key knows no headers: a digest stands for them."""
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


class Arguments:
    """The argument block of a launch at an address of its own, as the driver wants to be told."""

    def __init__(self, block: bytes) -> None:
        self._block = ctypes.create_string_buffer(block)
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._block))
        self.address = ctypes.addressof(self._parameters)


def launch(plan: LaunchPlan, arguments: Arguments, device: int, stream: int) -> None:
    """Launch on a stream of a device. The arguments are read before this returns."""
    cuda = cupy().cuda
    current = cuda.runtime.getDevice()
    if not _thread.has_context:
        cuda.runtime.setDevice(current)  # which the driver needs, and the runtime does by itself
        _thread.has_context = True
    if current != device:
        with cuda.Device(device):
            return launch(plan, arguments, device, stream)
    function = kernel(plan.kernel, device)
    cuda.driver.launchKernel(
        function.ptr, *plan.grid, 1, *plan.block, 1, 0, stream, arguments.address, 0
    )
