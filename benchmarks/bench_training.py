"""Time what training asks for: the rotation of q and k and, by autograd, that of their gradients.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --shapes llama-3-8b-prefill --providers rope_cupy,Liger

The GPU's time is that of a CUDA graph of forward and backward passes over sets of buffers, of three
times the L2 in all; the host's is the median over 90 repeats of 50 passes in a row, of 16 tokens.
All are repeated in turn. Results and gradients are compared with the float64 reference before they
are timed. q and k are no leaves, as behind a projection, so that they may be rotated in place; what
stands for the projection launches nothing. limit_share is the time of the limit kernel, for q and k
and for their gradients, over the provider's: no table is counted.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import peers
import runner
import torch
from bench_host import CPU_CALLS, SHAPE, WARM_UP
from peers import Rotate
from result import Result
from runner import TIMED, Entry, Parser
from tasks import TRAINING, Call, Exact, Inputs, Pair, Table, Task, inputs_of
from timing import Clock, HostLoop, OnTheCPU, Replays

COLUMNS = ("shape", "measure", "provider", "call", *TIMED, "limit_share", "error")
GPU, HOST, LIMIT = "GPU", "host", "limit"
PASSES, REPEATS = 50, 90  # of the host's time, which wanders by more than providers differ


class _Projected(torch.autograd.Function):
    """Stands for what has made q and k: passes them, and their gradients, on as they are."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> Pair:
        return q.detach(), k.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


class Pass:
    """A forward and a backward pass over one set of buffers."""

    def __init__(self, rotate: Rotate, inputs: Inputs, grads: Inputs) -> None:
        self.rotate, self.grads = rotate, (grads.q, grads.k)
        self.leaves = tuple(x.detach().requires_grad_() for x in (inputs.q, inputs.k))

    def forward(self) -> Pair:
        """Return q and k rotated, in tensors without a history."""
        q, k = self.rotate(*_Projected.apply(*self.leaves))
        return q.detach(), k.detach()

    def __call__(self) -> Pair:
        """Rotate q and k, then their gradients, which are returned."""
        results = self.rotate(*_Projected.apply(*self.leaves))
        gradients: Any = torch.autograd.grad(results, self.leaves, self.grads)
        return gradients


def measured(task: Task, measure: str, names: list[str]) -> dict[tuple[str, str], Result]:
    """Check results and gradients, then time them, by provider and call."""
    torch.compiler.reset()  # else the shapes before count against the limit of recompilations
    sets = list(zip(inputs_of(task), inputs_of(task), strict=True))
    entries: dict[tuple[str, str], Entry] = {}
    on_gpu = task.device == "cuda"
    if on_gpu and measure == GPU:
        entries[LIMIT, ""] = Entry(
            lambda: [[_both(*(peers.limit.dense(task, each) for each in pair)) for pair in sets]]
        )
    for name in names:
        try:
            rotations = peers.call_of(name, task, sets[0][0])
        except Exception as failure:
            entries[name, ""] = Entry(functools.partial(_raise, failure))
            continue
        for call, rotate in rotations.items():
            entries[name, call] = Entry(
                lambda rotate=rotate: [[Pass(rotate, *each) for each in sets]],
                lambda a_pass: _error_of(a_pass, task, *sets[0]),
            )
    clock: Clock = OnTheCPU(CPU_CALLS)
    if on_gpu:
        clock = Replays() if measure == GPU else HostLoop(PASSES, REPEATS, WARM_UP, on_gpu)
    return runner.measured(entries, clock)


def _raise(failure: Exception) -> Any:
    raise failure


def _both(first: Call, second: Call) -> Call:
    def both() -> None:
        first()
        second()

    return both


def _error_of(each: Pass, task: Task, inputs: Inputs, grads: Inputs) -> float:
    """Return the larger relative error of the results and of the gradients."""
    table = grads.table
    conjugate = Table(table.cos, -table.sin, table.interleaved, -table.inv_freq, table.first)
    backward = Exact(task, grads._replace(table=conjugate))
    return max(Exact(task, inputs).error_of(each.forward), backward.error_of(each))


def _rows(task: Task, measure: str, names: list[str]) -> list[runner.Row]:
    results = measured(task, measure, names)
    by_name = {", ".join(filter(None, key)): result for key, result in results.items()}
    return [
        row | {"provider": name, "call": call, "measure": measure, "version": peers.version(name)}
        for (name, call), row in zip(results, runner.rows_of(task, by_name), strict=True)
    ]


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    tasks = [(Task(shape, device=options.device, name=TRAINING), GPU) for shape in options.shapes]
    tasks.append((Task(SHAPE, device=options.device, name=TRAINING), HOST))
    groups = (
        (
            f"{task.shape.name}, {measure}",
            functools.partial(_rows, task, measure, options.providers),
        )
        for task, measure in tasks
    )
    runner.run("training", options, COLUMNS, groups)


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)
    text = "shapes and groups of shapes, of whole heads, for the time on the GPU"
    parser.shapes("llama-3-8b-prefill,flux.1", text)
    parser.names("--providers", peers.names_for(TRAINING))
    return parser.parse_args()


if __name__ == "__main__":
    main()
