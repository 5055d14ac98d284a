"""Time what one call costs the host, whatever the GPU does: of rope_cupy and of its peers.

    python benchmarks/bench_host.py
    python benchmarks/bench_host.py --providers RawKernel,rope_cupy --profile

q and k have 16 tokens, 32 and 8 heads, head_dim 128 and, but for CuPy's, bfloat16. Every result is
compared with the float64 reference before it is timed. A time is the median over repeats of 500
calls in a row that wait for nothing, under torch.inference_mode; all are repeated in turn.
RawKernel is the yardstick: CuPy's launch, on a stream, of an empty kernel whose one argument is the
struct that rope_cupy's kernels take. Of a peer the first call that it can do is timed: in place,
positions; in place; new arrays, positions; new arrays. "slicing alone" is what "addresses never
seen" spends on making q and k. With --device cpu a time is that of the whole rotation.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import ctypes
import functools
import itertools
import pstats
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import numpy as np
import providers as peers
import timing
import torch
from inputs import Exact, inputs_of
from outcome import AbsentError, Result, UnsupportedError, result_of
from providers import Call, Case, Inputs, Pair
from report import MACHINE, destination, say, several
from shapes import Shape

import rope_cupy

COLUMNS = (*MACHINE, "call", "provider", "version", "status", "reason", "microseconds")
SHAPE = Shape("16-tokens-32/8", 1, 16, 32, 8, 128, 128, 0, False)
WARM_UP = 50
CALLS, REPEATS = 500, 9
CPU_CALLS = 20
PROFILED = 10  # times CALLS

RAW_KERNEL, OURS = "RawKernel", "rope_cupy"
NAMES = (RAW_KERNEL, *(name for name in peers.PROVIDERS if name not in peers.YARDSTICKS))

EMPTY_KERNEL = """
#include "rotary.cu"
using OurArguments = Arguments<float, float, OneAngle<1, 0>, NoNorm, Outputs, 2>;
extern "C" __global__ void empty_kernel(const __grid_constant__ OurArguments args) {}
"""
ARGUMENTS = ctypes.create_string_buffer(4096)  # as much as a kernel of any driver may take


class Task(NamedTuple):
    """A call to time."""

    call: str
    provider: str
    make: Callable[[Case, Inputs], Call]
    variant: str = "positions"  # of the case that the provider is asked for
    given: str = "positions"  # and of the one whose inputs it is given
    dtype: str = "bfloat16"
    rotates: bool = True

    def __str__(self) -> str:
        return f"{self.provider}, {self.call}"


def raw_kernel(case: Case, inputs: Inputs) -> Call:
    """Launch an empty kernel."""
    cupy = _cupy(case)
    from rope_cupy import jit

    kernel = cupy.RawKernel(EMPTY_KERNEL, "empty_kernel", jit.compile_options())
    arguments = (cupy.cuda.function.CPointer(ctypes.addressof(ARGUMENTS)),)
    stream = SimpleNamespace(ptr=torch.cuda.current_stream().cuda_stream)  # all that CuPy reads
    return functools.partial(kernel, (1,), (32,), arguments, stream=stream)


def by_provider(name: str) -> Callable[[Case, Inputs], Call]:
    """Return what makes a provider's call, and refuses one in place that makes new arrays."""

    def make(case: Case, inputs: Inputs) -> Call:
        call = peers.PROVIDERS[name](case, inputs)
        if case.variant != "new" and call()[0].data_ptr() != inputs.q.data_ptr():
            raise UnsupportedError("makes new arrays only")
        return call

    return make


def slicing(case: Case, inputs: Inputs) -> Call:
    """Take q and k from a long buffer of each, a token further on in every call."""
    tokens = SHAPE.tokens
    num_calls = 1 + WARM_UP + CALLS * REPEATS
    repeats = 1 + -(-num_calls // tokens)
    with torch.inference_mode(False):  # q and k of the other calls are plain tensors too
        long_q, long_k = (x.repeat(1, repeats, 1, 1) for x in (inputs.q, inputs.k))
    starts = iter(range(num_calls))

    def call() -> Pair:
        start = next(starts)
        return long_q[:, start : start + tokens], long_k[:, start : start + tokens]

    return call


def addresses_never_seen(case: Case, inputs: Inputs) -> Call:
    """Rotate slices at addresses where none have been rotated."""
    slices = slicing(case, inputs)
    table = rope_cupy.RotaryTable(inputs.table.cos, inputs.table.sin)

    def call() -> Pair:
        q, k = slices()
        return rope_cupy.apply_rotary_qk(q, k, table, positions=inputs.positions, out=(q, k))

    return call


def tuple_for_the_table(case: Case, inputs: Inputs) -> Call:
    """Rotate in place by cosines and sines that are in no RotaryTable."""
    q, k, table = inputs.q, inputs.k, (inputs.table.cos, inputs.table.sin)
    rotate = rope_cupy.apply_rotary_qk
    return functools.partial(rotate, q, k, table, positions=inputs.positions, out=(q, k))


def computed_table(case: Case, inputs: Inputs) -> Call:
    """Rotate in place by a table that rope_cupy has computed: no one else can change its arrays."""
    q, k, table = inputs.q, inputs.k, inputs.table
    positions = np.arange(len(table.cos)) + table.first
    angles = np.outer(positions, table.inv_freq.cpu().numpy())
    computed = rope_cupy.RotaryTable.from_angles(angles, like=table.cos)
    rotate = rope_cupy.apply_rotary_qk
    return functools.partial(rotate, q, k, computed, positions=inputs.positions, out=(q, k))


def cupy_arrays(case: Case, inputs: Inputs) -> Call:
    """Rotate CuPy's views of q and k in place."""
    view = _cupy(case).asarray
    q, k, positions = view(inputs.q), view(inputs.k), view(inputs.positions)
    table = rope_cupy.RotaryTable(view(inputs.table.cos), view(inputs.table.sin))

    def call() -> Pair:
        rope_cupy.apply_rotary_qk(q, k, table, positions=positions, out=(q, k))
        return inputs.q, inputs.k

    return call


def calls_of_all(provider: str) -> list[Task]:
    """Return the calls that every provider is asked for, those that users would rather make first.

    >>> print(*calls_of_all("Liger"), sep="; ")
    Liger, in place, positions; Liger, in place; Liger, new arrays, positions; Liger, new arrays
    """
    make = by_provider(provider)
    return [
        Task("in place, positions", provider, make),
        Task("in place", provider, make, "in place", "in place"),
        Task("new arrays, positions", provider, make, "new"),
        Task("new arrays", provider, make, "new", "new"),
    ]


CALLS_OF_OURS = [
    *calls_of_all(OURS),
    Task("addresses never seen", OURS, addresses_never_seen),
    Task("slicing alone", "torch", slicing, rotates=False),
    Task("a tuple for the table", OURS, tuple_for_the_table),
    Task("a computed table", OURS, computed_table),
    Task("CuPy arrays, in place, positions", OURS, cupy_arrays, dtype="float16"),
]


def measured(providers: list[str], device: str) -> list[tuple[Task, Result]]:
    """Measure every call of ours, and of a peer the first that it can do, all in turn."""
    every = [*itertools.chain.from_iterable(ready_calls(name, device) for name in providers)]
    calls = {task: call for task, _, call in every if call}
    with torch.inference_mode():
        if device == "cpu":
            times = [timing.cpu_time([call], CPU_CALLS) for call in calls.values()]
        else:
            times = timing.host_times([*calls.values()], CALLS, REPEATS)
    microseconds = dict(zip(calls, times, strict=True))
    return [
        (task, result._replace(microseconds=microseconds.get(task))) for task, result, _ in every
    ]


def ready_calls(provider: str, device: str) -> Iterator[tuple[Task, Result, Call | None]]:
    """Check calls, and return those that are right, to be timed."""
    if provider == RAW_KERNEL:
        task = Task("empty", provider, raw_kernel, rotates=False)
        yield task, *checked(task, device)
    elif provider == OURS:
        yield from ((task, *checked(task, device)) for task in CALLS_OF_OURS)
    else:
        for task in calls_of_all(provider):
            result, call = checked(task, device)
            if result.status != "unsupported":
                break
        yield task, result, call


def checked(task: Task, device: str) -> tuple[Result, Call | None]:
    """Check a call's result, and make it some more times."""
    say(str(task))
    case, inputs = _asked(task, device)
    try:
        with torch.inference_mode():
            call = task.make(case, inputs)
            error = Exact(case, inputs).error_of(call) if task.rotates else None
            for _ in range(WARM_UP if device == "cuda" else 0):
                call()
        return Result("ok", error=error), call
    except Exception as failure:
        return result_of(failure), None


def main() -> None:
    """Run what the command line asks for, write the CSV and print a table."""
    options = _parsed()
    path, common = destination("host", options)
    versions = {RAW_KERNEL: common["cupy"], "torch": common["torch"]}
    done = measured(options.providers, options.device)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for task, result in done:
            time = result.microseconds
            row = {
                "call": task.call,
                "provider": task.provider,
                "version": versions.get(task.provider) or peers.version(task.provider),
                "status": result.status,
                "reason": result.reason,
                "microseconds": "" if time is None else f"{time:.5g}",
            }
            writer.writerow(common | row)
    _print_table(done)
    if options.profile:
        _print_profile(options.device)
    print(f"\nwritten to {path}")


def _asked(task: Task, device: str) -> tuple[Case, Inputs]:
    """Return a task's case and its inputs."""
    case = Case(SHAPE, task.dtype, task.variant, device=device)
    return case, inputs_of(case._replace(variant=task.given))[0]


def _cupy(case: Case) -> Any:
    if case.device == "cpu":
        raise UnsupportedError("runs on a GPU only")
    try:
        import cupy
    except ImportError as error:
        raise AbsentError(str(error)) from error
    return cupy


def _print_table(done: list[tuple[Task, Result]]) -> None:
    """Print a line for each call, the fastest first, then those that were not timed."""
    times = {task: result.microseconds for task, result in done if result.microseconds}
    yardstick = next((times[task] for task in times if task.provider == RAW_KERNEL), None)
    print(f"{'microseconds of the host':50}{'time':>9}{f'of {RAW_KERNEL}':>15}")
    for task, time in sorted(times.items(), key=lambda item: item[1]):
        ratio = f"{time / yardstick:.2f}" if yardstick else ""
        print(f"{task!s:50}{time:9.2f}{ratio:>15}".rstrip())
    for task, result in done:
        if task not in times:
            print(f"{task!s:50}{result.status:>9}: {result.reason}")


def _print_profile(device: str) -> None:
    """Print where the time of rope_cupy's call in place, with positions, goes by cProfile."""
    task = CALLS_OF_OURS[0]
    profiler = cProfile.Profile()
    with torch.inference_mode():
        call = task.make(*_asked(task, device))
        for _ in range(WARM_UP):
            call()
        for _ in range(PROFILED):
            if device == "cuda":
                torch.cuda.synchronize()
            profiler.enable()
            for _ in range(CALLS):
                call()
            profiler.disable()
    print(f"\n{task}, by cProfile, which adds to every call of a function:")
    print("microseconds  calls  function")
    functions = pstats.Stats(profiler).stats.items()
    for (file, line, name), (_, calls, time, *_) in sorted(functions, key=lambda item: -item[1][2]):
        microseconds, calls = time * 1e6 / (PROFILED * CALLS), calls / (PROFILED * CALLS)
        where = f"{name}, {Path(file).name}:{line}" if line else name
        if calls >= 1:
            print(f"{microseconds:12.2f}  {calls:5.0f}  {where}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--providers",
        type=several(NAMES),
        default=list(NAMES),
        metavar="A,B",
        help=", ".join(NAMES),
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    parser.add_argument("--profile", action="store_true", help="and say where our time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
