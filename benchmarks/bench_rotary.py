"""Time the rotation of q and k by rope_cupy and by its peers, on the shapes of real models.

    python benchmarks/bench_rotary.py --shapes models,small
    python benchmarks/bench_rotary.py --goals

Every result is compared with the float64 reference before it is timed, on fresh random numbers. The
GPU's time is that of a CUDA graph whose calls go through sets of buffers, each with a q, a k and a
table of its own, of three times the L2 in all. The bytes of a call are those of q and k, read and
written once (in place, those that turn), and of the table's rows and the positions, read once.

limit_share is the time of the limit kernel (limit.cu), which only reads and writes back q and k,
times all bytes over those of q and k, divided by the provider's time.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import providers as peers
import timing
import torch
from inputs import TOLERANCE, Exact, inputs_of
from outcome import Result, result_of
from providers import TABLES, TOLD, VARIANTS, Call, Case, Inputs
from report import MACHINE, destination, say, several
from shapes import GROUPS, SHAPES, Shape, chosen, is_causal

COLUMNS = (
    *MACHINE,
    *("shape", "batch", "tokens", "q_heads", "k_heads", "head_dim", "rotary_dim", "rotary_offset"),
    *("pairing", "dtype", "variant", "table", "measure", "provider", "version"),
    *("status", "reason", "microseconds", "megabytes", "limit_share", "error"),
)
ROTATION, WITH_ATTENTION = "rotation", "rotation and attention"
MOST_TOKENS = 10_000  # of a shape whose attention is timed
SLOW = ("torch eager", "torch.compile", "transformers", "diffusers")  # many passes, or compilation
TABLE_READERS = (*peers.YARDSTICKS, "rope_cupy")  # all others get a table of their own form


class Task(NamedTuple):
    """A case, and what is timed of it."""

    case: Case
    measure: str = ROTATION

    def __str__(self) -> str:
        shape, dtype, variant, table, _ = self.case
        attention = ", with attention" if self.measure == WITH_ATTENTION else ""
        return f"{shape.name}, {dtype}, {variant}, {table} table{attention}"


def main() -> None:
    """Run what the command line asks for, write the CSV and print a table."""
    options = _parsed()
    path, common = destination("rotary", options)
    tasks = _goals(options.device) if options.goals else _asked(options)
    if options.device == "cuda":
        say("building the kernels of FlashInfer and SGLang")
        peers.build_ahead([task.case for task in tasks], options.providers)
    gc.freeze()  # a capture collects garbage, and need not look at what is imported
    done: list[tuple[Task, dict[str, Result]]] = []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        try:
            for number, task in enumerate(tasks, 1):
                say(f"[{number}/{len(tasks)}] {task}")
                names = _names(options, task)
                results = measured(task, names, options.quick)
                done.append((task, results))
                writer.writerows(common | row for row in _rows(task, results))
                file.flush()
        except KeyboardInterrupt:
            say("interrupted")
    _print_table(options.providers, done)
    print(f"\nwritten to {path}")


def measured(task: Task, names: list[str], quick: bool = False) -> dict[str, Result]:
    """Check every provider's result, then time those that are right, all in turn."""
    on_gpu = task.case.device == "cuda"
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    sets = inputs_of(task.case)
    exact = Exact(task.case, sets[0])
    results: dict[str, Result] = {}
    timed: list[tuple[str, Any]] = []
    for name in names:
        try:
            with torch.inference_mode():
                error, calls = _ready(task, name, sets, exact)
                if on_gpu:
                    timed += [(name, timing.captured(each, pool)) for each in calls]
                else:
                    timed += [(name, timing.cpu_time(each, 1 if quick else 5)) for each in calls]
            results[name] = Result("ok", error=error)
        except Exception as failure:
            results[name] = result_of(failure)
        if on_gpu:
            _stop_if_broken(name, results)
    times = [time for _, time in timed]
    if on_gpu and timed:
        rounds, longest = timing.REPLAYS, timing.LONGEST
        if task.measure == WITH_ATTENTION:
            rounds, longest = timing.MANY_REPLAYS, timing.LONGEST_OF_MANY
        times = timing.replayed(times, timing.FEWEST_REPLAYS if quick else rounds, longest)
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


def _ready(
    task: Task, name: str, sets: list[Inputs], exact: Exact
) -> tuple[float | None, list[list[Call]]]:
    """Return a provider's error and its calls, a list for each way in which it may be called."""
    provider, error = peers.PROVIDERS[name], None
    options = peers.OPTIONS.get(name, [{}]) if task.case.device == "cuda" else [{}]
    ways = [[provider(task.case, inputs, **option) for inputs in sets] for option in options]
    rotates = name not in peers.YARDSTICKS
    if rotates:
        error = exact.error_of(ways[0][0])
    if task.measure == WITH_ATTENTION:
        ways = [
            [
                _attending(call if rotates else _untouched(call, inputs), inputs, task.case)
                for call, inputs in zip(calls, sets, strict=True)
            ]
            for calls in ways
        ]
    return error, ways


def _attending(rotate: Call, inputs: Inputs, case: Case) -> Call:
    """Return a call that attends with what another one has rotated."""
    shape = case.shape
    v = inputs.v.transpose(1, 2)
    is_gqa, causal = shape.q_heads != shape.k_heads, is_causal(shape)

    def call() -> torch.Tensor:
        q, k = rotate()
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v, is_causal=causal, enable_gqa=is_gqa
        )

    return call


def _untouched(call: Call, inputs: Inputs) -> Call:
    def touched() -> tuple[torch.Tensor, torch.Tensor]:
        call()
        return inputs.q, inputs.k

    return touched


def _stop_if_broken(name: str, results: dict[str, Result]) -> None:
    """End the run where an error has left CUDA unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        sys.exit(f"CUDA is unusable after {name} ({results[name].reason}): {first_line}")


def _asked(options: argparse.Namespace) -> list[Task]:
    """Return the product of the options."""
    lists = options.shapes, options.dtypes, options.variants, options.tables
    tasks = []
    for parts in product(*lists):
        case = Case(*parts, options.device)
        tasks.append(Task(case))
        if options.attention and case.shape.tokens <= MOST_TOKENS:
            tasks.append(Task(case, WITH_ATTENTION))
    return tasks


def _goals(device: str) -> list[Task]:
    """Return the tasks for which the project has a goal, those of few providers first."""

    def tasks() -> Iterator[Task]:
        for shape in chosen("qwen-image,wan-2.1-14b-720p,llama-3-8b-prefill"):
            case = Case(shape, "bfloat16", device=device)
            yield from (Task(case._replace(table=table)) for table in TABLES[1:])
            for variant in VARIANTS[1:]:
                if variant not in TOLD or shape.tokens <= MOST_TOKENS:
                    yield Task(case._replace(variant=variant))
            yield from (Task(case._replace(dtype=dtype)) for dtype in ("float16", "float32"))
        for shape in chosen("small"):
            yield Task(Case(shape, "bfloat16", "positions", device=device))
        for shape in chosen("head-dims,small,other,models,sweep"):
            case = Case(shape, "bfloat16", device=device)
            yield Task(case)
            is_near_l2 = 20e6 <= case.heads_bytes + case.table_bytes <= 150e6
            if is_near_l2 and shape.tokens <= MOST_TOKENS:
                yield Task(case, WITH_ATTENTION)

    return list(dict.fromkeys(tasks()))


def _names(options: argparse.Namespace, task: Task) -> list[str]:
    """Return the providers of a task.

    The slices alone are measured where others lie between them. With --goals, those who take long
    turn plain models and the sweep, and nobody else reads a form of table that rope_cupy does.
    """
    case, left_out = task.case, set()
    if case.variant != "in place" or case.shape.rotary_dim == case.shape.head_dim:
        left_out.add("limit, same places")
    if options.goals:
        is_plain = case == Case(case.shape, "bfloat16", device=case.device)
        if not (is_plain and case.shape in GROUPS["models"] + GROUPS["sweep"]):
            left_out.update(SLOW)
        if case.table != "half":
            left_out.update(name for name in peers.PROVIDERS if name not in TABLE_READERS)
    return [name for name in options.providers if name not in left_out]


def _rows(task: Task, results: dict[str, Result]) -> Iterator[dict[str, Any]]:
    case = task.case
    shape = case.shape._asdict()
    shape["shape"] = shape.pop("name")
    shape["pairing"] = "interleaved" if shape.pop("interleaved") else "half"
    for name, result in results.items():
        yield shape | {
            "dtype": case.dtype,
            "variant": case.variant,
            "table": case.table,
            "measure": task.measure,
            "provider": name,
            "version": peers.version(name),
            "status": result.status,
            "reason": result.reason,
            "microseconds": _digits(result.microseconds),
            "megabytes": _digits((case.heads_bytes + case.table_bytes) / 1e6),
            "limit_share": _digits(limit_share(task, results, name)),
            "error": _digits(result.error, 2),
        }


def limit_share(task: Task, results: dict[str, Result], name: str) -> float | None:
    """Return the limit's time for all bytes over the provider's time, where both are known."""
    limit = results.get("limit")
    time = results[name].microseconds
    if task.measure != ROTATION or limit is None or not limit.microseconds or not time:
        return None
    all_bytes = task.case.heads_bytes + task.case.table_bytes
    return limit.microseconds * all_bytes / task.case.heads_bytes / time


def _digits(value: float | None, digits: int = 5) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _print_table(providers: list[str], done: list[tuple[Task, dict[str, Result]]]) -> None:
    """Print a line of times for each task, with the share of the limit in brackets."""
    lines = [["microseconds (share of the limit)", *providers]]
    for task, results in done:
        cells = [str(task)]
        for name in providers:
            result = results.get(name)
            if result is None or result.microseconds is None:
                cells.append(result.status if result else "-")
                continue
            share = limit_share(task, results, name)
            cells.append(f"{result.microseconds:.4g}" + (f" ({share:.3f})" if share else ""))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


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

    every = tuple(peers.PROVIDERS)
    lists: dict[str, tuple[Callable[[str], Any], Any, str]] = {
        "--shapes": (shapes, chosen("models,small"), "shapes and groups of shapes"),
        "--providers": (several(every), list(every), ", ".join(every)),
        "--dtypes": (several(tuple(TOLERANCE)), ["bfloat16"], ", ".join(TOLERANCE)),
        "--variants": (several(VARIANTS), ["in place"], ", ".join(VARIANTS)),
        "--tables": (several(TABLES), ["half"], f"the forms that rope_cupy reads: {TABLES}"),
    }
    for option, (split, default, text) in lists.items():
        parser.add_argument(option, type=split, default=default, metavar="A,B", help=text)
    parser.add_argument("--attention", action="store_true", help="time it with attention as well")
    parser.add_argument("--goals", action="store_true", help="the cases that have a goal")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    parser.add_argument("--quick", action="store_true", help="fewer replays")
    return parser.parse_args()


if __name__ == "__main__":
    main()
