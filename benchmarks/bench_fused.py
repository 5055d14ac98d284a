"""Time what is fused with the rotation: RMSNorm before it, the write of a cache, a packed buffer.

    python benchmarks/bench_fused.py --goals
    python benchmarks/bench_fused.py --ops "norm head,cache" --shapes llama-3-8b-prefill

Every result is compared with the float64 reference before it is timed. The GPU's time is that of a
CUDA graph whose calls go through sets of buffers of three times the L2 in all, as in
bench_rotary.py. The bytes of a call are those of heads that must be read and written, once, and of
the table's rows, positions, slots and weights, read once. limit_share is the time of the limit
kernel (limit.cu), which reads and writes as many bytes of heads, times all bytes over those,
divided by the provider's time.

--goals compares what was measured with what the project wants of it.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Iterator
from typing import NamedTuple

import peers
import runner
from result import Result
from runner import SHAPE, TIMED, Parser, limit_share, measured_task, rows_of
from shapes import Shape, chosen
from tasks import FUSED_OPS, Task

COLUMNS = (*SHAPE, "op", "provider", *TIMED)
COLUMNS += ("megabytes", "gigabytes_a_second", "limit_share", "error")
OURS, ROTATION = "rope_cupy", "rotation alone"
TWO_LAUNCHES = ("two launches", "torch two launches")
SMALL = "1024-tokens-32/8,llama-3-8b-decode-64,llama-3-8b-decode-1"
PLAN = {
    "norm head": "qwen-image,flux.1,wan-2.1-14b-720p,qwen3-8b-prefill,head-dim-64,head-dim-256,"
    + SMALL,
    "norm heads": "wan-2.1-14b-720p,qwen-image,llama-3-8b-prefill," + SMALL,
    "cache": "llama-3-8b-prefill,head-dim-64,head-dim-256," + SMALL,
    "cache paged HND": "llama-3-8b-prefill,llama-3-8b-decode-64",
    "cache float8": "llama-3-8b-prefill,llama-3-8b-decode-64",
    "qkv": "qwen-image,llama-3-8b-prefill,llama-3-8b-decode-64",
    "qkv norm": "qwen-image,qwen3-8b-prefill,llama-3-8b-decode-64",
    "join": "qwen-image,llama-3-8b-decode-64",
    "eager": "llama-3-8b-prefill,llama-3-8b-decode-64",
}
COMPILED = ("qwen-image", "wan-2.1-14b-720p", "qwen3-8b-prefill", "llama-3-8b-prefill")
FEW_TOKENS = 64  # that a CPU is given unless shapes are named
MUCH = 100e6  # bytes from which on a norm is to cost nothing
NAMES = [
    name
    for name, peer in peers.PEERS.items()
    if peer.kinds.keys() & {"norm", "cache", "qkv", "join", "eager"}
]


class Goal(NamedTuple):
    """What is wanted of a task: a ratio, and at least or at most how much."""

    text: str
    task: Task
    measured: float | None
    demanded: float
    at_least: bool = True

    @property
    def held(self) -> str:
        """Return "yes" or "no", or "?" where it was not measured."""
        if self.measured is None:
            return "?"
        above = self.measured >= self.demanded
        return "yes" if above == self.at_least or self.measured == self.demanded else "no"


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    tasks = _tasks(options)
    if options.device == "cuda":
        runner.say("building the kernels of FlashInfer and SGLang")
        peers.build_ahead(tasks, options.providers)
    gc.freeze()  # a capture collects garbage, and need not look at what is imported
    reached: list[Goal] = []

    def rows(task: Task) -> list[runner.Row]:
        results = measured_task(task, _names(options, task), options.quick)
        reached.extend(goals(task, results))
        return rows_of(task, results)

    groups = ((str(task), functools.partial(rows, task)) for task in tasks)
    runner.run("fused", options, COLUMNS, groups)
    if options.goals:
        _print_goals(reached)


def goals(task: Task, results: dict[str, Result]) -> Iterator[Goal]:
    """Yield what is wanted of a task, with what was measured."""

    def over(name: str, other: str = OURS) -> float | None:
        first, second = (results.get(each) for each in (name, other))
        if not (first and first.microseconds and second and second.microseconds):
            return None
        return first.microseconds / second.microseconds

    def can(name: str) -> bool:
        return results.get(name, Result("absent")).status != "unsupported"

    if task.op.kind == "join" and task.heads_bytes >= MUCH:
        yield Goal("share of the limit", task, limit_share(task, results, OURS), 0.98)
    if task.op.kind == "norm" and task.op.variant == "in place":
        if task.heads_bytes >= MUCH:
            yield Goal(f"time over {ROTATION}'s", task, over(OURS, ROTATION), 1.03, at_least=False)
        if can("SGLang"):
            yield Goal("SGLang's time over ours", task, over("SGLang"), 1.25)
        if task.shape.interleaved and "torch.compile" in results:
            yield Goal("torch.compile's time over ours", task, over("torch.compile"), 2.5)
    if task.op.cache:
        yield Goal("share of the limit", task, limit_share(task, results, OURS), 0.95)
        ratio = (task.rotation_bytes + task.store_bytes) / task.heads_bytes
        for name in filter(can, TWO_LAUNCHES):
            yield Goal(f"time of {name} over ours", task, over(name), ratio)


def _tasks(options: argparse.Namespace) -> list[Task]:
    """Return the planned shapes of every operation, or those that were named."""

    def shapes_of(op: str) -> list[Shape]:
        if options.shapes is not None:
            return options.shapes
        few = options.device == "cpu"
        return [shape for shape in chosen(PLAN[op]) if not few or shape.tokens <= FEW_TOKENS]

    return [
        Task(shape, variant=FUSED_OPS[op].variant, device=options.device, name=op)
        for op in options.ops
        for shape in shapes_of(op)
    ]


def _names(options: argparse.Namespace, task: Task) -> list[str]:
    """Return the providers of a task; as planned, few shapes are compiled, which takes long."""
    names = [name for name in peers.names_for(task.op.kind) if name in options.providers]
    if options.shapes is None and (task.shape.name not in COMPILED or task.op.variant == "packed"):
        return [name for name in names if name != "torch.compile"]
    return names


def _print_goals(reached: list[Goal]) -> None:
    lines = [["goal", "task", "measured", "demanded", "held"]]
    for goal in reached:
        ratio = "-" if goal.measured is None else f"{goal.measured:.3f}"
        sign = ">=" if goal.at_least else "<="
        lines.append([goal.text, str(goal.task), ratio, f"{sign} {goal.demanded:.3f}", goal.held])
    runner.print_aligned(lines, [""] * len(lines))


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.shapes(None, "of every operation, each of which has its own else")
    parser.names("--ops", FUSED_OPS)
    parser.names("--providers", NAMES)
    parser.flags(goals="say which goals are held", quick="fewer replays")
    return parser.parse_args()


if __name__ == "__main__":
    main()
