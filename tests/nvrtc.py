"""NVRTC without a GPU: source and kernel names in, the compiler's log or PTX out."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

REGISTERS = 65536  # of a multiprocessor, which threads take by eights, and one thread 255 at most
NOTHING = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    registers: int  # of a thread
    most_registers: int  # that its launch bounds leave a thread
    memory: str  # beside them


def compiled(code: str, names: list[str], options: tuple[str, ...]) -> str:
    """Compile kernels by name and return the log; a failure is a RuntimeError with what it says."""
    nvrtc, program = _compile(code, names, options)
    return nvrtc.getProgramLog(program).replace("\0", "")


def ptx(code: str, name: str, options: tuple[str, ...]) -> str:
    """Return the PTX of a kernel."""
    nvrtc, program = _compile(code, [name], options)
    return nvrtc.getPTX(program).decode()


def usage(code: str, names: list[str], options: tuple[str, ...]) -> tuple[str, dict[str, Usage]]:
    """Compile kernels to machine code; the log, and what each takes by name."""
    nvrtc, program = _compile(code, names, (*options, "--ptxas-options=-v"))
    log, code = nvrtc.getProgramLog(program), nvrtc.getPTX(program).decode()
    told = r"Function properties for {}\n.* (\d+ bytes stack.*)\n.*Used (\d+) registers"
    bounds = r"\.entry {}\([^)]*\)\s+\.maxntid (\d+)(?:, 1, 1)?\s+(?:\.minnctapersm (\d+))?"
    usages = {}
    for name in names:
        entry = re.escape(nvrtc.getLoweredName(program, name))
        ((memory, used),) = re.findall(told.format(entry), log)
        ((threads, blocks),) = re.findall(bounds.format(entry), code)
        most = REGISTERS // (int(threads) * int(blocks or 1)) // 8 * 8
        usages[name] = Usage(int(used), min(most, 255), memory)
    return log, usages


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
