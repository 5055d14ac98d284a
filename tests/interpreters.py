"""Interpreters of their own, which see chosen packages, and what the program says in them."""

import importlib.util
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOVE_CACHE = "export CUPY_CACHE_DIR=/a/folder/that/can/be/written"
PARTS = {
    "numpy": ["numpy", "numpy.libs"],
    "cupy": ["cupy", "cupy_backends", "cupyx", "cupy.libs", "cuda", "cupy_*.dist-info"],
}

# NumPy's arrays are rotated whatever CuPy is; an array on a GPU is an error before it is read.
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
DOCTOR = """
from rope_cupy import __main__ as program
program.MODELS = program.MODELS[0]._replace(num_tokens=64, num_tokens_on_cpu=64),
raise SystemExit(program.main())
"""
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # an error and no signal, which Python ignores
"""


def link(folder, package):
    """Let a folder of packages have one that is installed."""
    pytest.importorskip(package)
    home = Path(importlib.util.find_spec(package).origin).parents[1]
    for pattern in PARTS[package]:
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
    """Run code in an interpreter that sees a folder of packages, or else what this one sees."""
    options = []
    if site:
        options = ["-I", "-S"]
        code = f"import sys; sys.path[:0] = {[str(site), str(ROOT)]}\n{code}"
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


def table(stdout, stderr=""):
    """What the program says of the environment, once its checks have passed without a noise."""
    assert stderr == ""
    assert stdout.splitlines()[-1].endswith("all checks passed")
    rows = stdout.split("\n\n")[1].splitlines()
    return [tuple(row[2:].split(maxsplit=1)) for row in rows]


def says(rows, label, wrong, command):
    """Whether one row says what is wrong, and the next what mends it."""
    return ((label, wrong), ("fix", command)) in list(pairwise(rows))


def assert_warns_of(folder, rows):
    """The program says that a folder cannot be written, for a reason of the system's."""
    wrong = re.compile(rf"kernels cannot be cached in {folder} \([A-Z][a-z ]+\)")
    (i,) = (i for i, (label, text) in enumerate(rows) if label == "warning" and wrong.search(text))
    assert wrong.fullmatch(rows[i][1])
    assert rows[i + 1] == ("fix", MOVE_CACHE)
