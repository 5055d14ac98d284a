"""The package as pip installs it: what a wheel holds, and the kernels every install finds.

Nothing is downloaded: builds use the setuptools beside the tests. Each install goes into a folder
of its own, and an interpreter that sees nothing but this folder and NumPy imports it from there.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import rope_cupy

SETUPTOOLS = metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("pip") or int(SETUPTOOLS.split(".")[0]) < 77,
    reason="building a package needs pip and setuptools 77",
)

ROOT = Path(__file__).parents[2]
BUILT_FROM = ["rope_cupy", "kernels", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
EXTRAS = {"cuda12", "cuda13", "test", "bench", "peers", "dev", "docs"}

PROBE = """
import json, site, sys
folder, numpy_parent = sys.argv[1:]
sys.path.append(numpy_parent)
import numpy
sys.path.pop()
site.addsitedir(folder)
import rope_cupy.jit
x = numpy.ones((3, 1, 2))
assert numpy.array_equal(rope_cupy.apply_rotary(x, (x[:, 0, :1] * 0, x[:, 0, :1])), x * [-1, 1])
import rope_cupy.environment
installed = rope_cupy.environment.installed()
print(json.dumps([rope_cupy.__version__, str(rope_cupy.jit.sources()), *map(str, installed)]))
"""


def run(*command, cwd):
    """The command's output; what it said, if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(action, *arguments, cwd):
    run("-m", "pip", action, "--no-build-isolation", "--no-deps", "--no-index", *arguments, cwd=cwd)


def kernel_sources(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def checkout_in(folder):
    """A copy of what the package is built from, so that no build leaves its folders in this one."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for source in map(ROOT.joinpath, BUILT_FROM):
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, checkout / source.name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, checkout)
    return checkout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built once for all tests, whose checkout is gone."""
    folder = tmp_path_factory.mktemp("built")
    checkout = checkout_in(folder)
    pip("wheel", "-w", str(folder), ".", cwd=checkout)
    shutil.rmtree(checkout)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_every_module_and_kernel_and_nothing_else(wheel):
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("rope_cupy/**/*.py")}
    kernels = {f"rope_cupy/kernels/{path.name}" for path in ROOT.glob("kernels/*.cu*")}
    held = set(zipfile.ZipFile(wheel).namelist())
    records = {name for name in held if ".dist-info/" in name}
    assert held - records == modules | kernels | {"rope_cupy/py.typed"}
    assert any(name.endswith("/LICENSE") for name in records)


def test_a_wheel_says_its_version_needs_numpy_alone_and_offers_the_extras(wheel):
    (built,) = metadata.distributions(path=[str(wheel)])
    assert built.version == rope_cupy.__version__
    assert built.metadata["License-Expression"] == "Apache-2.0"
    assert set(built.metadata.get_all("Provides-Extra")) == EXTRAS
    needs = [requirement for requirement in built.requires if "extra ==" not in requirement]
    assert [re.match(r"[\w-]+", requirement)[0] for requirement in needs] == ["numpy"]


def test_constraints_pin_what_ci_installs(wheel):
    (built,) = metadata.distributions(path=[str(wheel)])
    extras = re.compile(r"([\w-]+).*extra == .(?:cuda12|test|dev|docs)\b")
    installed = [found[1] for found in map(extras.match, built.requires) if found]
    constraints = (ROOT / "tests/constraints.txt").read_text().replace("_", "-")
    assert "torch" in installed
    for name in installed:
        assert re.search(rf"^{name}==".replace("_", "-"), constraints, re.M), name


@pytest.fixture(
    scope="module",
    params=["a wheel", "an editable install", "a strict editable install", "a checkout"],
)
def installed(request, tmp_path_factory):
    """An environment of its own into which the package has been put, and the folder that has it."""
    folder = tmp_path_factory.mktemp("installed")
    home = folder / "environment"
    venv.create(home, symlinks=True)
    (site,) = home.glob("lib/python*/site-packages")
    if request.param == "a wheel":
        wheel = request.getfixturevalue("wheel")
        pip("install", "--target", str(site), str(wheel), cwd=folder)
        return home, site
    checkout = checkout_in(folder)
    if request.param == "a checkout":
        (site / "checkout.pth").write_text(str(checkout))
    else:
        strict = ["--config-settings", "editable_mode=strict"] if "strict" in request.param else []
        pip("install", "--target", str(site), *strict, "-e", str(checkout), cwd=folder)
    return home, site


def test_an_install_finds_the_sources_of_its_kernels(installed, tmp_path):
    home, site = installed
    numpy_parent = str(Path(np.__file__).parents[1])
    probe = run("-I", "-S", "-c", PROBE, str(site), numpy_parent, cwd=tmp_path)
    version, sources, kind, folder, unused = json.loads(probe)
    assert version == rope_cupy.__version__
    checkout = home.parent / "checkout"
    assert kind == ("checkout" if checkout.exists() else "installed wheel")
    assert Path(folder).is_relative_to(checkout if checkout.exists() else site)
    assert unused == "None"
    assert Path(sources).is_relative_to(home.parent)
    assert kernel_sources(Path(sources)) == kernel_sources(ROOT / "kernels")


def test_a_checkout_that_hides_an_installed_wheel_says_so(wheel, tmp_path):
    site, checkout = tmp_path / "site", checkout_in(tmp_path)
    pip("install", "--target", str(site), str(wheel), cwd=tmp_path)
    script = f"""
import sys
sys.path.append({str(site)!r})
from rope_cupy import environment
print(*environment.installed(), sep="\\n")
"""
    said = run("-c", script, cwd=checkout).splitlines()
    assert said == ["checkout", str(checkout), str(site)]


TYPED = """
from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk

class Array: ...

def rotate(x: Array, table: RotaryTable) -> None:
    reveal_type(table)
    reveal_type(apply_rotary(x, table))
    reveal_type(apply_rotary_qk(x, x, table))
"""


def test_an_install_brings_its_types_to_a_users_program(installed, tmp_path):
    pytest.importorskip("mypy")
    home, _ = installed
    program = tmp_path / "program.py"
    program.write_text(TYPED)
    python = str(home / "bin" / "python")
    said = run("-m", "mypy", "--strict", "--python-executable", python, program.name, cwd=tmp_path)
    revealed = re.findall(r'Revealed type is "(.*)"', said)
    array = "program.Array"
    assert revealed == ["rope_cupy.tables.RotaryTable", array, f"tuple[{array}, {array}]"]


def test_importing_the_package_imports_no_array_library_but_numpy():
    script = "import sys, rope_cupy.jit; print(*{'cupy', 'jax', 'torch'} & set(sys.modules))"
    assert run("-c", script, cwd=ROOT).strip() == ""


def test_what_a_program_may_never_need_is_imported_when_it_is_asked_for():
    later = ["diffusion", "frequencies", "positions", "torch", "jit", "plan"]
    script = f"""
import sys, rope_cupy
assert not [name for name in {later} if f"rope_cupy.{{name}}" in sys.modules]
assert {{*{later[:3]}}} <= {{*dir(rope_cupy)}}
print(*(getattr(rope_cupy, name).__name__ for name in {later[:4]}))
from rope_cupy import *
assert "torch" not in globals()
try:
    rope_cupy.nothing
except AttributeError as error:
    print(error)
"""
    said = run("-c", script, cwd=ROOT).splitlines()
    assert said == [
        "rope_cupy.diffusion rope_cupy.frequencies rope_cupy.positions rope_cupy.torch",
        "module 'rope_cupy' has no attribute 'nothing'",
    ]


def test_help_lists_every_public_name():
    listed = re.findall(r"^    ([\w.]+)  ", rope_cupy.__doc__, re.M)
    assert {*rope_cupy.__all__} <= {*listed}
    for name in {*listed} - {*rope_cupy.__all__}:
        assert importlib.util.find_spec(f"rope_cupy.{name}"), name
