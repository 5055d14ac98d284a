"""benchmarks/bench_host.py and benchmarks/bench_cold_start.py, on the CPU."""

import csv
import doctest
import os
import subprocess
import sys
from pathlib import Path

import bench_cold_start
import bench_host
import providers
import pytest
import torch
from nvrtc import ptx
from outcome import AbsentError
from test_plan import FIELDS

from rope_cupy import jit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = ["date", "gpu", "driver", "python", "numpy", "cupy", "torch", "rope_cupy"]


def rows_of(script, path, *options):
    """The rows that a script writes on the CPU, and what it prints."""
    command = [sys.executable, BENCHMARKS / script, "--device=cpu", "--csv", path, *options]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # no thread waits for one that has no processor
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["gpu"] == "cpu" and row["rope_cupy"] == "0.1.0" for row in rows)
    return rows, done.stdout


def test_the_host_times_of_all_providers_without_a_gpu(tmp_path):
    rows, printed = rows_of("bench_host.py", tmp_path / "new" / "host.csv")
    columns = ["call", "provider", "version", "status", "reason", "microseconds"]
    assert list(rows[0]) == MACHINE + columns
    results = {(row["provider"], row["call"]): row for row in rows}
    assert len(results) == len(rows)
    ours = [call for provider, call in results if provider == "rope_cupy"]
    assert ours == [
        *("in place, positions", "in place", "new arrays, positions", "new arrays"),
        *("addresses never seen", "a tuple for the table", "a computed table"),
        "CuPy arrays, in place, positions",
    ]
    for call in ours[:-1]:
        assert results["rope_cupy", call]["status"] == "ok"
    for row in rows:
        assert (row["status"] == "ok") == (row["reason"] == "") == (row["microseconds"] != "")
        assert row["status"] != "ok" or 0.1 < float(row["microseconds"]) < 1e6
    assert results["torch eager", "new arrays, positions"]["status"] == "ok"
    assert results["torch", "slicing alone"]["version"] == torch.__version__
    without_a_gpu = [("RawKernel", "empty"), ("rope_cupy", ours[-1])]
    assert {results[key]["reason"] for key in without_a_gpu} == {"runs on a GPU only"}
    # Of every peer there is one call.
    peers = {row["provider"] for row in rows} - {"rope_cupy"}
    assert peers == {*bench_host.NAMES, "torch"} - {"rope_cupy"}
    assert len(rows) == len(ours) + len(peers)
    assert "rope_cupy, in place, positions    " in printed


def test_the_profile_names_the_functions_of_a_call(monkeypatch, capsys):
    monkeypatch.setattr(bench_host, "CALLS", 10)
    bench_host._print_profile("cpu")
    heading, columns, *lines = capsys.readouterr().out.strip().splitlines()
    assert heading.startswith("rope_cupy, in place, positions, by cProfile")
    assert columns.split() == ["microseconds", "calls", "function"]
    times = [float(line.split()[0]) for line in lines]
    assert times == sorted(times, reverse=True)
    (line,) = (line for line in lines if " apply_rotary_qk, rotary.py:" in line)
    assert line.split()[1] == "1"


def test_what_is_wrong_or_absent_is_not_timed_and_nothing_else_is_tried(monkeypatch):
    def unmoved(case, inputs):
        return lambda: (inputs.q, inputs.k)

    def missing(case, inputs):
        raise AbsentError("it is not installed")

    def broken(case, inputs):
        raise RuntimeError("no memory\nat all")

    expected = {unmoved: "wrong", missing: "absent", broken: "failed"}
    for provider, status in expected.items():
        monkeypatch.setitem(providers.PROVIDERS, "peer", provider)
        ((task, result),) = bench_host.measured(["peer"], "cpu")
        assert (task.call, result.status) == ("in place, positions", status)
        assert result.microseconds is None
    assert result.reason == "RuntimeError: no memory"


def test_a_peer_is_timed_by_the_first_call_that_it_can_do(monkeypatch):
    def new_arrays_without_positions(case, inputs):
        providers._no_positions(inputs)
        return providers.torch_eager(case, inputs)

    monkeypatch.setitem(providers.PROVIDERS, "peer", new_arrays_without_positions)
    ((task, result),) = bench_host.measured(["peer"], "cpu")
    assert (task.call, result.status) == ("new arrays", "ok")


def test_no_two_calls_rotate_the_same_addresses(monkeypatch):
    monkeypatch.setattr(bench_host, "WARM_UP", 3)
    monkeypatch.setattr(bench_host, "CALLS", 5)
    task = next(task for task in bench_host.CALLS_OF_OURS if task.call == "addresses never seen")
    call = task.make(*bench_host._asked(task, "cpu"))
    num_calls = 1 + 3 + 5 * bench_host.REPEATS
    pairs = [call() for _ in range(num_calls)]
    assert {(q.shape, k.shape) for q, k in pairs} == {((1, 16, 32, 128), (1, 16, 8, 128))}
    for arrays in zip(*pairs, strict=True):
        assert len({array.data_ptr() for array in arrays}) == num_calls
    with pytest.raises(StopIteration):
        call()


def test_the_yardstick_takes_the_argument_of_our_kernels():
    options = (*jit.compile_options(), "-arch=sm_90")
    code = ptx(bench_host.EMPTY_KERNEL, "empty_kernel", options)
    size = 8 * (7 + len(FIELDS) + 2)  # seven pointers, integers, a pointer and an integer
    assert f"empty_kernel_param_0[{size}]" in code
    assert size <= len(bench_host.ARGUMENTS)


def test_the_cold_start_without_a_gpu_is_that_of_the_imports(tmp_path):
    path = tmp_path / "new" / "cold.csv"
    rows, printed = rows_of("bench_cold_start.py", path, "--runs=2")
    assert list(rows[0]) == [*MACHINE, "step", "milliseconds", "runs"]
    imports, first_calls = rows[:2], rows[2:]
    assert [row["step"] for row in imports] == ["import numpy", "import rope_cupy after numpy"]
    assert all(0.1 < float(row["milliseconds"]) < 60e3 and row["runs"] == "2" for row in imports)
    steps = ["first call, kernel cached", "first call, nothing cached"]
    assert [row["step"] for row in first_calls] == steps
    assert all((row["milliseconds"], row["runs"]) == ("", "0") for row in first_calls)
    assert printed.count("not measured: needs a GPU") == 2


def test_an_import_that_brings_torch_or_cupy_ends_the_run(tmp_path):
    code = "import sys; sys.modules['torch'] = None\n" + bench_cold_start.IMPORTS
    with pytest.raises(subprocess.CalledProcessError):
        bench_cold_start.seconds_of(code, str(tmp_path))


def test_the_processes_cache_bytecode(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    bench_cold_start.seconds_of(bench_cold_start.IMPORTS, str(tmp_path))
    assert list(tmp_path.glob("**/rope_cupy/calls.*.pyc"))


def test_the_steps_of_a_gpu_have_caches_of_their_own(monkeypatch):
    folders = []

    def seconds_of(code, bytecode, caches=""):
        assert Path(bytecode).is_dir()
        if not caches:
            return [0.25, 0.5]
        assert code == bench_cold_start.FIRST_CALL
        is_new = not any(Path(caches).iterdir())
        Path(caches, "kernel").touch()
        folders.append((caches, is_new))
        return [0.125]

    monkeypatch.setattr(bench_cold_start, "seconds_of", seconds_of)
    steps = list(bench_cold_start.steps("cuda", 3))
    assert [times for _, times in steps] == [[250] * 3, [500] * 3, [125] * 3, [125] * 3]
    assert [is_new for _, is_new in folders] == [True, False, False, False, True, True, True]
    assert not any(Path(folder).exists() for folder, _ in folders)


def test_the_first_call_that_is_timed_is_right(tmp_path):
    """The process's code, with NumPy in CuPy's place."""
    stand_in = """
import sys, types
import numpy

runtime = types.SimpleNamespace(deviceSynchronize=lambda: None)
sys.modules["cupy"] = types.SimpleNamespace(
    asarray=lambda x: x.copy(), cuda=types.SimpleNamespace(runtime=runtime)
)
"""
    code = bench_cold_start.FIRST_CALL.replace("y.get()", "y")
    (seconds,) = bench_cold_start.seconds_of(stand_in + code, str(tmp_path))
    assert 0 < seconds < 60


def test_the_examples_of_docstrings_are_right():
    assert doctest.testmod(bench_host) == (0, 1)
