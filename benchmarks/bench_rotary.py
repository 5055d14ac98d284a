"""Time the rotation of q and k by rope_cupy and by its peers, on the shapes of real models.

    python benchmarks/bench_rotary.py --shapes models,small
    python benchmarks/bench_rotary.py --goals

Every result is compared with the float64 reference before it is timed, on fresh random numbers. The
GPU's time is that of a CUDA graph whose calls go through sets of buffers, each with a q, a k and a
table of its own, of three times the L2 in all. The bytes of a call are those of q and k, read and
written once (in place, those that are rotated), and of the table's rows and the positions, read
once.

limit_share is the time of the limit kernel (limit.cu), which only reads and writes back q and k,
times all bytes over those of q and k, divided by the provider's time.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Iterator
from itertools import product

import peers
import runner
from runner import SHAPE, TIMED, Parser, measured_task, rows_of
from shapes import GROUPS, chosen
from tasks import ROTATION, TABLES, TOLD, TOLERANCE, VARIANTS, WITH_ATTENTION, Task

COLUMNS = (*SHAPE, "variant", "table", "measure", "provider", *TIMED)
COLUMNS += ("megabytes", "limit_share", "error")
MOST_TOKENS = 10_000  # of a shape whose attention is timed
SLOW = ("torch eager", "torch.compile", "transformers", "diffusers")  # many passes, or compilation
TABLE_READERS = {*peers.YARDSTICKS, "rope_cupy"}  # all others get a table of their own form


def main() -> None:
    """Run what the command line asks for."""
    options = _parsed()
    tasks = _goals(options.device) if options.goals else _asked(options)
    if options.device == "cuda":
        runner.say("building the kernels of FlashInfer and SGLang")
        peers.build_ahead(tasks, options.providers)
    gc.freeze()  # a capture collects garbage, and need not look at what is imported
    measure = functools.partial(functools.partial, _rows, options)
    runner.run("rotary", options, COLUMNS, ((str(task), measure(task)) for task in tasks))


def _rows(options: argparse.Namespace, task: Task) -> list[runner.Row]:
    return rows_of(task, measured_task(task, _names(options, task), options.quick))


def _asked(options: argparse.Namespace) -> list[Task]:
    """Return the product of the options."""
    tasks = []
    for parts in product(options.shapes, options.dtypes, options.variants, options.tables):
        tasks.append(Task(*parts, options.device))
        if options.attention and tasks[-1].shape.tokens <= MOST_TOKENS:
            tasks.append(tasks[-1]._replace(name=WITH_ATTENTION))
    return tasks


def _goals(device: str) -> list[Task]:
    """Return the tasks for which the project has a goal, those of few providers first."""

    def tasks() -> Iterator[Task]:
        for shape in chosen("qwen-image,wan-2.1-14b-720p,llama-3-8b-prefill"):
            task = Task(shape, device=device)
            yield from (task._replace(table=table) for table in TABLES[1:])
            for variant in VARIANTS[1:]:
                if variant not in TOLD or shape.tokens <= MOST_TOKENS:
                    yield task._replace(variant=variant)
            yield from (task._replace(dtype=dtype) for dtype in ("float16", "float32"))
        for shape in chosen("small"):
            yield Task(shape, variant="positions", device=device)
        for shape in chosen("head-dims,small,other,models,sweep"):
            task = Task(shape, device=device)
            yield task
            is_near_l2 = 20e6 <= task.heads_bytes + task.table_bytes <= 150e6
            if is_near_l2 and shape.tokens <= MOST_TOKENS:
                yield task._replace(name=WITH_ATTENTION)

    return list(dict.fromkeys(tasks()))


def _names(options: argparse.Namespace, task: Task) -> list[str]:
    """Return the providers of a task.

    The slices alone are measured where others lie between them. With --goals, those who take long
    rotate plain models and the sweep, and nobody else reads a form of table that rope_cupy does.
    """
    left_out = set()
    if task.variant != "in place" or task.shape.rotary_dim == task.shape.head_dim:
        left_out.add("limit, same places")
    if options.goals:
        is_plain = task._replace(name=ROTATION) == Task(task.shape, device=task.device)
        if not (is_plain and task.shape in GROUPS["models"] + GROUPS["sweep"]):
            left_out.update(SLOW)
        if task.table != "half":
            left_out.update(peers.PEERS.keys() - TABLE_READERS)
    return [name for name in options.providers if name not in left_out]


def _parsed() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.shapes("models,small")
    parser.names("--providers", peers.names_for("rotation"))
    parser.names("--dtypes", TOLERANCE, ["bfloat16"])
    parser.names("--variants", VARIANTS, ["in place"])
    parser.names("--tables", TABLES, ["half"])  # the forms that rope_cupy reads
    parser.flags(
        attention="time it with attention as well",
        goals="the tasks that have a goal",
        quick="fewer replays",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
