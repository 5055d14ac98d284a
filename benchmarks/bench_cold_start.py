"""Time what a new process waits for: the import, and the first call with its kernel cached or not.

    python benchmarks/bench_cold_start.py

A time is the median over new processes, one after another, whose files the system has in memory.
`import rope_cupy` is timed after `import numpy`, and must import neither PyTorch nor CuPy. The
first call rotates CuPy arrays in place, by positions and a tuple (cos, sin); CuPy is imported, the
arrays are on the GPU, and the time ends when the GPU has rotated them. The caches of CuPy and of
the driver lie in folders of their own, with the kernel in them or empty. Python's bytecode is
cached, as that of an installed package is.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import runner
import torch
from runner import Parser, digits, say

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("step", "milliseconds", "runs")

# Each prints seconds.
IMPORTS = """
import sys
from time import perf_counter

start = perf_counter()
import numpy
middle = perf_counter()
import rope_cupy
end = perf_counter()
loaded = {"cupy", "torch"} & sys.modules.keys()
assert not loaded, f"rope_cupy must import neither CuPy nor PyTorch, got {loaded}"
print(middle - start, end - middle)
"""
FIRST_CALL = """
from time import perf_counter
import cupy, numpy
from rope_cupy import apply_rotary_qk

rng = numpy.random.default_rng()
angles = rng.uniform(0, 6, (100, 64)).astype(numpy.float32)
cos, sin, positions = numpy.cos(angles), numpy.sin(angles), rng.permutation(100)[:16]
x = [rng.standard_normal((1, 16, heads, 128)).astype(numpy.float16) for heads in (32, 8)]
q, k, *table, rows = map(cupy.asarray, (*x, cos, sin, positions))
cupy.cuda.runtime.deviceSynchronize()

start = perf_counter()
apply_rotary_qk(q, k, tuple(table), positions=rows, out=(q, k))
cupy.cuda.runtime.deviceSynchronize()
print(perf_counter() - start)

for y, exact in zip((q, k), apply_rotary_qk(*x, (cos, sin), positions=positions)):
    numpy.testing.assert_allclose(y.get(), exact, atol=0.01)
"""


class Step(NamedTuple):
    """Something waited for: milliseconds in each of some processes, in none where it needs more."""

    name: str
    milliseconds: list[float]

    def row(self) -> runner.Row:
        """Return the step's row of the CSV, and of the printed table."""
        times = self.milliseconds
        row = {"step": self.name, "runs": len(times)}
        if not times:
            return row | {"status": "not measured", "reason": "needs a GPU"}
        figures = {"milliseconds": statistics.median, "least": min, "most": max}
        return row | {name: digits(of(times)) for name, of in figures.items()}


def main() -> None:
    """Run everything that the machine can."""
    options = _parsed()
    measure = functools.partial(_rows, options.device, options.runs)
    runner.run("cold-start", options, COLUMNS, [("new processes", measure)])


def _rows(device: str, runs: int) -> list[runner.Row]:
    return [step.row() for step in steps(device, runs)]


def steps(device: str, runs: int) -> Iterator[Step]:
    """Measure each step, the first calls on a GPU only."""
    say("imports")
    with tempfile.TemporaryDirectory() as bytecode:
        seconds_of(IMPORTS, bytecode)  # Python compiles
        times = zip(*(seconds_of(IMPORTS, bytecode) for _ in range(runs)), strict=True)
        names = "import numpy", "import rope_cupy after numpy"
        for name, seconds in zip(names, times, strict=True):
            yield Step(name, [1e3 * each for each in seconds])
        if device == "cpu":
            yield Step("first call, kernel cached", [])
            yield Step("first call, nothing cached", [])
            return
        say("first calls")
        with tempfile.TemporaryDirectory() as kernels:
            seconds_of(FIRST_CALL, bytecode, kernels)  # Python and NVRTC compile
            cached = [seconds_of(FIRST_CALL, bytecode, kernels) for _ in range(runs)]
        yield Step("first call, kernel cached", [1e3 * seconds for (seconds,) in cached])
        uncached = []
        for _ in range(runs):
            with tempfile.TemporaryDirectory() as kernels:
                uncached.append(seconds_of(FIRST_CALL, bytecode, kernels))
        yield Step("first call, nothing cached", [1e3 * seconds for (seconds,) in uncached])


def seconds_of(code: str, bytecode: str, kernels: str = "") -> list[float]:
    """Return the seconds that code prints in a new process, which caches in these folders."""
    environment = dict(os.environ)
    for variable in ("PYTHONDONTWRITEBYTECODE", "CUPY_CACHE_IN_MEMORY"):
        environment.pop(variable, None)
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    if kernels:
        environment["CUPY_CACHE_DIR"] = str(Path(kernels, "cupy"))
        environment["CUDA_CACHE_PATH"] = str(Path(kernels, "cuda"))
    # Python finds rope_cupy in the folder in which it is started.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [float(word) for word in done.stdout.split()]


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=9, help="processes of each median")
    return parser.parse_args()


if __name__ == "__main__":
    main()
