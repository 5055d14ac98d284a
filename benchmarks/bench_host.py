"""Time what one call costs the host, whatever the GPU does: calls as models make them, and peers.

    python benchmarks/bench_host.py
    python benchmarks/bench_host.py --ways eager --providers RawKernel,rope_cupy --profile

q and k have 16 tokens, 32 and 8 heads, head_dim 128 and, but for CuPy's, bfloat16. Every result is
compared with the float64 reference before it is timed. A time is the median over repeats of 500
calls in a row that wait for nothing, under torch.inference_mode; all are repeated in turn.
RawKernel is the yardstick: CuPy's launch, on a stream, of an empty kernel whose one argument is the
struct that rope_cupy's kernels take. `multiple` is a time over its time, or over the first row's
where there is none. Of a peer the first call that it can do is timed: in place, positions; in
place; new arrays, positions; new arrays.

Ways to make the calls of rope_cupy: "eager"; "threads", from 4 at once, the time of one call of one
of them; "compiled", as an operator in a graph of torch.compile of its own, with dynamic=False;
"dynamic", the same with numbers of tokens that may change. `above_one_addition` is how much more a
graph takes than one of a single addition, as a multiple. "slicing alone" is what the calls with
addresses or numbers of tokens never seen spend on making q and k.

With --device cpu a time is that of the whole rotation, and graphs are not compiled to kernels.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import functools
import itertools
import math
import pstats
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import peers
import runner
import torch
from peers import imported, need
from result import Result, UnsupportedError, WrongError
from runner import TIMED, Entry, Parser
from shapes import Shape
from tasks import HOST_CALL, Call, Exact, Inputs, Pair, Task, complex_numbers, full_width, inputs_of
from timing import HostLoop, Threads

from rope_cupy import RotaryTable, apply_qk_norm_rotary, apply_rotary_kv_cache, apply_rotary_qk

COLUMNS = ("call", "provider", *TIMED, "multiple", "above_one_addition")
SHAPE = Shape("16-tokens-32/8", 1, 16, 32, 8, 128, 128, 0, False)
WARM_UP = 50
CALLS, REPEATS = 500, 9
CPU_CALLS = 2  # a time on the CPU says nothing but that the call runs
PROFILED = 10  # times CALLS
NUM_THREADS = 4
WAYS = ("eager", "threads", "compiled", "dynamic")
RAW_KERNEL, OURS, TORCH, COMPILE = "RawKernel", "rope_cupy", "torch", "torch.compile"
PEERS = [*peers.names_for("rotation"), *peers.names_for(HOST_CALL)]
NAMES = (RAW_KERNEL, TORCH, *(name for name in PEERS if name not in peers.YARDSTICKS))
ONE_ADDITION = "one addition"

EMPTY_KERNEL = """
#include "rotary.cu"
using OurArguments = Arguments<float, float, OneAngle<1, 0>, NoNorm, Outputs, 2>;
extern "C" __global__ void empty_kernel(const __grid_constant__ OurArguments args) {}
"""
ARGUMENTS = ctypes.create_string_buffer(4096)  # as much as a kernel of any driver may take

Arrays = tuple[Any, ...]


def view(inputs: Inputs) -> Any:
    return RotaryTable(inputs.table.cos, inputs.table.sin)


def halves(inputs: Inputs) -> Any:
    return inputs.table.cos, inputs.table.sin


def computed(inputs: Inputs) -> Any:
    """Return a table that rope_cupy has computed: no one else can change its arrays."""
    positions = np.arange(len(inputs.table.cos)) + inputs.table.first
    angles = np.outer(positions, inputs.table.inv_freq.cpu().numpy())
    return RotaryTable.from_angles(angles, like=inputs.table.cos)


class Case(NamedTuple):
    """A call of rope_cupy: a function of a table, q, k and other arrays.

    others: returns the other arrays of a set of inputs.
    change: what inputs are changed beforehand.
    slices: q and k are taken anew for every call, of other "addresses" or "lengths".
    table: makes the table, where the function does not make it of the other arrays. Within a graph
        it is made of cosines and sines, so cases that differ in this alone are not compiled.
    ways: those in which it is called.
    """

    task: Task
    function: Callable[..., Any]
    others: Callable[[Inputs], Arrays] = lambda inputs: ()
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs
    slices: str = ""
    table: Callable[[Inputs], Any] | None = view
    ways: tuple[str, ...] = WAYS


def in_place(table: Any, q: Any, k: Any) -> Any:
    return apply_rotary_qk(q, k, table, out=(q, k))


def in_place_positions(table: Any, q: Any, k: Any, positions: Any) -> Any:
    return apply_rotary_qk(q, k, table, positions=positions, out=(q, k))


def new_arrays(table: Any, q: Any, k: Any) -> Any:
    return apply_rotary_qk(q, k, table)


def new_arrays_positions(table: Any, q: Any, k: Any, positions: Any) -> Any:
    return apply_rotary_qk(q, k, table, positions=positions)


def norm_in_place(table: Any, q: Any, k: Any, q_weight: Any, k_weight: Any) -> Any:
    return apply_qk_norm_rotary(q, k, q_weight, k_weight, table, out=(q, k))


def norm_new_arrays(table: Any, q: Any, k: Any, q_weight: Any, k_weight: Any) -> Any:
    return apply_qk_norm_rotary(q, k, q_weight, k_weight, table)


def kv_write(table: Any, q: Any, k: Any, v: Any, positions: Any, *cache: Any) -> Any:
    *caches, slots = cache
    options = {"positions": positions, "slot_mapping": slots, "out": q}
    return apply_rotary_kv_cache(q, k, v, *caches, table, **options)


def full_width_of_halves(_: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return apply_rotary_qk(q, k, RotaryTable.from_full_width(cos, sin), out=(q, k))


def full_width_of_neighbours(_: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    table = RotaryTable.from_full_width(cos, sin)
    return apply_rotary_qk(q, k, table, interleaved=True, out=(q, k))


def of_complex_numbers(_: Any, q: Any, k: Any, freqs: Any) -> Any:
    return apply_rotary_qk(q, k, RotaryTable.from_complex(freqs), interleaved=True, out=(q, k))


def tuple_of_halves(_: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    half = cos.shape[-1] // 2
    return apply_rotary_qk(q, k, (cos[..., :half], sin[..., :half]), out=(q, k))


def norm_by_torch(table: Any, q: Any, k: Any, q_weight: Any, k_weight: Any) -> Pair:
    return peers.pytorch.norm_rotated((q_weight, k_weight), q, k, *table, None, False, 0)


def positions_of(inputs: Inputs) -> Arrays:
    return (inputs.positions,)


def weights_of(inputs: Inputs) -> Arrays:
    return inputs.weights or ()


def cache_of(inputs: Inputs) -> Arrays:
    return inputs.v, inputs.positions, *inputs.stored.flat(), inputs.stored.slots


def form_of_transformers(inputs: Inputs) -> Arrays:
    """Return cosines and sines (1, s, d), halves repeated, in the dtype of q."""
    tables = inputs.table.form(full_width, inputs.q.dtype)
    return tuple(part[None, : inputs.q.shape[1]].clone() for part in tables)


def form_of_diffusers(inputs: Inputs) -> Arrays:
    """Return cosines and sines (s, d), each repeated, in float32."""
    tables = inputs.table.form(full_width, torch.float32)
    return tuple(part[: inputs.q.shape[1]].clone() for part in tables)


def complex_of(inputs: Inputs) -> Arrays:
    return (inputs.table.form(complex_numbers)[: inputs.q.shape[1]].clone(),)


def one_weight(inputs: Inputs) -> Inputs:
    weight, _ = weights_of(inputs)
    return inputs._replace(weights=(weight, weight))


def parameters(inputs: Inputs, requires_grad: bool = False) -> Inputs:
    q_weight, k_weight = (
        torch.nn.Parameter(weight, requires_grad) for weight in weights_of(inputs)
    )
    return inputs._replace(weights=(q_weight, k_weight))


PLAIN = Task(SHAPE)
POSITIONS = PLAIN._replace(variant="positions")
NEIGHBOURS = Task(SHAPE._replace(interleaved=True))
NORM, CACHE = PLAIN._replace(name="norm head"), POSITIONS._replace(name="cache")
with_grad = functools.partial(parameters, requires_grad=True)
with_positions = POSITIONS, in_place_positions, positions_of
norm = NORM, norm_in_place, weights_of
EAGER = ("eager", "threads")
CASES = {
    "in place, positions": Case(*with_positions),
    "in place": Case(PLAIN, in_place),
    "new arrays, positions": Case(POSITIONS, new_arrays_positions, positions_of),
    "new arrays": Case(PLAIN, new_arrays),
    "norm in place, plain weights": Case(*norm),
    "norm in place, one weight for q and k": Case(*norm, one_weight),
    "norm in place, nn.Parameter weights": Case(*norm, parameters),
    "norm in place, nn.Parameter weights that require gradients": Case(*norm, with_grad),
    "norm, new arrays, nn.Parameter weights": Case(NORM, norm_new_arrays, weights_of, parameters),
    "KV write, out=q": Case(CACHE, kv_write, cache_of),
    "addresses never seen": Case(*with_positions, slices="addresses"),
    # With dynamic=False every number of tokens is a graph of its own.
    "a number of tokens never seen": Case(
        PLAIN, in_place, slices="lengths", ways=(*EAGER, "dynamic")
    ),
    "a table of full width made, halves repeated": Case(
        PLAIN, full_width_of_halves, form_of_transformers, table=None
    ),
    "a table of full width made, each repeated": Case(
        NEIGHBOURS, full_width_of_neighbours, form_of_diffusers, table=None
    ),
    "a table of complex numbers made": Case(NEIGHBOURS, of_complex_numbers, complex_of, table=None),
    "a tuple of this step's halves": Case(PLAIN, tuple_of_halves, form_of_transformers, table=None),
    "a tuple for the table": Case(*with_positions, table=halves, ways=EAGER),
    "a computed table": Case(*with_positions, table=computed, ways=EAGER),
}
BY_TORCH = {
    "norm, new arrays, nn.Parameter weights": Case(NORM, norm_by_torch, weights_of, parameters)
}
COMPILED = {"compiled": ", compiled", "dynamic": ", compiled, dynamic lengths"}


class Row(NamedTuple):
    """A call to time: made from inputs of a task, whose exact result it must give."""

    call: str
    provider: str
    make: Callable[[Inputs], Call]
    task: Task = POSITIONS
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs
    threads: int = 1
    is_checked: bool = True

    def __str__(self) -> str:
        return f"{self.provider}, {self.call}"


def slicing(inputs: Inputs, slices: str) -> Callable[[], Pair]:
    """Return what takes q and k from long buffers: a token further on, or longer, in every call."""
    number = CALLS if inputs.q.is_cuda else CPU_CALLS
    num_calls, tokens = 2 + WARM_UP + number * REPEATS, SHAPE.tokens
    repeats = 2 + -(-num_calls // tokens)
    with torch.inference_mode(False):  # q and k of the other calls are plain tensors too
        long_q, long_k = (x.repeat(1, repeats, 1, 1) for x in inputs[:2])
    starts = iter(range(num_calls))

    def addresses() -> Pair:
        start = next(starts)
        return long_q[:, start : start + tokens], long_k[:, start : start + tokens]

    def lengths() -> Pair:
        end = tokens + 1 + next(starts)
        return long_q[:, :end], long_k[:, :end]

    return {"addresses": addresses, "lengths": lengths}[slices]


def call_of(case: Case, way: str, inputs: Inputs) -> Call:
    """Return a call of a case, eager or of a graph."""
    function, others = case.function, case.others(inputs)
    table = case.table(inputs) if case.table else None
    take = slicing(inputs, case.slices) if case.slices else None
    if way in COMPILED:
        table = halves(inputs) if case.table else None
        backend = "inductor" if inputs.q.is_cuda else "aot_eager"
        # Graphs of one code object are all looked through in every call.
        function = FunctionType(function.__code__.replace(), function.__globals__)
        dynamic = None if way == "dynamic" else False
        function = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
        if way == "dynamic":
            take = _first_marked(take)
            _mark_tokens(inputs.q, inputs.k, *others)
    if take is None:
        return functools.partial(function, table, inputs.q, inputs.k, *others)

    def call() -> Any:
        return function(table, *take(), *others)

    return call


def _first_marked(take: Callable[[], Pair] | None) -> Callable[[], Pair] | None:
    """Return the same slices, of which the first, which is compiled for, may have other lengths."""
    if take is None:
        return None
    first = take()
    _mark_tokens(*first)
    slices = itertools.chain([first], iter(take, None))
    return functools.partial(next, slices)


def _mark_tokens(*arrays: torch.Tensor) -> None:
    for x in arrays:
        for axis, size in enumerate(x.shape):
            if size in (SHAPE.tokens, SHAPE.tokens + 1):
                torch._dynamo.mark_dynamic(x, axis)


def rows_of_ours(ways: list[str]) -> Iterator[Row]:
    """Yield every call of rope_cupy, in every way, and those measured beside them."""
    for name, case in CASES.items():
        for way in filter(ways.__contains__, case.ways):
            call = name + COMPILED.get(way, f", {NUM_THREADS} threads" if way == "threads" else "")
            make = functools.partial(call_of, case, way)
            num_threads = NUM_THREADS if way == "threads" else 1
            yield Row(call, OURS, make, case.task, case.change, num_threads)
    if "eager" in ways:
        for task, name in ((POSITIONS, "in place, positions"), (PLAIN, "in place")):
            task = task._replace(dtype="float16")
            yield Row(f"CuPy arrays, {name}", OURS, cupy_arrays, task)


def rows_of_torch(ways: list[str]) -> Iterator[Row]:
    """Yield what PyTorch's own parts take."""
    if "eager" in ways:
        yield Row("two empty_like", TORCH, two_empty_like, is_checked=False)
        for slices in ("addresses", "lengths"):
            make = functools.partial(slicing, slices=slices)
            yield Row(f"slicing alone, {slices}", TORCH, make, is_checked=False)
    for way in filter(COMPILED.__contains__, ways):
        one = functools.partial(one_addition, way=way)
        yield Row(ONE_ADDITION + COMPILED[way], COMPILE, one, is_checked=False)
        for name, case in BY_TORCH.items():
            make = functools.partial(call_of, case, way)
            yield Row(name + COMPILED[way], COMPILE, make, case.task, case.change)


def two_empty_like(inputs: Inputs) -> Call:
    return lambda: (torch.empty_like(inputs.q), torch.empty_like(inputs.k))


def one_addition(inputs: Inputs, way: str) -> Call:
    """Return a graph of one addition, as those of rope_cupy are made."""
    case = Case(PLAIN, lambda table, q, k, x: x + 1, lambda inputs: (inputs.positions,), table=None)
    call = call_of(case, way, inputs)
    if not torch.equal(call(), inputs.positions + 1):
        raise WrongError("not one more", math.nan)
    return call


def raw_kernel(inputs: Inputs) -> Call:
    """Launch an empty kernel."""
    need(inputs.q.is_cuda, "runs on a GPU only")
    cupy = imported("cupy")
    from rope_cupy import jit

    kernel = cupy.RawKernel(EMPTY_KERNEL, "empty_kernel", jit.compile_options())
    arguments = (cupy.cuda.function.CPointer(ctypes.addressof(ARGUMENTS)),)
    stream = SimpleNamespace(ptr=torch.cuda.current_stream().cuda_stream)  # all that CuPy reads
    return functools.partial(kernel, (1,), (32,), arguments, stream=stream)


def cupy_arrays(inputs: Inputs) -> Call:
    """Rotate CuPy's views of q and k in place."""
    need(inputs.q.is_cuda, "runs on a GPU only")
    asarray = imported("cupy").asarray
    q, k, cos, sin = map(asarray, (*inputs[:2], inputs.table.cos, inputs.table.sin))
    options = {name: asarray(x) for name, x in inputs.options.items()}
    table, out = RotaryTable(cos, sin), (q, k)

    def call() -> Pair:
        apply_rotary_qk(q, k, table, out=out, **options)
        return inputs.q, inputs.k

    return call


def row_of_peer(provider: str, device: str) -> Row:
    """Return the first call that a peer can do, of those that users would rather make first."""
    rows = [
        Row("in place, positions", provider, by_provider(provider, POSITIONS)),
        Row("in place", provider, by_provider(provider, PLAIN), PLAIN),
        Row("new arrays, positions", provider, by_provider(provider, NEW)),
        Row("new arrays", provider, by_provider(provider, NEW), PLAIN),
    ]
    for row in rows:
        try:
            with torch.inference_mode():
                row.make(inputs_for(row, device))
        except UnsupportedError:
            continue
        except Exception:  # is met again where it is measured
            return row
        return row
    return rows[-1]


NEW = PLAIN._replace(variant="new")


def by_provider(name: str, task: Task) -> Callable[[Inputs], Call]:
    """Return what makes a provider's call, and refuses one in place that makes new arrays."""
    if HOST_CALL in peers.PEERS[name].kinds:
        task = task._replace(name=HOST_CALL)

    def make(inputs: Inputs) -> Call:
        call = peers.call_of(name, task._replace(device=inputs.q.device.type), inputs)
        is_new = task.variant != "new" and call()[0].data_ptr() != inputs.q.data_ptr()
        need(not is_new, "makes new arrays only")
        return call

    return make


def inputs_for(row: Row, device: str) -> Inputs:
    """Return inputs of a row: q, k and v apart, as of projections, and a long table."""
    task = row.task._replace(device=device, variant="positions")
    inputs = row.change(inputs_of(task, 1)[0])
    if row.task.variant != "positions":
        inputs = inputs._replace(positions=None, options={})
    q, k, v = (x.clone() for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def entry_of(row: Row, device: str) -> Entry:
    """Return what makes a row's call, and what checks it."""
    sets = [inputs_for(row, device) for _ in range(row.threads)]
    exact = [Exact(row.task._replace(device=device), inputs) for inputs in sets]

    def ways() -> list[list[Call]]:
        runner.say(str(row))
        calls = [row.make(inputs) for inputs in sets]
        return [calls if row.threads == 1 else [Threads(calls)]]

    def check(call: Any) -> float:
        calls = call.calls if row.threads > 1 else [call]
        return max(each.error_of(call) for each, call in zip(exact, calls, strict=True))

    return Entry(ways, check if row.is_checked else None)


def measured(rows: list[Row], device: str) -> dict[Row, Result]:
    """Check every call, and time those that are right, all in turn."""
    on_gpu = device == "cuda"
    clock = HostLoop(CALLS if on_gpu else CPU_CALLS, REPEATS, WARM_UP if on_gpu else 0, on_gpu)
    torch.compiler.reset()
    entries = {row: entry_of(row, device) for row in rows}
    with torch.inference_mode():
        return runner.measured(entries, clock)


def asked(providers: list[str], ways: list[str], device: str) -> list[Row]:
    """Return the rows of these providers."""
    rows: list[Row] = []
    for name in providers:
        if name == RAW_KERNEL:
            rows.append(Row("empty", RAW_KERNEL, raw_kernel, is_checked=False))
        elif name == OURS:
            rows += rows_of_ours(ways)
        elif name == TORCH:
            rows += rows_of_torch(ways)
        else:
            rows.append(row_of_peer(name, device))
    return rows


def table_of(results: dict[Row, Result]) -> list[runner.Row]:
    """Return the rows of the CSV, with the multiples of an empty launch, or of the first row."""
    times = {(row.provider, row.call): each.microseconds for row, each in results.items()}
    unit = times.get((RAW_KERNEL, "empty")) or next(iter(filter(None, times.values())), None)
    versions = {RAW_KERNEL: peers.version("limit"), TORCH: torch.__version__}
    table = []
    for row, result in results.items():
        columns = runner.row_of(row.provider, result) | {"call": row.call}
        columns["version"] = versions.get(row.provider) or columns["version"]
        time = result.microseconds
        if time and unit:
            columns["multiple"] = f"{time / unit:.3f}"
            ways = [way for way in COMPILED.values() if row.call.endswith(way)]
            addition = times.get((COMPILE, ONE_ADDITION + ways[0])) if ways else None
            if addition:
                columns["above_one_addition"] = f"{(time - addition) / unit:.3f}"
        table.append(columns)
    return table


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()

    def rows() -> list[runner.Row]:
        asked_for = asked(options.providers, options.ways, options.device)
        return table_of(measured(asked_for, options.device))

    runner.run("host", options, COLUMNS, [("microseconds of the host", rows)])
    if options.profile:
        _print_profile(options.device)


def _print_profile(device: str) -> None:
    """Print where the time of rope_cupy's call in place, with positions, goes by cProfile."""
    row = next(rows_of_ours(["eager"]))
    profiler = cProfile.Profile()
    with torch.inference_mode():
        call = row.make(inputs_for(row, device))
        for _ in range(WARM_UP):
            call()
        for _ in range(PROFILED):
            if device == "cuda":
                torch.cuda.synchronize()
            profiler.enable()
            for _ in range(CALLS):
                call()
            profiler.disable()
    print(f"\n{row}, by cProfile, which adds to every call of a function:")
    print("microseconds  calls  function")
    functions = pstats.Stats(profiler).stats.items()
    for (file, line, name), (_, calls, time, *_) in sorted(functions, key=lambda item: -item[1][2]):
        microseconds, calls = time * 1e6 / (PROFILED * CALLS), calls / (PROFILED * CALLS)
        where = f"{name}, {Path(file).name}:{line}" if line else name
        if calls >= 1:
            print(f"{microseconds:12.2f}  {calls:5.0f}  {where}")


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.names("--providers", NAMES)
    parser.names("--ways", WAYS)
    parser.flags(profile="and say where our time goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
