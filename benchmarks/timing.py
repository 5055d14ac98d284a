"""Time of a call: on the GPU by graph replay, on the host by a loop of calls, on the CPU directly.

All results are microseconds of one call. A clock prepares what is to be timed, the calls of one
provider on a set of buffers each, and times all that were prepared.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

Call = Callable[[], Any]

MIN_CALLS = 20
MIN_REPLAY = 1000.0  # microseconds, beside which the launch of a graph does not count
WARM_UP = 20e3  # microseconds of replays before the clock of the GPU is taken as steady
REPLAYS = 20
FEWEST_REPLAYS = 7
LONGEST = 2e6  # microseconds of a measurement of all graphs, beyond which replays are fewer
EVENTS_WARM_UP = 5  # calls before those between events
# The same, of a rotation with attention behind it: what differs is a small part of the time.
MANY_REPLAYS, LONGEST_OF_MANY = 200, 4e6


class Graph(NamedTuple):
    """Calls captured in a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    num_calls: int
    calls: Sequence[Call]  # these keep the memory that a replay reads


def captured(calls: Sequence[Call], pool: Any, min_calls: int = MIN_CALLS) -> Graph:
    """Capture a graph of calls that go through the given ones in turn, each on buffers of its own.

    It holds every call at least once, at least min_calls of them, and takes MIN_REPLAY or more. Its
    new arrays lie in the pool, which graphs that are compared share: the same arrays then lie at
    the same addresses, on which times depend.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:min_calls]:  # compiles, loads modules, fills caches
            call()
    stream.synchronize()
    graph = _capture(calls, max(min_calls, len(calls)), stream, pool)
    duration = min(_replay_times([graph], 2)[0])
    if duration >= MIN_REPLAY:
        return graph
    return _capture(calls, graph.num_calls * (int(MIN_REPLAY / duration) + 1), stream, pool)


def replayed(
    graphs: Sequence[Graph], rounds: int = REPLAYS, longest: float = LONGEST
) -> list[float]:
    """Return the median time of a call of each graph.

    Each is replayed once a round, in a new order every time: the clock of the GPU depends on what
    ran before, and so do the times of what follows. Where a round takes long, they are fewer.
    """
    start = time.perf_counter()
    while (time.perf_counter() - start) * 1e6 < WARM_UP:
        a_round = sum(map(sum, _replay_times(graphs, 1)))
    rounds = min(rounds, max(FEWEST_REPLAYS, int(longest / a_round)))
    times = _replay_times(graphs, rounds)
    return [
        statistics.median(durations) / graph.num_calls
        for durations, graph in zip(times, graphs, strict=True)
    ]


class Threads:
    """Calls that are made at once, each in a row by a thread of its own."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls

    def in_a_row(self, number: int) -> float:
        """Return the seconds of one call where every thread makes `number` of them."""
        barrier = threading.Barrier(len(self.calls) + 1)
        mode = torch.is_inference_mode_enabled()  # of the thread

        def work(call: Call) -> None:
            with torch.inference_mode(mode):
                barrier.wait()
                for _ in range(number):
                    call()

        threads = [threading.Thread(target=work, args=(call,)) for call in self.calls]
        for thread in threads:
            thread.start()
        while barrier.n_waiting < len(threads):
            time.sleep(1e-4)
        start = time.perf_counter()  # before they go: afterwards this thread waits for its turn
        barrier.wait()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - start) / number / len(threads)

    def __call__(self) -> None:
        for call in self.calls:
            call()


def host_times(
    calls: Sequence[Call], number: int, repeats: int, on_gpu: bool = True
) -> list[float]:
    """Return the median, over repeats, of the host's time for one of `number` calls in a row.

    All calls are repeated in a new order every time: a host is slower at one time than at another.
    Nothing waits for the GPU between them, and its queue, of about 1,000 launches, never fills.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for i in random.sample(range(len(calls)), len(calls)):
            call = calls[i]
            if on_gpu:
                torch.cuda.synchronize()
            if isinstance(call, Threads):
                times[i].append(call.in_a_row(number) * 1e6)
                continue
            start = time.perf_counter()
            for _ in range(number):
                call()
            times[i].append((time.perf_counter() - start) * 1e6 / number)
    if on_gpu:
        torch.cuda.synchronize()
    return [*map(statistics.median, times)]


def event_times(calls: Sequence[Call], runs: int) -> list[float]:
    """Return the median time of each call between CUDA events; all are made in turn."""
    for call in [*calls] * EVENTS_WARM_UP:
        call()
    torch.cuda.synchronize()
    order = [i for _ in range(runs) for i in random.sample(range(len(calls)), len(calls))]
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for i in order:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[i]()
        end.record()
        times[i].append((start, end))
    torch.cuda.synchronize()
    return [
        1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) for pairs in times
    ]


def cpu_time(calls: Sequence[Call], repeats: int = 5) -> float:
    """Return the median time of a call on the CPU, over `repeats` of each after a first one."""
    times = []
    for call in calls:
        call()
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _capture(calls: Sequence[Call], num_calls: int, stream: torch.cuda.Stream, pool: Any) -> Graph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        # New arrays live until their set's turn comes again, so that they too lie in buffers apart.
        results = [None] * len(calls)
        for i in range(num_calls):
            results[i % len(calls)] = calls[i % len(calls)]()
    graph.replay()  # the first replay also uploads the graph
    torch.cuda.synchronize()
    return Graph(graph, num_calls, calls)


def _replay_times(graphs: Sequence[Graph], rounds: int) -> list[list[float]]:
    """Return the times of replays of each graph, queued without a wait in between."""
    order = [i for _ in range(rounds) for i in random.sample(range(len(graphs)), len(graphs))]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
    graphs[0].graph.replay()  # the GPU has work until the others are queued
    events[0].record()
    for i, event in zip(order, events[1:], strict=True):
        graphs[i].graph.replay()
        event.record()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in graphs]
    for i, (start, end) in zip(order, pairwise(events), strict=True):
        times[i].append(start.elapsed_time(end) * 1e3)
    return times


class Clock(Protocol):
    """What measures: prepare(calls) for one provider, then times(all that was prepared)."""

    def prepare(self, calls: Sequence[Call]) -> Any: ...

    def times(self, prepared: Sequence[Any]) -> list[float]: ...


class Replays:
    """Time of the GPU, by graph replay."""

    def __init__(
        self, rounds: int = REPLAYS, longest: float = LONGEST, min_calls: int = MIN_CALLS
    ) -> None:
        self.rounds, self.longest, self.min_calls = rounds, longest, min_calls
        self.pool = torch.cuda.graph_pool_handle()

    def prepare(self, calls: Sequence[Call]) -> Graph:
        return captured(calls, self.pool, self.min_calls)

    def times(self, prepared: Sequence[Graph]) -> list[float]:
        return replayed(prepared, self.rounds, self.longest) if prepared else []


class HostLoop(NamedTuple):
    """Time of the host, by calls of the first set in a row, after some more of them."""

    number: int
    repeats: int
    warm_up: int
    on_gpu: bool

    def prepare(self, calls: Sequence[Call]) -> Call:
        for _ in range(self.warm_up):
            calls[0]()
        return calls[0]

    def times(self, prepared: Sequence[Call]) -> list[float]:
        return host_times(prepared, self.number, self.repeats, self.on_gpu)


class Events(NamedTuple):
    """Time between CUDA events around a call: what a user waits for where the host is ahead."""

    runs: int

    def prepare(self, calls: Sequence[Call]) -> Call:
        return calls[0]

    def times(self, prepared: Sequence[Call]) -> list[float]:
        return event_times(prepared, self.runs)


class OnTheCPU(NamedTuple):
    """Time of a call on the CPU."""

    repeats: int

    def prepare(self, calls: Sequence[Call]) -> float:
        return cpu_time(calls, self.repeats)

    def times(self, prepared: Sequence[float]) -> list[float]:
        return list(prepared)
