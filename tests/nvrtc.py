"""NVRTC without a GPU: source and kernel names in, the compiler's log out."""

from cupy.cuda import nvrtc


def compiled(code: str, names: list[str], options: tuple[str, ...]) -> str:
    """Compile kernels by name; a failure is a RuntimeError with what the compiler says."""
    program = nvrtc.createProgram(code, "test.cu", [], [])
    for name in names:
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    return nvrtc.getProgramLog(program).replace("\0", "")


def ptx(code: str, name: str, options: tuple[str, ...]) -> str:
    """Return the PTX of a kernel."""
    program = nvrtc.createProgram(code, "test.cu", [], [])
    nvrtc.addNameExpression(program, name)
    nvrtc.compileProgram(program, options)
    return nvrtc.getPTX(program).decode()
