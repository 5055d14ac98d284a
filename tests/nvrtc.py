"""NVRTC without a GPU: source and kernel names in, the compiler's log or PTX out."""

from __future__ import annotations

from typing import Any


def compiled(code: str, names: list[str], options: tuple[str, ...]) -> str:
    """Compile kernels by name and return the log; a failure is a RuntimeError with what it says."""
    nvrtc, program = _compile(code, names, options)
    return nvrtc.getProgramLog(program).replace("\0", "")


def ptx(code: str, name: str, options: tuple[str, ...]) -> str:
    """Return the PTX of a kernel."""
    nvrtc, program = _compile(code, [name], options)
    return nvrtc.getPTX(program).decode()


def _compile(code: str, names: list[str], options: tuple[str, ...]) -> tuple[Any, Any]:
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, "test.cu", [], [])
    for name in names:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    return nvrtc, program
