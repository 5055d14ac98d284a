"""The cache of kernels, by CuPy's own compiler and files, and what of the environment needs a GPU.

The same code runs on a GPU, where no other kernel of CuPy's has a part in it, and for a GPU that
need not be there, where nothing is loaded or launched.
"""

import os
import re
import shutil
import subprocess
import sys
from hashlib import sha1
from pathlib import Path

import pytest
from interpreters import CALL, DOCTOR, FULL, MOVE_CACHE, ROOT, assert_warns_of, python, table

from rope_cupy import environment

ON_A_GPU = """
import cupy, numpy
from rope_cupy import apply_rotary, jit

cupy.empty(1)  # so that CUDA has written what it must

def rotate(dtype="float32"):
    x = numpy.arange(6, dtype=dtype).reshape(3, 1, 2)
    with cupy.cuda.Stream(non_blocking=True):
        cos, sin = (cupy.asarray(numpy.full((3, 1), part, dtype)) for part in (0, 1))
        y = apply_rotary(cupy.asarray(x), (cos, sin)).get()
    assert numpy.array_equal(y, numpy.stack([-x[..., 1], x[..., 0]], -1)), y
"""
WITHOUT_A_GPU = """
import cupy, numpy
from cupy.cuda import compiler
from types import SimpleNamespace
from rope_cupy import apply_rotary, cpu, jit
from rope_cupy.plan import launch_plan

class Module:
    def load(self, cubin):
        self.cubin = cubin

    def _set_mapping(self, mapping):
        self.mapping = mapping

    def get_function(self, name):
        assert self.cubin.startswith(b"\\x7fELF") and name.encode() in self.cubin
        return name

def raw_module(code, options, name_expressions):
    names = tuple(name_expressions)
    module = compiler._compile_module_with_cache(code, options, name_expressions=names)
    def get_function(name):
        return SimpleNamespace(kernel=module.get_function(module.mapping[name]))
    return SimpleNamespace(get_function=get_function)

def rotate(dtype="float32"):
    apply_rotary(numpy.ones((3, 1, 2), dtype), (numpy.ones((3, 1), dtype),) * 2)

compiler._get_arch = lambda: "80"
compiler._get_arch_for_options_for_nvrtc = lambda arch=None: ("-arch=sm_80", "cubin")
compiler.function = SimpleNamespace(Module=Module)
cupy.cuda.function.Module, cupy.RawModule, jit.cupy = Module, raw_module, lambda: cupy
cpu.rotate = lambda problem, pointers: jit.kernel(launch_plan(problem).kernel, 0)
"""
WITHOUT_NVRTC = """
from cuda import pathfinder
def find(name):
    raise pathfinder.DynamicLibNotFoundError(f"Failure finding lib{name}.so")
pathfinder.load_nvidia_dynamic_lib = find
"""


MARKS = [pytest.mark.gpu, pytest.mark.undisturbed]


@pytest.fixture(
    params=[WITHOUT_A_GPU, pytest.param(ON_A_GPU, marks=MARKS)],
    ids=["without a GPU", "on a GPU"],
)
def rotate(request):
    """Code that defines rotate(dtype)."""
    pytest.importorskip("cupy")
    return request.param


def files(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def assert_silent(done):
    assert (done.returncode, done.stderr) == (0, "")


def assert_warned_once(done, folder):
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"RuntimeWarning: kernels cannot be cached in {folder} (") == 1
    assert done.stderr.count(MOVE_CACHE) == 1


def test_processes_race_for_a_cold_cache_and_later_ones_compile_nothing(rotate, tmp_path):
    command = [sys.executable, "-c", rotate + "print(flush=True); input(); rotate()"]
    variables = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    racing = [
        subprocess.Popen(command, env=variables, cwd=ROOT, text=True, **pipes) for _ in range(6)
    ]
    try:
        for process in racing:
            process.stdout.readline()  # it is at the start
        assert not files(tmp_path)
        for process in racing:
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.communicate(timeout=300) for process in racing]
    finally:
        for process in racing:
            process.kill()
    assert [(process.returncode, *each) for process, each in zip(racing, said, strict=True)] == [
        (0, "", "")
    ] * len(racing)

    cached = files(tmp_path)
    assert cached and all(name.endswith(".cubin") for name in cached)
    assert_silent(python(rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path)))
    assert files(tmp_path) == cached


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_a_corrupt_cached_kernel_is_compiled_again(rotate, damage, tmp_path):
    assert_silent(python(rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path)))
    whole = files(tmp_path)
    assert whole
    for name, (_, data) in whole.items():
        damaged = {"garbage": bytes(range(256)) * 9, "truncated": data[:-1], "empty": b""}[damage]
        (tmp_path / name).write_bytes(damaged)
    assert_silent(python(rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path)))
    mended = files(tmp_path)
    assert mended.keys() == whole.keys()
    for _, data in mended.values():  # CuPy puts the digest in front
        assert data[:40].decode() == sha1(data[40:]).hexdigest()


def test_a_cached_kernel_that_cannot_be_read_is_compiled_past_it(rotate, tmp_path):
    assert_silent(python(rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path)))
    for path in list(tmp_path.iterdir()):
        path.unlink()
        path.mkdir()  # which root cannot read as a file either
    done = python(rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path))
    assert_warned_once(done, tmp_path)


@pytest.mark.parametrize("condition", ["read-only", "removed", "full"])
def test_a_cache_that_cannot_be_written_is_a_warning_and_the_call_works(
    rotate, condition, tmp_path
):
    folder = Path("/proc") if condition == "read-only" else tmp_path / "cache"
    meet = {"read-only": "", "removed": f"import os; os.rmdir({str(folder)!r})\n", "full": FULL}
    done = python(
        rotate + meet[condition] + "rotate('float32'); rotate('float16'); rotate('float32')",
        CUPY_CACHE_DIR=str(folder),
        PYTHONWARNINGS="always",
    )
    assert_warned_once(done, folder)


@pytest.mark.undisturbed
@pytest.mark.gpu
def test_the_program_uses_the_gpu_without_a_cache():
    seen = python(DOCTOR, CUPY_CACHE_DIR="/proc")
    rows = table(seen.stdout, seen.stderr)
    assert rows[0][0] == "GPU"
    assert_warns_of("/proc", rows)
    assert seen.returncode == 0


def test_threads_compile_each_kernel_once(rotate, tmp_path):
    threads = """
import threading
from concurrent.futures import ThreadPoolExecutor

def count(name, compile=jit._compiled):
    compiled.append(name)
    return compile(name)

def work(i):
    start.wait(60)
    rotate(("float32", "float16")[i % 2])

compiled, jit._compiled, start = [], count, threading.Barrier(16)
with ThreadPoolExecutor(16) as pool:
    list(pool.map(work, range(16)))
assert len(compiled) == len(set(compiled)) == 2, compiled
"""
    assert_silent(python(rotate + threads, CUPY_CACHE_DIR=str(tmp_path)))


TWO_FIRST_CALLS = """
import threading
from concurrent.futures import ThreadPoolExecutor

def call(dtype):
    start.wait(60)
    rotate(dtype)

start = threading.Barrier(2)
with ThreadPoolExecutor(2) as pool:
    list(pool.map(call, ('float32', 'float16')))
"""
LOADED_BEFORE = """
import ctypes
ctypes.CDLL({file!r})
"""


def test_the_first_calls_of_two_threads_find_a_whole_compiler(rotate, tmp_path):
    """In several processes, for each has one first call: with a cold cache, and then a warm one."""
    for i in range(6):
        folder = tmp_path / str(i // 2)
        folder.mkdir(exist_ok=True)
        assert_silent(python(rotate + TWO_FIRST_CALLS, CUPY_CACHE_DIR=str(folder)))


def test_an_nvrtc_that_the_program_has_loaded_before_compiles(rotate, tmp_path):
    if not (file := environment.nvrtc_file()):
        pytest.skip("CuPy does not say which NVRTC it loads")
    before = LOADED_BEFORE.format(file=str(file))
    assert_silent(python(before + rotate + "rotate()", CUPY_CACHE_DIR=str(tmp_path)))


def test_an_nvrtc_without_builtins_is_an_error_that_names_it_and_mends_it(tmp_path):
    pytest.importorskip("cupy")
    file = environment.nvrtc_file()
    if not file or "site-packages" not in file.parts:
        pytest.skip("no package brings NVRTC")
    alone = tmp_path / file.name
    shutil.copy(file, alone)
    called = python(
        LOADED_BEFORE.format(file=str(alone)) + WITHOUT_A_GPU + "rotate()",
        CUPY_CACHE_DIR=str(tmp_path / "cache"),
        LD_LIBRARY_PATH="",
    )
    major, minor = environment.nvrtc().version
    builtins = rf"libnvrtc-builtins\.so\.{major}\.{minor}"
    package = f"'nvidia-cuda-nvrtc=={major}.*'" if major > 12 else "nvidia-cuda-nvrtc-cu12"
    error = (
        rf"^RuntimeError: NVRTC {major}\.{minor} finds no {builtins} in {tmp_path}: "
        rf"pip install --force-reinstall {re.escape(package)}$"
    )
    assert re.search(error, called.stderr, re.M), called.stderr


@pytest.mark.undisturbed
@pytest.mark.gpu
@pytest.mark.parametrize("condition", ["no NVRTC", "a hidden GPU"])
def test_a_gpu_that_cannot_be_used_is_an_error_that_mends_it(condition, tmp_path):
    variables = {"CUPY_CACHE_DIR": str(tmp_path)}
    if condition == "no NVRTC":
        before, call = WITHOUT_NVRTC, ON_A_GPU + "rotate()"
        wrong, command = (
            r"CuPy for CUDA 1\d compiles kernels with NVRTC, .*",
            r"pip install --force-.*",
        )
    else:
        before, call = "", CALL
        variables["CUDA_VISIBLE_DEVICES"] = "99"
        wrong, command = "CUDA finds no GPU, got CUDA_VISIBLE_DEVICES='99'", "unset CUDA_VISIBLE_.*"
    called = python(before + call, **variables)
    assert re.search(rf"^RuntimeError: {wrong}: {command}$", called.stdout + called.stderr, re.M)
    seen = python(before + DOCTOR, **variables)
    rows = table(seen.stdout, seen.stderr)
    (why,) = (i for i, (label, text) in enumerate(rows) if label == "why")
    assert re.fullmatch(wrong, rows[why][1]) and re.fullmatch(command, rows[why + 1][1])
    assert seen.returncode == 1
