"""What the tests say of those that they cannot run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import host_cuda
import pytest
from conftest import packages_that_tests_use, why_no_gpu

ROOT = Path(__file__).parents[2]


def output_of(*arguments, **settings):
    """What pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    environment = os.environ | settings
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    )
    return done.stdout


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU here")
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_without_a_gpu_the_summary_says_how_many_tests_are_skipped_and_why(workers):
    said = output_of("-k", "graph", "tests/api/test_gpu.py", *workers)
    skipped = int(re.search(r"(\d+) skipped", said)[1])
    assert skipped > 0
    assert f"gpu: {skipped} tests skipped, no GPU here ({why_no_gpu()})" in said


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"PATH": "", "CXX": ""}, r"no C\+\+ compiler is found"),
        ({"CXX": "false"}, r"\S+/false makes no programs with sanitizers: status 1"),
    ],
    ids=["no compiler", "a compiler that fails"],
)
def test_without_a_compiler_the_summary_says_how_many_tests_are_skipped_and_why(settings, why):
    said = output_of("-k", "apart", "tests/kernels/test_host_cuda.py", **settings)
    skipped = int(re.search(r"(\d+) skipped", said)[1])
    assert skipped > 0
    told = rf"^host_cuda: {skipped} tests skipped, no kernels on the CPU here \({why}\)$"
    assert re.search(told, said, re.MULTILINE)


@pytest.mark.parametrize("plugin", ["pytest_benchmark", "pytest_asyncio"])
def test_a_plugin_that_warns_of_itself_does_not_end_the_run(plugin, tmp_path):
    stand_in = f"{plugin}_of_an_old_version"
    code = "import pytest, warnings\ndef pytest_configure(config):\n    warnings.warn({})\n"
    (tmp_path / f"{stand_in}.py").write_text(code.format("pytest.PytestWarning('of itself')"))
    said = output_of(
        *("-p", stand_in, "-n", "2", "tests/unit/test_jit.py", "-k", "threads"),
        PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )
    assert re.search(r"^\d+ passed in ", said, re.M), said


# An interpreter that finds some packages neither by import nor by metadata, and then runs pytest.
WITHOUT = """
import importlib.machinery, re, sys
import pytest

hidden = {hidden!r}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        for package in super().find_distributions(*context):
            if re.sub("-", "_", package.metadata["Name"] or "") not in hidden:
                yield package

assert not hidden & {{*sys.modules}}
places = [finder is importlib.machinery.PathFinder for finder in sys.meta_path]
sys.meta_path[places.index(True)] = Finder
sys.exit(pytest.main({arguments!r}))
"""
NEEDS = {"mpmath": {"sympy", "torch"}}  # what a machine without a package lacks as well


def collected_without(hidden, *arguments):
    """What pytest says of the tests, once it has collected them, and how it ends."""
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    code = WITHOUT.format(hidden=hidden, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    return done.stdout, done.returncode


def importers(package):
    """The files with tests that import a package at once, themselves or through others of ours."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    imports = {
        path: {*re.findall(r"^(?:import|from) (\w+)", path.read_text(encoding="utf-8"), re.M)}
        for path in paths
    }
    importing: set[str] = {package}
    while more := {path.stem for path in paths if imports[path] & importing} - importing:
        importing |= more
    return [path for path in paths if path.stem in importing - {package}]


FOLDERS = ("tests", "benchmarks", "rope_cupy")
IMPORTED = [package for package in sorted(packages_that_tests_use()) if importers(package)]


@pytest.mark.parametrize("package", IMPORTED)
def test_every_module_collects_without(package):
    files = [path for path in importers(package) if ROOT / "benchmarks" not in path.parents]
    said, status = collected_without({package} | NEEDS.get(package, set()), *files)
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), said


def test_every_module_collects_without_any_package_but_pytest():
    said, status = collected_without(packages_that_tests_use())
    assert status == pytest.ExitCode.OK, said
    assert re.search(r"^torch: \d+ files skipped, it is not installed$", said, re.M)
    assert int(re.search(r"(\d+) tests collected", said)[1]) > 2000


def test_a_module_that_cannot_be_imported_for_another_reason_is_an_error(tmp_path):
    for name, code in (("test_own", "import rope_cupy.nothing"), ("test_typo", "import torhc")):
        (tmp_path / f"{name}.py").write_text(code)
    said, status = collected_without(
        {"torch"}, "-c", ROOT / "setup.cfg", "-p", "conftest", tmp_path
    )
    assert status == pytest.ExitCode.INTERRUPTED
    assert said.count("ERROR ") >= 2, said


ON_THE_CPU = """
import numpy as np
import pytest
import rope_cupy

pytestmark = pytest.mark.host_cuda

def rotate():
    x = np.ones((1, 1, 2), np.float32)
    assert rope_cupy.apply_rotary(x, (x[0, :, :1], x[0, :, :1]))[0, 0, 1] == 2

def test_that_launches():
    rotate()

def test_that_launches_none():
    pass

@pytest.mark.launches_nothing
def test_that_is_to_launch_none():
    pass

@pytest.mark.launches_nothing
def test_that_is_to_launch_none_and_does():
    rotate()

def test_that_is_skipped():
    pytest.skip("for want of something")
"""


@pytest.mark.skipif(host_cuda.why_not() is not None, reason="no kernels on the CPU here")
def test_a_test_of_a_kernel_fails_where_none_has_run(tmp_path):
    (tmp_path / "test_kernels.py").write_text(ON_THE_CPU)
    arguments = ["-c", str(ROOT / "setup.cfg"), "-p", "conftest", "-rA", str(tmp_path)]
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    said = output_of(*arguments, PYTHONPATH=path)
    outcomes = re.findall(r"^(PASSED|FAILED) \S*::test_that_(\w+)", said, re.M)
    assert sorted(outcomes) == [
        ("FAILED", "is_to_launch_none_and_does"),
        ("FAILED", "launches_none"),
        ("PASSED", "is_to_launch_none"),
        ("PASSED", "launches"),
    ], said
    assert "1 skipped" in said
