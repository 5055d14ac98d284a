"""Time blocks and layers of models, as they are and enabled: switched to rope_cupy by one call.

    python benchmarks/bench_models.py
    python benchmarks/bench_models.py --models flux,qwen3-8b-prefill --quick

A block or a layer has the sizes of its model, random weights and random inputs: see models.py. It
is called eagerly, compiled by torch.compile, and compiled with mode="reduce-overhead", which
replays CUDA graphs, each as it is and enabled, without gradients. `milliseconds` is the median of
calls made in turn, between CUDA events: what a user waits for. `gpu_milliseconds` is the time of
the GPU alone, by replays of a CUDA graph (mode="reduce-overhead" is one already), and
`host_milliseconds` that of the host. `speedup` and `gpu_speedup` compare with the same way of
calling the model as it is. Before anything is timed, each output is compared with that of the model
in float32: it must be no farther from it than the eager model's, but for 5%.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
from collections.abc import Callable
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
RUNS, QUICK_RUNS, CPU_RUNS = 50, 20, 2
HOST_CALLS, HOST_REPEATS = 5, 9  # few, so that the GPU's queue of launches never fills
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
        clock = Events(runs)
        beside = {"host": HostLoop(HOST_CALLS, HOST_REPEATS, 0, on_gpu=True)}
    results: dict[str, Result] = {}
    # What replays a graph cannot be captured in another one.
    for group in ([way for way in ways if way != GRAPHS], [way for way in ways if way == GRAPHS]):
        entries = {way + which: entry(way, which) for way in group for which in modules}
        if device != "cpu" and GRAPHS not in group:
            beside["gpu"] = Replays(min_calls=1)
        results |= runner.measured(entries, clock, **beside)
        beside.pop("gpu", None)
    return results


@torch.no_grad()
def _rows(name: str, options: argparse.Namespace) -> list[runner.Row]:
    on_cpu, kind = options.device == "cpu", KINDS[name]
    size = kind.small if on_cpu else kind.size
    torch.manual_seed(0)
    version = peers.version(kind.library)
    model = kind.make(size, options.device, getattr(torch, options.dtype))
    runs = CPU_RUNS if on_cpu else QUICK_RUNS if options.quick else RUNS
    ways = (EAGER,) if options.quick else (EAGER, COMPILED, GRAPHS)
    results = measured(model, kind.library, options.device, runs, ways)
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
            for clock, time in times.items():
                prefix = f"{clock}_" if clock else ""
                row[f"{prefix}milliseconds"] = f"{time / 1e3:.4g}"
                if clock != "host" and bases.get(clock):
                    row[f"{prefix}speedup"] = f"{bases[clock] / time:.3f}"
        rows.append(row)
    return rows


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    groups = [
        (f"{name}: a block or layer", functools.partial(_rows, name, options))
        for name in options.models
    ]
    runner.run("models", options, COLUMNS, groups)


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)  # on the CPU, blocks are small
    parser.names("--models", KINDS)
    parser.flags(quick=f"nothing compiled, {QUICK_RUNS} calls of each")
    parser.add_argument("--dtype", choices=list(LEAST_ERROR), default="bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
