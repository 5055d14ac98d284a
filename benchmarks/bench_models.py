"""Time blocks and layers of models, as they are and enabled: switched to rope_cupy by one call.

    python benchmarks/bench_models.py
    python benchmarks/bench_models.py --models flux,qwen3-8b-prefill --quick
    python benchmarks/bench_models.py --models ltx,wan-2.1-14b --csv models.csv --keep

With --keep the CSV keeps its rows of other models, so that a run may be made in parts; a model
takes a quarter of a minute to a minute, part of it to compile it four times.

A block or a layer has the sizes of its model, random weights and random inputs: see models.py. It
is called eagerly, compiled by torch.compile, and compiled with mode="reduce-overhead", which
replays CUDA graphs, each as it is and enabled, without gradients. Before anything is timed, each
output is compared with that of the model in float32: it must be no farther from it than the eager
model's, but for 5%. A step of decoding writes a cache of static length and attends to all of it, as
generate(cache_implementation="static") does. The columns:

    milliseconds       of a call between CUDA events, the median of calls made in turn: what a user
                       waits for, be it for the GPU or for the host
    gpu_milliseconds   of the GPU alone, by replays of a CUDA graph of the call. Those of
                       mode="reduce-overhead" replay one themselves, and cannot be captured in
                       another: they have none, and what they take above the gpu_milliseconds of
                       the compiled call is the copying of inputs into the graph and the host
    host_milliseconds  until a call returns, while the GPU has work left: guards of compiled graphs,
                       Python and launches
    speedup            the milliseconds of the same way of calling the model as it is, over these
    gpu_speedup        the same of gpu_milliseconds
    error              the relative norm of the difference from the output in float32
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import runner
import torch
from models import KINDS, Model, sharing_weights
from peers import need
from result import Result, WrongError
from runner import Entry, Parser
from timing import Clock, Events, HostLoop, OnTheCPU, Replays

COLUMNS = ("model", "library", "size", "dtype", "call", "version", "status", "reason")
COLUMNS += ("milliseconds", "speedup", "gpu_milliseconds", "gpu_speedup", "host_milliseconds")
COLUMNS += ("error",)
EAGER, COMPILED, GRAPHS = "eager", "compiled", "reduce-overhead"
ENABLED = ", enabled"
RUNS, QUICK_RUNS, CPU_RUNS = 300, 20, 2
HOST_CALLS, HOST_REPEATS = 5, 9  # few, so that the GPU's queue of launches never fills
# Runs of a call, and the seconds beyond which there are no more of them; rounds of replays, and
# microseconds. Where a GPU is at its limit of power, as in a block of a long video, its clock moves
# by more from run to run than what is compared: fewer of either told 1 % that was not there.
FEWEST, LONGEST = 9, 5
REPLAYS, LONGEST_REPLAYS = 60, 20e6
LONG, LONG_HOST = 0.02, (2, 5)  # seconds of a call, with which it is made fewer times
LEAST_ERROR = {"bfloat16": 1e-3, "float16": 1e-4, "float32": 1e-5}
MARGIN, SMALL_MARGIN = 1.05, 1.3  # of few numbers, roundings do not even out

Outputs = tuple[torch.Tensor, ...]


class Call:
    """A model that is called with its inputs."""

    def __init__(self, module: Callable[..., Any], inputs: dict[str, Any]) -> None:
        self.module, self.inputs = module, inputs

    def __call__(self) -> Any:
        return self.module(**self.inputs)

    def outputs(self) -> Outputs:
        """Return copies of the outputs, which a replayed graph writes over."""
        return tuple([each.clone() for each in tensors_of(self())])


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Return the tensors that a model returns, in any structure."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [each for part in output or () for each in tensors_of(part)]


def error_of(found: Outputs, exact: Outputs) -> float:
    """Return the relative norm of the error of the output that is worst."""
    pairs = zip(found, exact, strict=True)
    errors = [(each.float() - right).norm() / right.norm() for each, right in pairs]
    return max(map(float, errors))


def enabled(module: torch.nn.Module, library: str) -> torch.nn.Module:
    """Return a model with the same weights, switched to rope_cupy."""
    switched = sharing_weights(module)
    integration = importlib.import_module(f"rope_cupy.integrations.{library}")
    print(integration.enable(switched))
    return switched


def compiled(module: torch.nn.Module, way: str) -> Callable[..., Any]:
    """Return a model as one way calls it."""
    if way == EAGER:
        return module
    mode = GRAPHS if way == GRAPHS else None
    return torch.compile(module, fullgraph=True, dynamic=False, mode=mode)


def seconds_of(call: Call) -> float:
    """Return about how long a call takes that was made before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    model: Model, library: str, device: str, runs: int, ways: tuple[str, ...]
) -> dict[str, Result]:
    """Check the outputs of every call, then time those that are right."""
    torch.compiler.reset()
    module, inputs = model.module, model.inputs
    exact = Call(copy.deepcopy(module).float(), model.exact_inputs).outputs()
    eager_error = error_of(Call(module, inputs).outputs(), exact)
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    margin = SMALL_MARGIN if device == "cpu" else MARGIN
    limit = margin * max(eager_error, LEAST_ERROR[dtype])
    modules = {"": module, ENABLED: enabled(module, library)}

    def entry(way: str, which: str) -> Entry:
        def calls() -> list[list[Call]]:
            need(device != "cpu" or way == EAGER, "is timed on a GPU only")
            return [[Call(compiled(modules[which], way), inputs)]]

        def check(call: Call) -> float:
            error = error_of(call.outputs(), exact)
            if not error <= limit:
                raise WrongError(f"error {error:.2g}, more than {limit:.2g}", error)
            return error

        return Entry(calls, check)

    clock: Clock = OnTheCPU(runs)
    beside: dict[str, Clock] = {}
    if device != "cpu":
        seconds = seconds_of(Call(module, inputs))
        clock = Events(max(FEWEST, min(runs, int(LONGEST / seconds))))
        often = LONG_HOST if seconds > LONG else (HOST_CALLS, HOST_REPEATS)
        beside = {"host": HostLoop(*often, 0, on_gpu=True)}
    results: dict[str, Result] = {}
    # What replays a graph cannot be captured in another one.
    for group in ([way for way in ways if way != GRAPHS], [way for way in ways if way == GRAPHS]):
        entries = {way + which: entry(way, which) for way in group for which in modules}
        if device != "cpu" and GRAPHS not in group:
            beside["gpu"] = Replays(REPLAYS, LONGEST_REPLAYS, min_calls=1)
        results |= runner.measured(entries, clock, **beside)
        beside.pop("gpu", None)
    return results


@torch.no_grad()
def _rows(name: str, options: argparse.Namespace) -> list[runner.Row]:
    on_cpu, kind = options.device == "cpu", KINDS[name]
    size = kind.small if on_cpu else kind.size
    torch.manual_seed(0)
    version = peers.version(kind.library)
    runs = CPU_RUNS if on_cpu else QUICK_RUNS if options.quick else RUNS
    ways = (EAGER,) if options.quick else (EAGER, COMPILED, GRAPHS)
    start = time.perf_counter()
    try:
        model = kind.make(size, options.device, getattr(torch, options.dtype))
    except ImportError as missing:
        calls = [way + which for way in ways for which in ("", ENABLED)]
        results = dict.fromkeys(calls, Result("absent", str(missing)))
    else:
        results = measured(model, kind.library, options.device, runs, ways)
    runner.say(f"{time.perf_counter() - start:.0f} s")
    sizes = " ".join([f"{field}={value}" for field, value in size._asdict().items()])
    about = {"model": name, "library": kind.library, "size": sizes, "dtype": options.dtype}
    rows = []
    for call, result in results.items():
        base = results[call.removesuffix(ENABLED)]
        row = about | {"call": call, "version": version}
        row |= {"status": result.status, "reason": result.reason}
        if result.status == "ok":
            row["error"] = f"{result.error:.3g}"
            times = {"": result.microseconds} | result.beside
            bases = {"": base.microseconds} | (base.beside or {})
            for clock, spent in times.items():
                prefix = f"{clock}_" if clock else ""
                row[f"{prefix}milliseconds"] = f"{spent / 1e3:.4g}"
                if clock != "host" and bases.get(clock):
                    row[f"{prefix}speedup"] = f"{bases[clock] / spent:.3f}"
        rows.append(row)
    return rows


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    groups = [
        (f"{name}: a block or layer", functools.partial(_rows, name, options))
        for name in options.models
    ]
    if not options.keep:
        runner.run("models", options, COLUMNS, groups)
        return
    whole = options.csv
    options.csv = whole.with_suffix(".part.csv")  # what there is stays whole if this run ends early
    runner.run("models", options, COLUMNS, groups)
    merge(options.csv, whole)
    options.csv.unlink()
    print(f"and then to {whole}")


def merge(part: Path, whole: Path) -> None:
    """Put the rows of one CSV into another, in place of that one's rows of the same models."""
    rows: list[dict[str, str]] = []
    with part.open(newline="", encoding="utf-8") as file:
        new = csv.DictReader(file)
        rows += new
        names = list(new.fieldnames or ())
    measured_now = {row["model"] for row in rows}
    if whole.exists():
        with whole.open(newline="", encoding="utf-8") as file:
            old = csv.DictReader(file)
            rows += [row for row in old if row["model"] not in measured_now]
            if list(old.fieldnames or ()) != names:
                raise ValueError(f"{whole} must have the columns {names}, got {old.fieldnames}")
    order = list(KINDS)
    rows.sort(key=lambda row: order.index(row["model"]))
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)  # on the CPU, blocks are small
    parser.names("--models", KINDS)
    parser.flags(
        quick=f"nothing compiled, {QUICK_RUNS} calls of each",
        keep="keep the rows of other models in the CSV, which --csv names",
    )
    parser.add_argument("--dtype", choices=list(LEAST_ERROR), default="bfloat16")
    options = parser.parse_args()
    if options.keep and options.csv is None:
        parser.error("--keep needs --csv")
    return options


if __name__ == "__main__":
    main()
