"""benchmarks/bench_host.py and benchmarks/bench_cold_start.py, on the CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import bench_cold_start
import bench_host
import peers
import pytest
import torch
from bench_host import CASES, COMPILED, NAMES, NUM_THREADS, OURS
from nvrtc import ptx
from peers import PEERS, Peer
from result import AbsentError
from tasks import TOLERANCE
from test_plan import problem, spec

from rope_cupy import jit
from rope_cupy.plan import launch_plan

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


CUPY = ["CuPy arrays, in place, positions", "CuPy arrays, in place"]
BEHIND = {"eager": "", "threads": f", {NUM_THREADS} threads"} | COMPILED


def test_every_call_is_right_and_timed_once_in_every_way_without_a_gpu(tmp_path):
    rows, printed = rows_of("bench_host.py", tmp_path / "new" / "host.csv")
    columns = ["call", "provider", "version", "status", "reason", "microseconds"]
    assert list(rows[0]) == MACHINE + columns + ["multiple", "above_one_addition"]
    results = {(row["provider"], row["call"]): row for row in rows}
    assert len(results) == len(rows)
    ours = [name + BEHIND[way] for name, case in CASES.items() for way in case.ways]
    assert [call for provider, call in results if provider == OURS] == [*ours, *CUPY]
    for row in rows:
        assert (row["status"] == "ok") == (row["reason"] == "") == (row["microseconds"] != "")
        assert (row["status"] == "ok") == (row["multiple"] != "")
        is_compiled = row["call"].endswith(tuple(COMPILED.values()))
        assert is_compiled == (row["above_one_addition"] != ""), row
        assert row["status"] != "ok" or 0.1 < float(row["microseconds"]) < 1e6
    for call in ours:
        assert results[OURS, call]["status"] == "ok", results[OURS, call]
    first, *_ = (row for row in rows if row["status"] == "ok")
    assert (first["call"], first["multiple"]) == ("two empty_like", "1.000")
    ratio = float(results[OURS, "in place"]["microseconds"]) / float(first["microseconds"])
    assert float(results[OURS, "in place"]["multiple"]) == pytest.approx(ratio, rel=1e-3)
    one = results["torch.compile", "one addition, compiled"]
    more = float(results[OURS, "in place, compiled"]["multiple"]) - float(one["multiple"])
    above = float(results[OURS, "in place, compiled"]["above_one_addition"])
    assert above == pytest.approx(more, abs=2e-3) and one["above_one_addition"] == "0.000"
    of_torch = [call for provider, call in results if provider in ("torch", "torch.compile")]
    norm = "norm, new arrays, nn.Parameter weights"
    assert of_torch == [
        *("two empty_like", "slicing alone, addresses", "slicing alone, lengths"),
        *(name + behind for behind in COMPILED.values() for name in ("one addition", norm)),
        "new arrays",
    ]
    assert results["torch eager", "new arrays, positions"]["status"] == "ok"
    assert results["torch", "two empty_like"]["version"] == torch.__version__
    for key in [("RawKernel", "empty"), ("SGLang torch op", "new arrays"), (OURS, CUPY[0])]:
        assert results[key]["reason"] == "runs on a GPU only"
    assert {row["provider"] for row in rows} == {*NAMES}
    assert len(rows) == len(ours) + len(CUPY) + len(of_torch) + len(NAMES) - 3
    assert "rope_cupy, in place, positions    " in printed


@pytest.mark.parametrize("name", CASES)
def test_a_call_that_is_wrong_is_not_timed(monkeypatch, name):
    """Every case is compared with what it is to give: here, with the rotation of other numbers."""
    case = CASES[name]

    def wrong(*arguments):
        result = case.function(*arguments)
        (result if isinstance(result, torch.Tensor) else result[1]).mul_(1.1)
        return result

    monkeypatch.setitem(bench_host.CASES, name, case._replace(function=wrong))
    (row,) = (row for row in bench_host.rows_of_ours(["eager"]) if row.call == name)
    (result,) = bench_host.measured([row], "cpu").values()
    assert (result.status, result.microseconds) == ("wrong", None)
    assert result.error > TOLERANCE["bfloat16"]


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


def measured(monkeypatch, provider):
    """The call of a peer that is measured, and its result."""
    monkeypatch.setitem(PEERS, "peer", Peer((), {"rotation": provider}, gpu_only=False))
    rows = bench_host.asked(["peer"], ["eager"], "cpu")
    ((row, result),) = bench_host.measured(rows, "cpu").items()
    return row.call, result


def test_what_is_wrong_or_absent_is_not_timed_and_nothing_else_is_tried(monkeypatch):
    def unmoved(task, inputs):
        return lambda: (inputs.q, inputs.k)

    def missing(task, inputs):
        raise AbsentError("it is not installed")

    def broken(task, inputs):
        raise RuntimeError("no memory\nat all")

    expected = {unmoved: "wrong", missing: "absent", broken: "failed"}
    for provider, status in expected.items():
        call, result = measured(monkeypatch, provider)
        assert (call, result.status) == ("in place, positions", status)
        assert result.microseconds is None
    assert result.reason == "RuntimeError: no memory"


def test_a_peer_is_timed_by_the_first_call_that_it_can_do(monkeypatch):
    def new_arrays_without_positions(task, inputs):
        peers.need_no_positions(inputs)
        return peers.pytorch.eager(task, inputs)

    call, result = measured(monkeypatch, new_arrays_without_positions)
    assert (call, result.status) == ("new arrays", "ok")


@pytest.mark.parametrize("slices", ["addresses", "lengths"])
def test_no_two_calls_rotate_the_same_addresses_or_as_many_tokens(monkeypatch, slices):
    monkeypatch.setattr(bench_host, "WARM_UP", 3)
    monkeypatch.setattr(bench_host, "CPU_CALLS", 5)
    (case,) = (case for case in CASES.values() if case.slices == slices)
    row = bench_host.Row("", OURS, None, case.task)
    call = bench_host.call_of(case, "eager", bench_host.inputs_for(row, "cpu"))
    num_calls = 2 + 3 + 5 * bench_host.REPEATS
    pairs = [call() for _ in range(num_calls)]
    for arrays, heads in zip(zip(*pairs, strict=True), (32, 8), strict=True):
        assert {(len(x), *x.shape[2:]) for x in arrays} == {(1, heads, 128)}
        tokens, addresses = (
            {of(x) for x in arrays} for of in (lambda x: x.shape[1], torch.Tensor.data_ptr)
        )
        sizes = {"addresses": (1, num_calls), "lengths": (num_calls, 1)}
        assert (len(tokens), len(addresses)) == sizes[slices]
        assert (16 in tokens) == (slices == "addresses")
    with pytest.raises(StopIteration):
        call()


def test_threads_share_no_arrays_and_the_result_of_each_is_checked():
    seen = []

    def make(inputs):
        seen.append(inputs)
        rotate = bench_host.call_of(CASES["in place"], "eager", inputs)
        return rotate if len(seen) < NUM_THREADS else lambda: inputs[:2]

    row = bench_host.Row("", OURS, make, bench_host.PLAIN, threads=NUM_THREADS)
    (result,) = bench_host.measured([row], "cpu").values()
    assert result.status == "wrong"
    assert len({x.data_ptr() for inputs in seen for x in inputs[:3]}) == 3 * NUM_THREADS


def test_the_yardstick_takes_the_argument_of_our_kernels():
    options = (*jit.compile_options(), "-arch=sm_90")
    code = ptx(bench_host.EMPTY_KERNEL, "empty_kernel", options)
    size = launch_plan(problem([spec((1, 16, 32, 128))], 128)).packer.size
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
    assert list(tmp_path.glob("**/rope_cupy/call.*.pyc"))


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
