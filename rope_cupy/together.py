"""Calls on arrays in memory that are written together, by one launch where one kernel serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import cpu
from .bounded import put
from .eager import Ready
from .prepared import Pair, Prepared, check_apart, constants_of, pair_of, taker

MAX_TOGETHER = 256  # groups of prepared calls

_together: dict[tuple[Prepared, ...], Together] = {}


def check(calls: Sequence[Ready]) -> None:
    """Refuse outputs of a call that share memory with arrays of another one."""
    _of(calls).check(calls)


def write(calls: Sequence[Ready], labels: Sequence[str] = (), are_apart: bool = False) -> None:
    """Write the outputs of calls. Where this raises, nothing has been written.

    `labels` are what messages call the calls, where names alone do not tell them. `are_apart`:
    outputs are known to share no memory with arrays of another call.
    """
    together = _of(calls, labels)
    if not are_apart:
        together.check(calls)
    together.write(calls)


def by_one_launch(calls: Sequence[Ready]) -> Together | None:
    """Return what is common to calls like these, None where not all are written by one launch."""
    together = _of(calls)
    is_one = together.launch is not None and len(together.asked) == len(calls)
    return together if is_one else None


def _of(calls: Sequence[Ready], labels: Sequence[str] = ()) -> Together:
    key = tuple([each.prepared for each in calls])
    known = _together.get(key)
    return known or put(_together, key, Together(calls, labels), MAX_TOGETHER)


class Together:
    """What is common to all calls for which the same is prepared."""

    def __init__(self, calls: Sequence[Ready], labels: Sequence[str]) -> None:
        parts = [each.prepared for each in calls]
        self.pairs = (
            _pairs(parts, labels) if any([each.call.out is not None for each in calls]) else ()
        )
        self.asked = [i for i, part in enumerate(parts) if part.problem.num_rows]
        self.parts = [parts[i] for i in self.asked]
        self.launch = _joint_launch(self.parts)

    def check(self, calls: Sequence[Ready]) -> None:
        """Refuse outputs of a call that share memory with arrays of another one."""
        if self.pairs:
            at: tuple[Any, ...] = ()
            for each in calls:
                at += (*each.at, 0, 0)
            check_apart(self.pairs, at)

    def write(self, calls: Sequence[Ready]) -> None:
        """Write the outputs."""
        asked = [calls[i] for i in self.asked]
        if self.launch is None:
            for each in asked:
                each.write()
            return
        values = []
        for each in asked:
            first, at, offset = 0, each.at, each.call.position_offset
            if offset is not None:
                first, at = each.prepared.from_position(at, offset)
            values.append((at, first))
        self.run(values)

    def run(self, values: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Write, by one launch, the outputs of calls at these addresses and first positions."""
        self.launch(values)


def _joint_launch(parts: Sequence[Prepared]) -> Any:
    """Return what runs calls as one, given their addresses and first positions, if that can be.

    One alone is run as it is.
    """
    libraries = {part.library for part in parts}
    if len(libraries) != 1 or (len(parts) > 1 and any([part.waits for part in parts])):
        return None
    problems = tuple([part.problem for part in parts])
    launchers = [part.launcher for part in parts if part.launcher]
    if not launchers:

        def solve(values: Sequence[tuple[tuple[int, ...], int]]) -> None:
            pointers = [
                part.pointers(at, first) for part, (at, first) in zip(parts, values, strict=True)
            ]
            cpu.rotate_all(problems, pointers)

        return solve
    from .jit import MAX_BLOCK_BYTES, Launcher
    from .plan import joint_plan

    launch, constants = parts[0].launch, parts[0].constants
    if len(parts) > 1:
        plan = joint_plan(problems)
        if plan is None or plan.packer.size > MAX_BLOCK_BYTES:
            return None
        first = launchers[0]
        launch = Launcher(plan, first.device, first.stream_of, taker(parts, plan)).launch
        constants = constants_of(plan)

    def launch_all(values: Sequence[tuple[tuple[int, ...], int]]) -> None:
        given: tuple[Any, ...] = ()
        for at, first in values:
            given += (*at, 0, first)
        launch(given + constants)

    return launch_all


def _pairs(parts: Sequence[Prepared], labels: Sequence[str]) -> tuple[Pair, ...]:
    """Return outputs and the arrays of other calls, which may not overlap."""
    located, begin = [], 0
    for i, part in enumerate(parts):
        label = f"{labels[i]}." if labels else ""
        located.append(
            [
                [
                    each._replace(place=each.place + begin, name=f"{label}{each.name}")
                    for each in group
                ]
                for group in part.located
            ]
        )
        begin += part.num_addresses + 2
    pairs = []
    for i, (_, outs, _) in enumerate(located):
        for j, (xs, other_outs, others) in enumerate(located):
            if i == j:
                continue
            against = (*xs, *others, *(other_outs if j < i else ()))
            pairs += [pair_of(out, other) for out in outs for other in against]
    return (*pairs,)
