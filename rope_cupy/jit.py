"""From the sources in kernels/ to a launch: CuPy compiles at first use and caches on disk."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .plan import LaunchPlan
from .problem import Pointers


class _Stream(NamedTuple):
    ptr: int


def cupy() -> Any:
    """Import CuPy, which every launch on a GPU needs."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "rope_cupy needs CuPy for arrays on a GPU: pip install 'rope-cupy[cuda12]', or "
            "[cuda13] with CUDA 13"
        ) from error
    return cupy


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


@cache
def kernel(name: str, device: int) -> Any:
    """Return the kernel of this C++ name, loaded on `device`, which must be the current one."""
    code = (sources() / "rotary.cu").read_text(encoding="utf-8")
    module = cupy().RawModule(code=code, options=compile_options(), name_expressions=[name])
    return module.get_function(name)


def launch(plan: LaunchPlan, pointers: Pointers, device: int, stream: int) -> None:
    """Launch on a stream of a device. The block of arguments is read before this returns."""
    block = ctypes.create_string_buffer(plan.argument_block(pointers))
    with cupy().cuda.Device(device):
        argument = cupy().cuda.function.CPointer(ctypes.addressof(block))
        kernel(plan.kernel, device)(plan.grid, plan.block, (argument,), stream=_Stream(stream))
