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
import csv
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import providers as peers
import timing
import torch
from bench_host import CPU_CALLS, SHAPE, WARM_UP
from inputs import Exact, inputs_of
from outcome import Result, UnsupportedError, result_of
from providers import Call, Case, Inputs, Pair, Table
from report import MACHINE, destination, say, several
from shapes import GROUPS, SHAPES, Shape, chosen

COLUMNS = (*MACHINE, "shape", "measure", "provider", "call", "version", "status", "reason")
COLUMNS += ("microseconds", "limit_share", "error")
GPU, HOST = "GPU", "host"
NEW, IN_PLACE = "new arrays", "in place"
LIMIT = "limit"
PASSES, REPEATS = 50, 90  # of the host's time, which wanders by more than providers differ

Rotate = Callable[[torch.Tensor, torch.Tensor], Pair]


class Task(NamedTuple):
    """What is timed of a shape: forward and backward passes on the GPU, or on the host."""

    shape: Shape
    measure: str

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.measure}"


def rope_cupy(case: Case, table: Table) -> dict[str, Rotate]:
    """rope_cupy.apply_rotary_qk, into new arrays and in place."""
    import rope_cupy

    rotate = functools.partial(
        rope_cupy.apply_rotary_qk,
        table=rope_cupy.RotaryTable(table.cos, table.sin),
        interleaved=case.shape.interleaved,
    )
    return {NEW: rotate, IN_PLACE: lambda q, k: rotate(q, k, out=(q, k))}


def compiled_rope_cupy(case: Case, table: Table) -> dict[str, Rotate]:
    """The same inside a function that torch.compile compiles."""
    peers.gpu_only(case)
    rotate = rope_cupy(case, table)[NEW]
    return {NEW: torch.compile(lambda q, k: rotate(q, k), dynamic=False, fullgraph=True)}


def torch_eager(case: Case, table: Table) -> dict[str, Rotate]:
    """PyTorch's operations one by one, in float32."""
    arguments = table.cos, table.sin, None, case.shape.interleaved, 0
    return {NEW: lambda q, k: peers.rotated_qk_by_torch(q, k, *arguments)}


def torch_compile(case: Case, table: Table) -> dict[str, Rotate]:
    """The same function compiled by torch.compile for the case's shape."""
    peers.gpu_only(case)
    arguments = table.cos, table.sin, None, case.shape.interleaved, 0
    rotate = torch.compile(peers.rotated_qk_by_torch, dynamic=False)
    return {NEW: lambda q, k: rotate(q, k, *arguments)}


def liger(case: Case, table: Table) -> dict[str, Rotate]:
    """liger_rotary_pos_emb, which rotates q, k and their gradients in place."""
    peers.gpu_only(case)
    rotate = peers.imported("liger_kernel.transformers.rope").liger_rotary_pos_emb
    if case.shape.interleaved:
        raise UnsupportedError("pairs of halves only")
    cos, sin = (part[None] for part in table.form(peers.full_width, torch.float32))

    def call(q: torch.Tensor, k: torch.Tensor) -> Pair:
        q_out, k_out = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q_out.transpose(1, 2), k_out.transpose(1, 2)

    return {IN_PLACE: call}


def flash_attn(case: Case, table: Table) -> dict[str, Rotate]:
    """flash_attn.layers.rotary: apply_rotary_emb of q and of k."""
    return _one_by_one(case, table, "flash_attn.layers.rotary")


def quack(case: Case, table: Table) -> dict[str, Rotate]:
    """quack.rotary: apply_rotary_emb of q and of k."""
    return _one_by_one(case, table, "quack.rotary")


def _one_by_one(case: Case, table: Table, module: str) -> dict[str, Rotate]:
    peers.gpu_only(case)
    rotate = functools.partial(
        peers.imported(module).apply_rotary_emb,
        cos=table.cos,
        sin=table.sin,
        interleaved=case.shape.interleaved,
    )
    return {
        NEW: lambda q, k: (rotate(q), rotate(k)),
        IN_PLACE: lambda q, k: (rotate(q, inplace=True), rotate(k, inplace=True)),
    }


PROVIDERS: dict[str, Callable[[Case, Table], dict[str, Rotate]]] = {
    "rope_cupy": rope_cupy,
    "rope_cupy, compiled": compiled_rope_cupy,
    "Liger": liger,
    "flash-attn": flash_attn,
    "quack": quack,
    "torch.compile": torch_compile,
    "torch eager": torch_eager,
}


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


def measured(task: Task, names: list[str], device: str) -> list[tuple[str, str, Result]]:
    """Check results and gradients, then time them: (provider, call, result)."""
    torch.compiler.reset()  # else the shapes before count against the limit of recompilations
    case, by_graph = Case(task.shape, "bfloat16", device=device), task.measure == GPU
    sets = list(zip(inputs_of(case), inputs_of(case), strict=True))
    pool = torch.cuda.graph_pool_handle() if device == "cuda" and by_graph else None
    done: dict[tuple[str, str], Result] = {}
    timed: dict[tuple[str, str], Any] = {}
    if pool:
        limits = [_both(*(peers.limit(case, each) for each in pair)) for pair in sets]
        timed[LIMIT, ""], done[LIMIT, ""] = timing.captured(limits, pool), Result("ok")
    for name in names:
        try:
            rotations = PROVIDERS[name](case, sets[0][0].table)
        except Exception as failure:
            done[name, ""] = result_of(failure)
            continue
        for call, rotate in rotations.items():
            try:
                passes = [Pass(rotate, *each) for each in sets]
                error = _error_of(passes[0], case, *sets[0])
                ready = timing.captured(passes, pool) if pool else passes[0]
                for _ in range(WARM_UP if device == "cuda" and not pool else 0):
                    passes[0]()
                timed[name, call], done[name, call] = ready, Result("ok", error=error)
            except Exception as failure:
                done[name, call] = result_of(failure)
    if device == "cpu":
        times = [timing.cpu_time([each], CPU_CALLS) for each in timed.values()]
    elif pool:
        times = timing.replayed([*timed.values()])
    else:
        times = timing.host_times([*timed.values()], PASSES, REPEATS)
    for key, time in zip(timed, times, strict=True):
        done[key] = done[key]._replace(microseconds=time)
    return [(*key, result) for key, result in done.items()]


def _both(first: Call, second: Call) -> Call:
    def both() -> None:
        first()
        second()

    return both


def _error_of(each: Pass, case: Case, inputs: Inputs, grads: Inputs) -> float:
    """Return the larger relative error of the results and of the gradients."""
    table = grads.table
    conjugate = Table(table.cos, -table.sin, table.interleaved, -table.inv_freq, table.first)
    back = Exact(case, grads._replace(table=conjugate))
    forward = Exact(case, inputs)
    return max(forward.error_of(each.forward), back.error_of(each))


def main() -> None:
    """Run what the command line asks for, write the CSV and print a table."""
    options = _parsed()
    path, common = destination("training", options)
    tasks = [*(Task(shape, GPU) for shape in options.shapes), Task(SHAPE, HOST)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for task in tasks:
            say(str(task))
            rows = [*_rows(task, measured(task, options.providers, options.device))]
            writer.writerows(common | row for row in rows)
            file.flush()
            _print_table(task, rows)
            gc.collect()
    print(f"\nwritten to {path}")


def _rows(task: Task, results: list[tuple[str, str, Result]]) -> Iterator[dict[str, str]]:
    limit = None
    for name, call, result in results:
        time = result.microseconds
        if name == LIMIT:
            limit = time
        yield {
            "shape": task.shape.name,
            "measure": task.measure,
            "provider": name,
            "call": call,
            "version": peers.version(name.partition(",")[0]),
            "status": result.status,
            "reason": result.reason,
            "microseconds": "" if time is None else f"{time:.5g}",
            "limit_share": f"{limit / time:.4f}" if limit and time else "",
            "error": "" if result.error is None else f"{result.error:.2g}",
        }


def _print_table(task: Task, rows: list[dict[str, str]]) -> None:
    print(f"\n{task}: microseconds of a forward and a backward pass (share of the limit)")
    for row in sorted(rows, key=lambda row: float(row["microseconds"] or "inf")):
        name = ", ".join(filter(None, (row["provider"], row["call"])))
        share = f" ({row['limit_share']})" if row["limit_share"] else ""
        what = (
            row["microseconds"] + share
            if row["microseconds"]
            else f"{row['status']}: {row['reason']}"
        )
        print(f"{name:34}{what}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"Groups of shapes: {', '.join(GROUPS)}. Shapes: {', '.join(SHAPES)}.",
    )
    parser.add_argument(
        "--shapes",
        type=chosen,
        default=chosen("llama-3-8b-prefill,flux.1"),
        metavar="A,B",
        help="shapes and groups of shapes, of whole heads, for the time on the GPU",
    )
    parser.add_argument(
        "--providers",
        type=several(tuple(PROVIDERS)),
        default=list(PROVIDERS),
        metavar="A,B",
        help=", ".join(PROVIDERS),
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
