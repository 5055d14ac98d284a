"""The environment as users have it: a call works, or one error says which command mends it.

Where a condition can be made, an interpreter of its own meets it, which sees a folder of packages
and nothing else; a stand-in for CuPy has the drivers and GPUs that this machine has not.
"""

import importlib.util
import os
import re
import subprocess
import sys
from hashlib import sha1
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rope_cupy import __main__ as program
from rope_cupy import apply_rotary, environment, jit

ROOT = Path(__file__).parents[1]
EXTRA = "cuda13" if environment.driver() >= 13000 else "cuda12"
INSTALL = f"pip install 'rope-cupy[{EXTRA}]'"
SETTLE = "export CUPY_CACHE_DIR=/a/folder/that/can/be/written"
DRIVER = "sudo ubuntu-drivers install, or docker run --gpus all"
WITH_CUPY = {
    "numpy": ["numpy", "numpy.libs"],
    "cupy": ["cupy", "cupy_backends", "cupyx", "cupy.libs", "cuda", "cupy_*.dist-info"],
}

# NumPy's arrays are rotated with CuPy in any state, and an array on a GPU is an error before it is read.
CALL = """
import numpy, rope_cupy

class OnTheGPU:
    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise AssertionError("read, though no kernel can be launched")

x, gpu = numpy.ones((3, 1, 2)), OnTheGPU()
assert numpy.array_equal(rope_cupy.apply_rotary(x, (x[:, 0, :1] * 0, x[:, 0, :1])), x * [-1, 1])
for _ in range(2):
    try:
        rope_cupy.apply_rotary(gpu, (gpu, gpu))
    except (ImportError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}")
"""
DOCTOR = "import runpy; runpy.run_module('rope_cupy', run_name='__main__')"


@pytest.fixture
def site(tmp_path):
    """A folder of packages for an interpreter, with NumPy in it."""
    folder = tmp_path / "site"
    folder.mkdir()
    link(folder, "numpy")
    return folder


def link(folder, package):
    """Let a folder of packages have one that is installed."""
    pytest.importorskip(package)
    home = Path(importlib.util.find_spec(package).origin).parents[1]
    for pattern in WITH_CUPY[package]:
        for path in home.glob(pattern):
            (folder / path.name).symlink_to(path)


def pip_has(folder, name, version="14.2.0"):
    """Let pip find that a package is installed in a folder."""
    records = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    records.mkdir()
    (records / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def cupy_is(folder, code):
    """Put other code in CuPy's place."""
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(code)


def python(code, site=None, **variables):
    """Run code in an interpreter which sees one folder of packages, by default this one's."""
    if site:
        code, isolated = f"import sys; sys.path[:0] = {[str(site), str(ROOT)]}; {code}", ["-I", "-S"]
        code = code.replace("; \n", "\n")
    else:
        isolated = []
    return subprocess.run(
        [sys.executable, *isolated, "-c", code],
        env={**os.environ, "HOME": "/proc/nobody", **variables} if False else {**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
