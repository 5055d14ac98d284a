"""What a launch needs of the machine (CuPy, a driver, NVRTC, a kernel cache), and what mends it."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "/a/folder/that/can/be/written"
MIN_CUPY = (
    "14.2"  # before it, kernels with several template arguments are compiled in every process
)


class Fault(NamedTuple):
    """What is wrong with the machine, in a sentence, and the command that mends it.

    The errors raised for it have it as their argument, and so read "sentence: command".
    """

    wrong: str
    command: str

    def __str__(self) -> str:
        return f"{self.wrong}: {self.command}"


class Nvrtc(NamedTuple):
    """The compiler that CuPy has loaded, which need not be one for the CUDA that CuPy is for."""

    version: tuple[int, int]
    file: Path | None  # where that is known
    package: str  # that brought the file, such as "nvidia-cuda-nvrtc==13.0.88", if any did

    @property
    def major(self) -> int:
        return self.version[0]

    def __str__(self) -> str:
        owner = f" of {self.package.replace('==', ' ')}" if self.package else ""
        return f"NVRTC {'.'.join(map(str, self.version))}{owner}"


class Installed(NamedTuple):
    """Which rope_cupy runs: the files of a checkout, or those of an installed wheel.

    Attributes:
        kind: "checkout" or "installed wheel".
        folder: the folder that contains the package.
        unused: the folder of an installed wheel that Python does not use, or None.
    """

    kind: str
    folder: Path
    unused: Path | None

    def __str__(self) -> str:
        return f"{self.kind} in {self.folder}"


def installed() -> Installed:
    """Return which rope_cupy runs: in a clone, Python takes the clone before an installed wheel."""
    from importlib import metadata

    here, wheels = Path(__file__).parent.resolve(), []
    for package in metadata.distributions(name="rope-cupy"):
        if package.read_text("WHEEL"):  # that of an editable install has no folder beside it
            wheels.append(Path(str(package.locate_file("rope_cupy"))).resolve())
    if here in wheels:
        return Installed("installed wheel", here.parent, None)
    unused = [folder.parent for folder in wheels if folder.is_dir()]
    return Installed("checkout", here.parent, unused[0] if unused else None)


@cache
def cupy() -> Any:
    """Return CuPy, which every launch on a GPU needs, once it has found a driver and a GPU."""
    module = import_cupy()
    with explained():
        module.cuda.runtime.getDeviceCount()
    return module


def import_cupy() -> Any:
    """Return CuPy, with or without a GPU, or raise an ImportError that says what mends it."""
    try:
        import cupy

        version = cupy.__version__  # an empty folder, which pip may leave behind, has none
    except Exception as error:  # anything, once the files of two CuPys lie in between
        raise ImportError(_import_fault(error)) from error
    least, own = ([int(number) for number in each.split(".")[:2]] for each in (MIN_CUPY, version))
    if own < least:
        wrong = f"rope_cupy needs CuPy {MIN_CUPY} or newer, got {version}"
        raise ImportError(Fault(wrong, _install()))
    return cupy


@contextmanager
def explained() -> Iterator[None]:
    """Raise an error that is the machine's as a RuntimeError that says what mends it.

    An error that is not understood passes through unchanged.
    """
    try:
        yield
    except Exception as error:
        fault = _launch_fault(error)
        if fault is None:
            raise
        raise RuntimeError(fault) from error


def packages() -> list[str]:
    """Return the installed packages that bring CuPy, of which there may be one."""
    from importlib import metadata  # slow to import, and needed only where something is wrong

    names = {package.metadata["Name"] or "" for package in metadata.distributions()}
    return sorted(name for name in names if re.fullmatch(r"cupy(-(cuda|rocm).*)?", name))


def packages_fault() -> Fault | None:
    """Return what is wrong where several packages bring CuPy, though it may work by luck."""
    names = packages()
    if len(names) < 2:
        return None
    wrong = f"CuPy must be installed once, got {' and '.join(names)}, which overwrite each other"
    return Fault(wrong, _install())


def load_nvrtc() -> None:
    """Load the NVRTC that CuPy compiles with, and its builtins, before anything is compiled.

    The package of NVRTC 13.0 does not say where its builtins lie. CuPy's loader loads them after
    NVRTC, and takes an NVRTC that is loaded as it is: a thread that comes in between, and a program
    that has loaded NVRTC by itself, would find none.
    """
    import cupy

    major, minor = cupy.cuda.nvrtc.getVersion()
    file = nvrtc_file()
    if file:
        with suppress(OSError):  # NVRTC looks in other places, and says what it does not find
            ctypes.CDLL(str(file.with_name(f"libnvrtc-builtins.so.{major}.{minor}")))


def nvrtc() -> Nvrtc:
    """Return which NVRTC CuPy compiles with, and whose it is."""
    import cupy

    file = nvrtc_file()
    return Nvrtc(cupy.cuda.nvrtc.getVersion(), file, _owner(file) if file else "")


def nvrtc_file() -> Path | None:
    """Return the file of the NVRTC that CuPy compiles with, None where CuPy does not say it."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # through which CuPy loads it
    except ImportError:
        return None
    path = load_nvidia_dynamic_lib("nvrtc").abs_path
    return Path(path).resolve() if path else None


def _owner(file: Path) -> str:
    """Return the installed package that a file belongs to, with its version, or ""."""
    from importlib import metadata

    for package in metadata.distributions():
        if file.name in (package.read_text("RECORD") or ""):
            for path in package.files or ():
                if path.name == file.name and Path(str(path.locate())).resolve() == file:
                    return f"{package.metadata['Name']}=={package.version}"
    return ""


def nvrtc_fault(found: Nvrtc) -> Fault | None:
    """Return what is wrong where NVRTC does not fit the driver, or else CuPy."""
    return _nvrtc_driver_fault(found) or _nvrtc_cupy_fault(found)


def _nvrtc_driver_fault(found: Nvrtc) -> Fault | None:
    cuda = driver()
    if not cuda or cuda // 1000 >= found.major:
        return None
    wrong = (
        f"kernels of {found} need a driver for CUDA {found.major} or newer, "
        f"got one for {cuda_name(cuda)}"
    )
    if cuda // 1000 < cupy_cuda():
        return Fault(wrong, _install())
    remove = f"pip uninstall -y {found.package.partition('==')[0]} && " if found.package else ""
    return Fault(wrong, f"{remove}pip install --force-reinstall {_nvrtc_package(cupy_cuda())}")


def _nvrtc_cupy_fault(found: Nvrtc) -> Fault | None:
    cuda = cupy_cuda()
    if found.major == cuda:
        return None
    wrong = f"CuPy for CUDA {cuda} has found {found}, and compiles with it"
    # CuPy takes the NVRTC of the newest CUDA that it finds: one for an older CUDA changes nothing.
    if found.major > cuda:
        return Fault(wrong, _install(found.major))
    return Fault(wrong, f"pip install --force-reinstall {_nvrtc_package(cuda)}")


def driver() -> int:
    """Return the newest CUDA that the driver can run, such as 12040; 0 where there is none."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def cuda_name(version: int) -> str:
    """Return CUDA's name of a version such as 12040: "CUDA 12.4"."""
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def cache_folder() -> str:
    """Return the folder of CuPy's kernel cache."""
    return os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))


def cache_fault(error: OSError | None = None) -> Fault | None:
    """Return what keeps kernels from being cached: a folder CuPy must write, else this error."""
    import tempfile  # as slow

    for variable, folder in (("CUPY_CACHE_DIR", cache_folder()), ("TMPDIR", None)):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                file.write(bytes(2**16))
        except OSError as found:
            where = folder or "the temporary folder"
            wrong = f"kernels cannot be cached in {where} ({found.strerror})"
            return Fault(wrong, f"export {variable}={FOLDER}")
    wrong = f"kernels cannot be cached in {cache_folder()} ({error})"
    return Fault(wrong, f"export CUPY_CACHE_DIR={FOLDER}") if error else None


def _import_fault(error: Exception) -> Fault:
    names = packages()
    if not names and isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        wrong = "rope_cupy needs CuPy for arrays on a GPU, and none is installed"
        return Fault(wrong, _install())
    if isinstance(error, OSError) and not os.path.isdir(cache_folder()):
        wrong = f"CuPy needs a folder for its kernels, and cannot make {cache_folder()}"
        return Fault(f"{wrong} ({error.strerror})", f"export CUPY_CACHE_DIR={FOLDER}")
    reason = str(error.__cause__ or error).strip().partition("\n")[0]  # CuPy's own text is a page
    found = " ".join(names) or "a folder named cupy"
    wrong = f"CuPy cannot be imported, got {found} ({reason})"
    return packages_fault() or Fault(wrong, _install())


def _launch_fault(error: Exception) -> Fault | None:
    """Return what a launch failed for, None where the error's text does not say it."""
    text = str(error)
    if builtins := re.search(r"libnvrtc-builtins\.so[.\d]*\d", text):
        return _builtins_fault(builtins[0])
    if "libnvrtc" in text:
        cuda = cupy_cuda()
        wrong = f"CuPy for CUDA {cuda} compiles kernels with NVRTC, and none can be loaded"
        return Fault(wrong, f"pip install --force-reinstall {_nvrtc_package(cuda)}")
    if "cudaErrorInsufficientDriver" in text or "libcuda.so" in text:
        return _driver_fault()
    if "cudaErrorNoDevice" in text and "CUDA_VISIBLE_DEVICES" in os.environ:
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
        return Fault(f"CUDA finds no GPU, got {hidden}", "unset CUDA_VISIBLE_DEVICES")
    if "--gpu-architecture" in text or "CUDA_ERROR_NO_BINARY_FOR_GPU" in text:
        return _architecture_fault() or _nvrtc_driver_fault(nvrtc())
    if "CUDA_ERROR_INVALID_IMAGE" in text or "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in text:
        return _nvrtc_driver_fault(nvrtc())
    return None


def _builtins_fault(builtins: str) -> Fault:
    found = nvrtc()
    place = f" in {found.file.parent}" if found.file else ""
    wrong = f"{found} finds no {builtins}{place}"
    if found.package:  # which may be pinned by another: the same version again
        return Fault(wrong, f"pip install --force-reinstall --no-deps {found.package}")
    return Fault(wrong, f"pip install --force-reinstall {_nvrtc_package(found.major)}")


def _driver_fault() -> Fault | None:
    found, cuda = driver(), cupy_cuda()
    if found < 12000:
        got = f"got one for {cuda_name(found)}" if found else "and none is found"
        wrong = f"a GPU needs an NVIDIA driver for CUDA 12 or newer, {got}"
        return Fault(wrong, "sudo ubuntu-drivers install, or docker run --gpus all")
    if found < 1000 * cuda:
        wrong = f"CuPy for CUDA {cuda} needs a newer driver, got one for {cuda_name(found)}"
        return Fault(wrong, _install())
    return None


def _architecture_fault() -> Fault | None:
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)
    known = cupy.cuda.nvrtc.getSupportedArchs()
    if capability in known:
        return None
    found = nvrtc()
    wrong = (
        f"{found} compiles for compute capability {min(known) / 10} to {max(known) / 10}, "
        f"got a GPU of {capability / 10}"
    )
    if capability < min(known):
        return Fault(wrong, _install(12))
    if driver() // 1000 > found.major:
        return Fault(wrong, _install())
    return Fault(wrong, f"pip install -U {_nvrtc_package(found.major)}")


def cupy_cuda() -> int:
    """Return the CUDA that CuPy was built for: 12 or 13."""
    import cupy

    return int(cupy.cuda.runtime.runtimeGetVersion()) // 1000


def _nvrtc_package(cuda: int) -> str:
    """Return what to ask pip for to have the NVRTC of a CUDA."""
    return "nvidia-cuda-nvrtc-cu12" if cuda == 12 else f"'nvidia-cuda-nvrtc=={cuda}.*'"


def _install(cuda: int = 0) -> str:
    """Return the command that installs CuPy for the driver, in place of what is there."""
    names = packages()
    remove = f"pip uninstall -y {' '.join(names)} && " if names else ""
    cuda = cuda or (13 if driver() >= 13000 else 12)
    return f"{remove}pip install 'cupy-cuda{cuda}x>={MIN_CUPY}' {_nvrtc_package(cuda)}"
