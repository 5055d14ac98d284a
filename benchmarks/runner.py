"""What every benchmark does: read options, measure providers, write a CSV and print tables."""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import gc
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

import numpy as np
import peers
import torch
from result import Result, result_of
from shapes import GROUPS, SHAPES, Shape, chosen, is_causal
from tasks import WITH_ATTENTION, Call, Exact, Inputs, Task, inputs_of
from timing import (
    FEWEST_REPLAYS,
    LONGEST,
    LONGEST_OF_MANY,
    MANY_REPLAYS,
    REPLAYS,
    Clock,
    OnTheCPU,
    Replays,
)

RESULTS = Path(__file__).resolve().parent / "results"
MACHINE = ("date", "gpu", "driver", "python", "numpy", "cupy", "torch", "rope_cupy")
SHAPE = ("shape", "batch", "tokens", "q_heads", "k_heads", "head_dim", "rotary_dim")
SHAPE += ("rotary_offset", "pairing", "dtype")
TIMED = ("version", "status", "reason", "microseconds")
# Columns that name a row of a printed table, and those that are figures of it.
NAMES = ("provider", "call", "step")
FIGURES = ("microseconds", "milliseconds", "gpu_milliseconds", "host_milliseconds", "speedup")
FIGURES += ("limit_share", "multiple", "above_one_addition", "above_plain", "error", "block_error")
FIGURES += ("attention_error", "least", "most")

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]


class Entry(NamedTuple):
    """What is measured for one row of a table.

    ways: makes the calls, one for each set of inputs, in each way that they may be made.
    check: takes the first call, and returns its relative error or raises WrongError.
    """

    ways: Callable[[], Sequence[Sequence[Call]]]
    check: Callable[[Any], float] | None = None


def measured(entries: dict[Key, Entry], clock: Clock, **beside: Clock) -> dict[Key, Result]:
    """Check every result, then time those that are right, all in turn; the fastest way counts."""
    on_gpu = torch.cuda.is_available()
    results: dict[Key, Result] = {}
    prepared: dict[str, list[tuple[Key, Any]]] = {"": [], **{name: [] for name in beside}}
    for key, entry in entries.items():
        try:
            ways = entry.ways()
            error = entry.check(ways[0][0]) if entry.check else None
            prepared[""] += [(key, clock.prepare(calls)) for calls in ways]
            results[key] = Result("ok", error=error, beside={})
        except Exception as failure:
            results[key] = result_of(failure)
            ways = []
        for name, other in beside.items():
            try:
                prepared[name] += [(key, other.prepare(calls)) for calls in ways]
            except Exception as failure:
                reason = f"{name}: {result_of(failure).reason}"
                results[key] = results[key]._replace(reason=reason)
        if on_gpu:
            _stop_if_broken(key, results[key])
    for name, all_pairs in prepared.items():
        pairs = [(key, each) for key, each in all_pairs if results[key].status == "ok"]
        times = beside.get(name, clock).times([each for _, each in pairs])
        for (key, _), time in zip(pairs, times, strict=True):
            result = results[key]
            if name:
                result.beside[name] = min(time, result.beside.get(name, time))
            else:
                best = min(time, result.microseconds or time)
                results[key] = result._replace(microseconds=best)
    if on_gpu:
        del prepared, all_pairs, pairs
        gc.collect()
        torch.cuda.empty_cache()
    return results


def _stop_if_broken(key: Any, result: Result) -> None:
    """End the run where an error has left CUDA unusable."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        sys.exit(f"CUDA is unusable after {key} ({result.reason}): {first_line}")


def measured_task(task: Task, names: list[str], quick: bool = False) -> dict[str, Result]:
    """Measure the calls of providers for a task."""
    sets, on_gpu = inputs_of(task), task.device == "cuda"
    exact = Exact(task, sets[0])
    attends = task.name == WITH_ATTENTION

    def entry(name: str) -> Entry:
        peer = peers.PEERS[name]

        def ways() -> list[list[Call]]:
            options = peer.options if on_gpu else ({},)
            made = [[peers.call_of(name, task, each, **some) for each in sets] for some in options]
            if attends:
                return [_attending(task, calls, sets, peer.is_yardstick) for calls in made]
            return made

        def check(call: Any) -> float:
            return exact.error_of(call.args[0] if attends else call)

        return Entry(ways, None if peer.is_yardstick else check)

    clock: Clock = OnTheCPU(1 if quick else 5)
    if on_gpu:
        rounds, longest = (MANY_REPLAYS, LONGEST_OF_MANY) if attends else (REPLAYS, LONGEST)
        clock = Replays(FEWEST_REPLAYS if quick else rounds, longest)
    with torch.inference_mode():
        return measured({name: entry(name) for name in names}, clock)


def _attending(task: Task, calls: list[Call], sets: list[Inputs], unrotated: bool) -> list[Call]:
    """Return calls that attend with what others have rotated, or with q and k as they are."""
    options = {"is_causal": is_causal(task.shape)}
    options["enable_gqa"] = task.shape.q_heads != task.shape.k_heads

    def attend(rotate: Call, inputs: Inputs) -> torch.Tensor:
        results = rotate()
        q, k = inputs[:2] if unrotated else results
        q, k, v = (x.transpose(1, 2) for x in (q, k, inputs.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    return [functools.partial(attend, *each) for each in zip(calls, sets, strict=True)]


def limit_share(task: Task, results: dict[str, Result], name: str) -> float | None:
    """Return the limit's time for all bytes over the provider's time, where both are known."""
    limit, result = results.get("limit"), results.get(name)
    timed = limit and limit.microseconds and result and result.microseconds
    if task.name == WITH_ATTENTION or not timed:
        return None
    all_bytes = task.heads_bytes + task.table_bytes
    return limit.microseconds * all_bytes / task.heads_bytes / result.microseconds


def row_of(provider: str, result: Result) -> Row:
    """Return the columns that every result has."""
    return {
        "provider": provider,
        "version": peers.version(provider),
        "status": result.status,
        "reason": result.reason,
        "microseconds": digits(result.microseconds),
        "error": digits(result.error, 2),
    }


def rows_of(task: Task, results: dict[str, Result]) -> list[Row]:
    """Return the rows of a task for the CSV."""
    about = task.shape._asdict() | task._asdict() | {"shape": task.shape.name}
    about |= {"op": task.name, "measure": task.name}
    about["pairing"] = "interleaved" if task.shape.interleaved else "half"
    all_bytes = task.heads_bytes + task.table_bytes
    about["megabytes"] = digits(all_bytes / 1e6)
    rows = []
    for name, result in results.items():
        time = result.microseconds
        figures = {
            "gigabytes_a_second": digits(all_bytes / time / 1e3 if time else None),
            "limit_share": digits(limit_share(task, results, name)),
        }
        rows.append(about | row_of(name, result) | figures)
    return rows


def digits(value: float | None, count: int = 5) -> str:
    """Return a number for the CSV, or nothing."""
    return "" if value is None else f"{value:.{count}g}"


def run(
    kind: str,
    options: argparse.Namespace,
    columns: Sequence[str],
    groups: Iterable[tuple[str, Callable[[], list[Row]]]],
) -> None:
    """Measure groups of rows, each with a title, write the CSV and print their tables.

    Without a path the CSV is one of results/, such as 2026-11-25-h100-rotary.csv. The process ends
    where a GPU is asked for and none is there.
    """
    on_gpu, date = options.device == "cuda", datetime.date.today().isoformat()
    if on_gpu and not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU; --device cpu measures on the CPU")
    gpu = torch.cuda.get_device_name() if on_gpu else "cpu"
    model = re.search(r"\b[A-Z]+\d\w*", gpu)
    short = model.group().lower() if model else gpu.lower().replace(" ", "-")
    path = options.csv or RESULTS / f"{date}-{short}-{kind}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    driver = _driver() if on_gpu else ""
    versions = platform.python_version(), np.__version__, peers.installed(*peers.limit.CUPY)
    versions += torch.__version__, peers.version("rope_cupy")
    machine = dict(zip(MACHINE, (date, gpu, driver, *versions), strict=True))
    groups = list(groups)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*MACHINE, *columns), extrasaction="ignore")
        writer.writeheader()
        try:
            for number, (title, measure) in enumerate(groups, 1):
                say(f"[{number}/{len(groups)}] {title}")
                rows = measure()
                writer.writerows(machine | row for row in rows)
                file.flush()
                print_table(title, rows)
        except KeyboardInterrupt:
            say("interrupted")
    print(f"\nwritten to {path}")


def print_table(title: str, rows: list[Row]) -> None:
    """Print a line for each row, the shortest time first, and why there is none."""
    if any(row.get("microseconds") for row in rows):
        rows = sorted(rows, key=lambda row: float(row["microseconds"] or "inf"))
    figures = [name for name in FIGURES if any(row.get(name) for row in rows)]
    lines = [[title, *figures]]
    for row in rows:
        name = ", ".join(str(row[part]) for part in NAMES if row.get(part))
        lines.append([name, *(str(row.get(figure, "")) for figure in figures)])
    print_aligned(lines, ["", *(_reason(row) for row in rows)])


def _reason(row: Row) -> str:
    return f"  {row['status']}: {row['reason']}" if row.get("reason") else ""


def print_aligned(lines: list[list[str]], behind: Sequence[str]) -> None:
    """Print lines of cells, each with what stands behind it."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print()
    for (first, *others), text in zip(lines, behind, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip() + text)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return ""


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


def several(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads an option of known names with commas, or "all"."""
    known = list(known)

    def names(text: str) -> list[str]:
        given = known if text == "all" else text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of: {', '.join(known)}")
        return given

    return names


def shapes(text: str) -> list[Shape]:
    """Read an option of shapes and groups of shapes."""
    try:
        return chosen(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Parser(argparse.ArgumentParser):
    """The options that every benchmark has; a script adds lists of names, and flags."""

    def __init__(self, doc: str | None, device: str = "cuda") -> None:
        about = f"Groups of shapes: {', '.join(GROUPS)}. Shapes: {', '.join(SHAPES)}."
        super().__init__(description=(doc or "").partition("\n")[0], epilog=about)
        self.add_argument("--device", choices=["cuda", "cpu"], default=device)
        self.add_argument("--csv", type=Path, metavar="PATH", help="instead of benchmarks/results/")

    def names(
        self, option: str, known: Iterable[str], default: Iterable[str] | None = None
    ) -> None:
        """Add an option of known names, all of them without a default."""
        known = list(known)
        default = known if default is None else list(default)
        help = ", ".join(known)
        self.add_argument(option, type=several(known), default=default, metavar="A,B", help=help)

    def shapes(self, default: str | None, help: str = "shapes and groups of shapes") -> None:
        """Add the option of shapes."""
        of = None if default is None else chosen(default)
        self.add_argument("--shapes", type=shapes, default=of, metavar="A,B", help=help)

    def flags(self, **flags: str) -> None:
        """Add options that are given or not, each with its help."""
        for name, help in flags.items():
            self.add_argument(f"--{name}", action="store_true", help=help)
