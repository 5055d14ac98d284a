"""The environment as users have it: a call works, or one error says which command mends it.

Where a condition can be made, an interpreter of its own meets it, which sees a folder of packages
and nothing else; a stand-in for CuPy has the drivers and GPUs that this machine has not.
"""

import re
import shlex
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from interpreters import (
    CALL,
    DOCTOR,
    FULL,
    MOVE_CACHE,
    assert_warns_of,
    cupy_is,
    link,
    pip_has,
    python,
    says,
    table,
)

from rope_cupy import __main__ as program
from rope_cupy import environment

EXTRA = "cuda13" if environment.driver() >= 13000 else "cuda12"
SETUP = ConfigParser()
SETUP.read(Path(__file__).parents[2] / "setup.cfg", encoding="utf-8")
COMMANDS = {  # the extras of setup.cfg, as pip is asked for them
    extra: " ".join(["pip install", *map(shlex.quote, requirements.split())])
    for extra, requirements in SETUP["options.extras_require"].items()
    if extra.startswith("cuda")
}
INSTALL = COMMANDS[EXTRA]
DRIVER = "sudo ubuntu-drivers install, or docker run --gpus all"
SEVERAL = (
    "CuPy must be installed once, got cupy-cuda12x and cupy-cuda13x, which overwrite each other"
)


@pytest.fixture
def site(tmp_path):
    """A folder of packages for an interpreter, with NumPy in it."""
    folder = tmp_path / "site"
    folder.mkdir()
    link(folder, "numpy")
    return folder


def not_installed(site):
    return "rope_cupy needs CuPy for arrays on a GPU, and none is installed", INSTALL


def left_behind(site):
    (site / "cupy").mkdir()
    reason = "module 'cupy' has no attribute '__version__'"
    return f"CuPy cannot be imported, got a folder named cupy ({reason})", INSTALL


def without_its_files(site):
    pip_has(site, "cupy-cuda12x")
    reason = "No module named 'cupy'"
    command = f"pip uninstall -y cupy-cuda12x && {INSTALL}"
    return f"CuPy cannot be imported, got cupy-cuda12x ({reason})", command


def without_a_library(site):
    pip_has(site, "cupy-cuda12x")
    reason = "libcublas.so.12: cannot open shared object file"
    cupy_is(
        site,
        f"""
try:
    raise ImportError({reason!r})
except ImportError as error:
    raise ImportError("\\n====\\nA page.\\n====\\n") from error
""",
    )
    command = f"pip uninstall -y cupy-cuda12x && {INSTALL}"
    return f"CuPy cannot be imported, got cupy-cuda12x ({reason})", command


def half_overwritten(site):
    pip_has(site, "cupy-cuda12x")
    pip_has(site, "cupy-cuda13x")
    cupy_is(site, "import numpy; numpy.nothing_of_that_name")
    command = f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {INSTALL}"
    return SEVERAL, command


def too_old(site):
    pip_has(site, "cupy-cuda12x", "13.6.0")
    cupy_is(site, "__version__ = '13.6.0'")
    command = f"pip uninstall -y cupy-cuda12x && {INSTALL}"
    return "rope_cupy needs CuPy 14.2 or newer, got 13.6.0", command


def without_a_cache(site):
    link(site, "cupy")
    reason = "cannot make /proc/no/cache (No such file or directory)"
    return f"CuPy needs a folder for its kernels, and {reason}", MOVE_CACHE


@pytest.mark.parametrize(
    "condition",
    [
        not_installed,
        left_behind,
        without_its_files,
        without_a_library,
        half_overwritten,
        too_old,
        without_a_cache,
    ],
)
def test_without_a_cupy_that_can_be_imported_it_is_an_error_that_mends_it(condition, site):
    wrong, command = condition(site)
    called = python(CALL, site, CUPY_CACHE_DIR="/proc/no/cache")
    assert called.returncode == 0, called.stderr
    assert called.stdout.splitlines() == [f"ImportError: {wrong}: {command}"] * 2

    seen = python(DOCTOR, site, CUPY_CACHE_DIR="/proc/no/cache")
    assert says(table(seen.stdout, seen.stderr), "why", wrong, command)
    optional = condition in (not_installed, left_behind)  # then a GPU is not missed
    assert seen.returncode == (program._gpu_is_there() and not optional)


@pytest.mark.skipif(environment.driver() != 0, reason="there is a driver here")
def test_without_a_driver_arrays_on_a_gpu_are_an_error_that_mends_it(site):
    link(site, "cupy")
    wrong = "a GPU needs an NVIDIA driver for CUDA 12 or newer, and none is found"
    called = python(CALL, site)
    assert called.stdout.splitlines() == [f"RuntimeError: {wrong}: {DRIVER}"] * 2
    seen = python(DOCTOR, site)
    assert says(table(seen.stdout, seen.stderr), "why", wrong, DRIVER)
    assert seen.returncode == 0


def test_a_missing_nvrtc_is_diagnosed_without_a_gpu_as_well(site):
    link(site, "cupy")  # and not the package nvidia
    seen = python(DOCTOR, site)
    rows = dict(table(seen.stdout, seen.stderr))
    if rows["NVRTC"] == "none can be loaded":
        (cuda,) = re.findall(r"cuda(1\d)x", " ".join(environment.packages()))
        wrong = f"CuPy for CUDA {cuda} compiles kernels with NVRTC, and none can be loaded"
        package = {"12": "nvidia-cuda-nvrtc-cu12", "13": "'nvidia-cuda-nvrtc==13.*'"}[cuda]
        command = f"pip install --force-reinstall {package}"
        assert says(table(seen.stdout, seen.stderr), "why", wrong, command)
        assert seen.returncode == program._gpu_is_there()
    else:
        pytest.skip(f"NVRTC {rows['NVRTC']} is found on the system")


def test_the_program_says_which_nvrtc_is_loaded_whose_it_is_and_where_it_lies():
    nvrtc = pytest.importorskip("cupy.cuda.nvrtc")
    try:
        major, minor = nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(str(error).partition("\n")[0])
    seen = python(DOCTOR)
    rows = dict(table(seen.stdout, seen.stderr))
    file = Path(rows["library"])
    assert file.is_file() and re.fullmatch(rf"libnvrtc\.so\.{major}[.\d]*", file.name)
    version, _, owner = rows["NVRTC"].partition(" of ")
    assert version == f"{major}.{minor}"
    if "site-packages" in file.parts:
        name, version = owner.split()
        assert version == metadata.version(name)
        assert file in [path.locate().resolve() for path in metadata.files(name)]


def test_the_owner_of_a_file_is_the_package_that_records_it(site, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(site)])
    for name, folder in (("nvidia-cuda-nvrtc-cu12", "cuda_nvrtc"), ("nvidia-cuda-nvrtc", "cu13")):
        pip_has(site, name, "13.0.88")
        (site / "nvidia" / folder / "lib").mkdir(parents=True)
        (site / "nvidia" / folder / "lib" / "libnvrtc.so.13").write_text("")
        (record,) = site.glob(f"{name.replace('-', '_')}-13*/")
        (record / "RECORD").write_text(f"nvidia/{folder}/lib/libnvrtc.so.13,,\n")
    file = site / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    assert environment._owner(file) == "nvidia-cuda-nvrtc==13.0.88"
    assert environment._owner(site / "libnvrtc.so.13") == ""


def test_several_packages_of_cupy_that_work_are_a_warning(tmp_path):
    pytest.importorskip("cupy")
    for name in ("cupy-cuda12x", "cupy-cuda13x"):
        if name not in environment.packages():
            pip_has(tmp_path, name)
    seen = python(f"import sys; sys.path.append({str(tmp_path)!r})\n{DOCTOR}")
    command = f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {INSTALL}"
    assert says(table(seen.stdout, seen.stderr), "warning", SEVERAL, command)
    assert seen.returncode == 0


USE_CUDA = """
import cupy
try:
    cupy.empty(1)  # so that CUDA, where there is one, has written what it must
except RuntimeError:
    pass
"""


@pytest.mark.parametrize("condition", ["read-only", "full"])
def test_a_cache_that_cannot_be_written_is_a_warning_of_the_program(condition, tmp_path):
    pytest.importorskip("cupy")
    folder, meet = (tmp_path, USE_CUDA + FULL) if condition == "full" else ("/proc", "")
    seen = python(meet + DOCTOR, CUPY_CACHE_DIR=str(folder))
    assert_warns_of(folder, table(seen.stdout, seen.stderr))
    assert seen.returncode == 0


def test_a_temporary_folder_that_cannot_be_written_is_told_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert environment.cache_fault() is None
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    wrong, command = environment.cache_fault()
    assert wrong.startswith("kernels cannot be cached in the temporary folder (")
    assert command == "export TMPDIR=/a/folder/that/can/be/written"


def test_a_gpu_is_not_missed_where_cupy_is_not_installed(stand_in, monkeypatch, capsys):
    stand_in()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(environment, "packages", list)
    assert program.main() == 0
    rows = table(*capsys.readouterr())
    assert rows[0][1].startswith("GPU not used: CPU path")
    assert says(rows, "why", not_installed(None)[0], COMMANDS["cuda12"])


def test_arrays_of_pytorch_on_the_cpu_need_no_cupy():
    pytest.importorskip("torch")
    code = """
import torch, rope_cupy
x = torch.ones(3, 1, 2)
y = rope_cupy.apply_rotary(x, (x[:, 0, :1] * 0, x[:, 0, :1]))
assert torch.equal(y, x * torch.tensor([-1, 1]))
"""
    done = python(code, CUPY_CACHE_DIR="/proc/no/cache")
    assert done.returncode == 0, done.stderr


def test_a_package_of_another_name_is_not_cupy(site, monkeypatch):
    for name in ("cupy-xarray", "not-cupy", "cupy"):
        pip_has(site, name)
    monkeypatch.setattr(sys, "path", [str(site)])
    assert environment.packages() == ["cupy"]


NVRTC_12, NVRTC_13 = "nvidia-cuda-nvrtc-cu12==12.4.127", "nvidia-cuda-nvrtc==13.0.88"
BESIDE_CUDA_13 = {"driver": 13000, "nvrtc": (13, 0), "archs": (75, 90, 121), "package": NVRTC_13}


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in for CuPy in place, with the given driver, GPU and NVRTC."""
    environment.cupy.cache_clear()

    def place(
        driver=12080, cuda=12, nvrtc=(12, 4), archs=(50, 90), capability=90, package=NVRTC_12
    ):
        module = SimpleNamespace(
            __version__="14.2.0",
            cuda=SimpleNamespace(
                runtime=SimpleNamespace(
                    runtimeGetVersion=lambda: 1000 * cuda, getDeviceCount=lambda: 1
                ),
                nvrtc=SimpleNamespace(getVersion=lambda: nvrtc, getSupportedArchs=lambda: archs),
                Device=lambda: SimpleNamespace(compute_capability=str(capability)),
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", module)
        monkeypatch.setattr(environment, "driver", lambda: driver)
        monkeypatch.setattr(environment, "packages", lambda: [f"cupy-cuda{cuda}x"])
        found = environment.Nvrtc(nvrtc, Path("/a/folder/lib/libnvrtc.so"), package)
        monkeypatch.setattr(environment, "nvrtc", lambda: found)
        monkeypatch.setattr(program, "_gpu_is_there", lambda: True)
        small = program.MODELS[0]._replace(num_tokens_on_cpu=64)
        monkeypatch.setattr(program, "MODELS", (small,))
        return module

    yield place
    environment.cupy.cache_clear()


TOO_OLD = (
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NO_DEVICE = "cudaErrorNoDevice: no CUDA-capable device is detected"
NO_ARCHITECTURE = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n"
NO_BINARY = "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device"
NO_NVRTC = 'Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file: libnvrtc.so.13'
BAD_IMAGE = "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"
NO_BUILTINS = (
    "nvrtc: error: failed to open libnvrtc-builtins.so.{0}.\n"
    "  Make sure that libnvrtc-builtins.so.{0} is installed correctly."
)
OWNED_12 = "NVRTC 12.4 of nvidia-cuda-nvrtc-cu12 12.4.127"
OWNED_13 = "NVRTC 13.0 of nvidia-cuda-nvrtc 13.0.88"
COMPILES = "compiles for compute capability"
UNDERSTOOD = {
    "a driver of CUDA 11": (
        TOO_OLD,
        {"driver": 11080},
        "a GPU needs an NVIDIA driver for CUDA 12 or newer, got one for CUDA 11.8",
        DRIVER,
    ),
    "a driver older than CuPy": (
        TOO_OLD,
        {"driver": 12040, "cuda": 13},
        "CuPy for CUDA 13 needs a newer driver, got one for CUDA 12.4",
        f"pip uninstall -y cupy-cuda13x && {COMMANDS['cuda12']}",
    ),
    "a hidden GPU": (
        NO_DEVICE,
        {},
        "CUDA finds no GPU, got CUDA_VISIBLE_DEVICES='7'",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "no NVRTC for CUDA 12": (
        NO_NVRTC,
        {},
        "CuPy for CUDA 12 compiles kernels with NVRTC, and none can be loaded",
        "pip install --force-reinstall nvidia-cuda-nvrtc-cu12",
    ),
    "no NVRTC for CUDA 13": (
        NO_NVRTC,
        {"driver": 13000, "cuda": 13},
        "CuPy for CUDA 13 compiles kernels with NVRTC, and none can be loaded",
        "pip install --force-reinstall 'nvidia-cuda-nvrtc==13.*'",
    ),
    "half an NVRTC for CUDA 12": (
        NO_BUILTINS.format("12.4"),
        {},
        f"{OWNED_12} finds no libnvrtc-builtins.so.12.4 in /a/folder/lib",
        f"pip install --force-reinstall --no-deps {NVRTC_12}",
    ),
    "half an NVRTC for CUDA 13 beside CuPy for CUDA 12": (
        NO_BUILTINS.format("13.0"),
        BESIDE_CUDA_13,
        f"{OWNED_13} finds no libnvrtc-builtins.so.13.0 in /a/folder/lib",
        f"pip install --force-reinstall --no-deps {NVRTC_13}",
    ),
    "half an NVRTC that pip has not installed": (
        NO_BUILTINS.format("13.0"),
        BESIDE_CUDA_13 | {"package": ""},
        "NVRTC 13.0 finds no libnvrtc-builtins.so.13.0 in /a/folder/lib",
        "pip install --force-reinstall 'nvidia-cuda-nvrtc==13.*'",
    ),
    "kernels too new for the driver": (
        NO_BINARY,
        BESIDE_CUDA_13 | {"driver": 12080},
        f"kernels of {OWNED_13} need a driver for CUDA 13 or newer, got one for CUDA 12.8",
        "pip uninstall -y nvidia-cuda-nvrtc && pip install --force-reinstall "
        "nvidia-cuda-nvrtc-cu12",
    ),
    "an image too new for the driver": (
        BAD_IMAGE,
        BESIDE_CUDA_13 | {"driver": 12080, "package": ""},
        "kernels of NVRTC 13.0 need a driver for CUDA 13 or newer, got one for CUDA 12.8",
        "pip install --force-reinstall nvidia-cuda-nvrtc-cu12",
    ),
    "a GPU too new for NVRTC": (
        NO_BINARY,
        {"capability": 120},
        f"{OWNED_12} {COMPILES} 5.0 to 9.0, got a GPU of 12.0",
        "pip install -U nvidia-cuda-nvrtc-cu12",
    ),
    "a GPU too new for NVRTC, with a driver for a newer CUDA": (
        NO_ARCHITECTURE,
        {"capability": 103, "driver": 13000},
        f"{OWNED_12} {COMPILES} 5.0 to 9.0, got a GPU of 10.3",
        f"pip uninstall -y cupy-cuda12x && {COMMANDS['cuda13']}",
    ),
    "a GPU too new for an NVRTC for CUDA 13 beside CuPy for CUDA 12": (
        NO_ARCHITECTURE,
        BESIDE_CUDA_13 | {"capability": 130},
        f"{OWNED_13} {COMPILES} 7.5 to 12.1, got a GPU of 13.0",
        "pip install -U 'nvidia-cuda-nvrtc==13.*'",
    ),
    "a GPU too old for NVRTC": (
        NO_ARCHITECTURE,
        BESIDE_CUDA_13 | {"capability": 70, "cuda": 13, "package": ""},
        f"NVRTC 13.0 {COMPILES} 7.5 to 12.1, got a GPU of 7.0",
        f"pip uninstall -y cupy-cuda13x && {COMMANDS['cuda12']}",
    ),
}


def fails(monkeypatch, module, error):
    """Let CuPy's first question to the driver, or else the first launch, raise an error."""

    def fail(*_):
        raise error

    if "cudaError" in str(error):
        monkeypatch.setattr(module.cuda.runtime, "getDeviceCount", fail)
    else:
        monkeypatch.setattr(program, "_rotate_one_pair", fail)


@pytest.mark.parametrize("condition", UNDERSTOOD)
def test_what_the_machine_lacks_is_an_error_with_the_command_that_mends_it(
    condition, stand_in, monkeypatch, capsys
):
    text, found, wrong, command = UNDERSTOOD[condition]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    module, error = stand_in(**found), RuntimeError(text)
    fails(monkeypatch, module, error)
    with pytest.raises(RuntimeError) as raised, environment.explained():
        raise error
    assert str(raised.value) == f"{wrong}: {command}"
    assert raised.value.__cause__ is error
    if "cudaError" in text:
        with pytest.raises(RuntimeError, match=re.escape(f"{wrong}: {command}")):
            environment.cupy()

    assert program.main() == 1
    rows = table(*capsys.readouterr())
    assert rows[0][1].startswith("GPU not used: CPU path")
    assert says(rows, "why", wrong, command)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cudaErrorIllegalAddress: an illegal memory access was encountered", {}),
        ("CUDA_ERROR_INVALID_VALUE: invalid argument", {}),
        (NO_DEVICE, {}),
        (NO_BINARY, {"capability": 90}),
        (BAD_IMAGE, {}),
        (TOO_OLD, {"driver": 13000}),
    ],
)
def test_an_error_that_is_not_understood_passes_unchanged(
    text, found, stand_in, monkeypatch, capsys
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    module, error = stand_in(**found), RuntimeError(text)
    fails(monkeypatch, module, error)
    with pytest.raises(RuntimeError) as raised, environment.explained():
        raise error
    assert raised.value is error

    assert program.main() == 1
    assert says(table(*capsys.readouterr()), "why", text, "nvidia-smi")


REPLACE_CUPY = f"pip uninstall -y cupy-cuda12x && {COMMANDS['cuda13']}"
UNFIT = {
    "an NVRTC for CUDA 13 beside CuPy for CUDA 12": (
        BESIDE_CUDA_13,
        f"CuPy for CUDA 12 has found {OWNED_13}, and compiles with it",
        REPLACE_CUPY,
    ),
    "the same without a driver": (
        BESIDE_CUDA_13 | {"driver": 0},
        f"CuPy for CUDA 12 has found {OWNED_13}, and compiles with it",
        REPLACE_CUPY,
    ),
    "the same with a driver for CUDA 12": (
        BESIDE_CUDA_13 | {"driver": 12080},
        f"kernels of {OWNED_13} need a driver for CUDA 13 or newer, got one for CUDA 12.8",
        "pip uninstall -y nvidia-cuda-nvrtc && pip install --force-reinstall "
        "nvidia-cuda-nvrtc-cu12",
    ),
    "CuPy and NVRTC for CUDA 13 with a driver for CUDA 12": (
        BESIDE_CUDA_13 | {"driver": 12080, "cuda": 13},
        f"kernels of {OWNED_13} need a driver for CUDA 13 or newer, got one for CUDA 12.8",
        f"pip uninstall -y cupy-cuda13x && {COMMANDS['cuda12']}",
    ),
    "an NVRTC for CUDA 12 beside CuPy for CUDA 13": (
        {"driver": 13000, "cuda": 13},
        f"CuPy for CUDA 13 has found {OWNED_12}, and compiles with it",
        "pip install --force-reinstall 'nvidia-cuda-nvrtc==13.*'",
    ),
}


@pytest.mark.parametrize("condition", UNFIT)
def test_an_nvrtc_that_does_not_fit_is_a_warning_of_the_program(condition, stand_in):
    found, wrong, command = UNFIT[condition]
    stand_in(**found)
    rows = program._nvrtc([])
    owned = OWNED_13 if found.get("nvrtc") else OWNED_12
    assert rows[:2] == [
        ("NVRTC", owned.removeprefix("NVRTC ")),
        ("library", "/a/folder/lib/libnvrtc.so"),
    ]
    assert rows[2:] == [("warning", wrong), ("fix", command)]
    assert program._nvrtc([environment.Fault(wrong, command)]) == rows[:2]  # which is said before


@pytest.mark.parametrize(
    "found", [{}, BESIDE_CUDA_13 | {"cuda": 13}, {"driver": 13000}, {"driver": 12020}]
)
def test_an_nvrtc_for_the_cuda_of_cupy_and_the_driver_fits(found, stand_in):
    stand_in(**found)
    assert [label for label, _ in program._nvrtc([])] == ["NVRTC", "library"]


def test_a_mistake_in_a_kernel_is_shown_as_it_is(stand_in, monkeypatch):
    class CompileException(Exception):  # noqa: N818
        """CuPy's is no RuntimeError either."""

    module, error = stand_in(), CompileException("rotary.cu(1): error: expected a ;")
    fails(monkeypatch, module, error)
    with pytest.raises(CompileException):
        program.main()
