"""From the sources in kernels/ to a launch: CuPy compiles at first use and caches on disk."""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from .environment import cache_fault, cupy, explained
from .plan import LaunchPlan
from .problem import Pointers

_kernels: dict[tuple[str, int], Any] = {}  # by C++ name and device
_locks: dict[tuple[str, int], Lock] = {}
_not_warned = Lock()  # acquired for good by the one who warns that nothing is cached


class _Stream(NamedTuple):
    ptr: int


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
        with _locks.setdefault(key, Lock()), explained():
            if key not in _kernels:
                _kernels[key] = _compiled(name)
    return _kernels[key]


def _compiled(name: str) -> Any:
    """Return a kernel by way of CuPy's cache on the disk, past it where the disk fails."""
    code, options = (sources() / "rotary.cu").read_text(encoding="utf-8"), compile_options()
    try:
        module = cupy().RawModule(code=code, options=options, name_expressions=[name])
        return module.get_function(name)
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


def launch(plan: LaunchPlan, pointers: Pointers, device: int, stream: int) -> None:
    """Launch on a stream of a device. The block of arguments is read before this returns."""
    block = ctypes.create_string_buffer(plan.argument_block(pointers))
    with cupy().cuda.Device(device):
        argument = cupy().cuda.function.CPointer(ctypes.addressof(block))
        kernel(plan.kernel, device)(plan.grid, plan.block, (argument,), stream=_Stream(stream))
