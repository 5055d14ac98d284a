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
import csv
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import fused
import providers as peers
import timing
import torch
from bench_rotary import _digits, _stop_if_broken
from fused import LIMIT, OPS, OURS, ROTATION, TORCH_TWO_LAUNCHES, TWO_LAUNCHES, Exact, Task
from outcome import Result, result_of
from providers import Case
from report import MACHINE, destination, say, several
from shapes import GROUPS, SHAPES, Shape, chosen

COLUMNS = (
    *MACHINE,
    *("shape", "batch", "tokens", "q_heads", "k_heads", "head_dim", "rotary_dim", "rotary_offset"),
    *("pairing", "dtype", "op", "provider", "version", "status", "reason", "microseconds"),
    *("megabytes", "gigabytes_a_second", "limit_share", "error"),
)
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
    "eager": "llama-3-8b-prefill,llama-3-8b-decode-64",
}
COMPILED = ("qwen-image", "wan-2.1-14b-720p", "qwen3-8b-prefill", "llama-3-8b-prefill")
FEW_TOKENS = 64  # that a CPU is given unless shapes are named
MUCH = 100e6  # bytes from which on a norm is to cost nothing


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
    """Run what the command line asks for, write the CSV and print a table."""
    options = _parsed()
    path, common = destination("fused", options)
    tasks = _tasks(options)
    if options.device == "cuda":
        say("building the kernels of FlashInfer and SGLang")
        fused.build_ahead(tasks, options.providers)
    gc.freeze()  # a capture collects garbage, and need not look at what is imported
    done: list[tuple[Task, dict[str, Result]]] = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        try:
            for number, task in enumerate(tasks, 1):
                say(f"[{number}/{len(tasks)}] {task}")
                results = measured(task, _names(options, task), options.quick)
                done.append((task, results))
                writer.writerows(common | row for row in _rows(task, results))
                file.flush()
                _print_results(task, results)
        except KeyboardInterrupt:
            say("interrupted")
    if options.goals:
        _print_goals([goal for each in done for goal in goals(*each)])
    print(f"\nwritten to {path}")


def measured(task: Task, names: list[str], quick: bool = False) -> dict[str, Result]:
    """Check every provider's result, then time those that are right, all in turn."""
    on_gpu = task.device == "cuda"
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    sets = fused.inputs_of(task)
    exact = Exact(task, sets[0])
    results: dict[str, Result] = {}
    timed: list[tuple[str, Any]] = []
    for name in names:
        provider, error = fused.PROVIDERS[task.name][name], None
        options = peers.OPTIONS.get(name, [{}]) if on_gpu else [{}]
        try:
            with torch.inference_mode():
                ways = [[provider(task, each, **option) for each in sets] for option in options]
                if name not in fused.YARDSTICKS:
                    error = exact.error_of(ways[0][0])
                if on_gpu:
                    timed += [(name, timing.captured(calls, pool)) for calls in ways]
                else:
                    timed += [(name, timing.cpu_time(calls, 1 if quick else 5)) for calls in ways]
            results[name] = Result("ok", error=error)
        except Exception as failure:
            results[name] = result_of(failure)
        if on_gpu:
            _stop_if_broken(name, results)
    times = [time for _, time in timed]
    if on_gpu and timed:
        times = timing.replayed(times, timing.FEWEST_REPLAYS if quick else timing.REPLAYS)
    for (name, _), time in zip(timed, times, strict=True):
        result = results[name]
        if result.status == "ok":
            best = min(time, result.microseconds or time)
            results[name] = result._replace(microseconds=best)
    if on_gpu:
        timed.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return results


def goals(task: Task, results: dict[str, Result]) -> Iterator[Goal]:
    """Yield what is wanted of a task, with what was measured."""

    def over(name: str, other: str = OURS) -> float | None:
        first, second = (results.get(each) for each in (name, other))
        if not (first and first.microseconds and second and second.microseconds):
            return None
        return first.microseconds / second.microseconds

    if task.op.norm and task.op.variant == "in place":
        if task.heads_bytes >= MUCH:
            yield Goal(f"time over {ROTATION}'s", task, over(OURS, ROTATION), 1.03, at_least=False)
        if results.get("SGLang", Result("absent")).status != "unsupported":
            yield Goal("SGLang's time over ours", task, over("SGLang"), 1.25)
        if task.shape.interleaved and "torch.compile" in results:
            yield Goal("torch.compile's time over ours", task, over("torch.compile"), 2.5)
    if task.op.cache:
        yield Goal("share of the limit", task, limit_share(task, results, OURS), 0.95)
        ratio = (task.rotation_bytes + task.store_bytes) / task.heads_bytes
        for name in (TWO_LAUNCHES, TORCH_TWO_LAUNCHES):
            if results.get(name, Result("absent")).status != "unsupported":
                yield Goal(f"time of {name} over ours", task, over(name), ratio)


def limit_share(task: Task, results: dict[str, Result], name: str) -> float | None:
    """Return the limit's time for all bytes over the provider's time, where both are known."""
    limit, result = results.get(LIMIT), results.get(name)
    if not (limit and limit.microseconds and result and result.microseconds):
        return None
    all_bytes = task.heads_bytes + task.table_bytes
    return limit.microseconds * all_bytes / task.heads_bytes / result.microseconds


def _tasks(options: argparse.Namespace) -> list[Task]:
    """Return the planned shapes of every operation, or those that were named."""

    def shapes_of(op: str) -> list[Shape]:
        if options.shapes is not None:
            return options.shapes
        shapes = chosen(PLAN[op])
        if options.device == "cpu":
            return [shape for shape in shapes if shape.tokens <= FEW_TOKENS]
        return shapes

    return [
        Task(op, Case(shape, "bfloat16", OPS[op].variant, device=options.device))
        for op in options.ops
        for shape in shapes_of(op)
    ]


def _names(options: argparse.Namespace, task: Task) -> list[str]:
    """Return the providers of a task; as planned, few shapes are compiled, which takes long."""
    names = [name for name in fused.PROVIDERS[task.name] if name in options.providers]
    if options.shapes is None and (task.shape.name not in COMPILED or task.op.variant == "packed"):
        return [name for name in names if name != "torch.compile"]
    return names


def _rows(task: Task, results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    shape = task.shape._asdict()
    shape["shape"] = shape.pop("name")
    shape["pairing"] = "interleaved" if shape.pop("interleaved") else "half"
    all_bytes = task.heads_bytes + task.table_bytes
    for name, result in results.items():
        time = result.microseconds
        yield shape | {
            "dtype": task.case.dtype,
            "op": task.name,
            "provider": name,
            "version": fused.version(name),
            "status": result.status,
            "reason": result.reason,
            "microseconds": _digits(time),
            "megabytes": _digits(all_bytes / 1e6),
            "gigabytes_a_second": _digits(all_bytes / time / 1e3 if time else None),
            "limit_share": _digits(limit_share(task, results, name)),
            "error": _digits(result.error, 2),
        }


def _print_results(task: Task, results: dict[str, Result]) -> None:
    print(f"\n{task}: microseconds (share of the limit)")
    for name, result in results.items():
        share = limit_share(task, results, name)
        told = f"{result.status}: {result.reason}"
        if result.microseconds:
            told = f"{result.microseconds:.4g}" + (f" ({share:.3f})" if share else "")
        print(f"  {name:20}{told}")


def _print_goals(reached: list[Goal]) -> None:
    lines = [("goal", "task", "measured", "demanded", "held")]
    for goal in reached:
        ratio = "-" if goal.measured is None else f"{goal.measured:.3f}"
        sign = ">=" if goal.at_least else "<="
        lines.append((goal.text, str(goal.task), ratio, f"{sign} {goal.demanded:.3f}", goal.held))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"Groups of shapes: {', '.join(GROUPS)}. Shapes: {', '.join(SHAPES)}.",
    )

    def shapes(text: str) -> list[Shape]:
        try:
            return chosen(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    names = fused.NAMES
    parser.add_argument(
        "--shapes",
        type=shapes,
        metavar="A,B",
        help="of every operation, each of which has its own else",
    )
    parser.add_argument(
        "--ops", type=several(tuple(OPS)), default=list(OPS), metavar="A,B", help=", ".join(OPS)
    )
    parser.add_argument(
        "--providers", type=several(names), default=names, metavar="A,B", help=", ".join(names)
    )
    parser.add_argument("--goals", action="store_true", help="say which goals are held")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="fewer replays")
    return parser.parse_args()


if __name__ == "__main__":
    main()
