"""Arrays of several libraries in one call: the current stream of each of them is waited for."""

import contextlib
from collections import namedtuple
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from arrays import OTHER, Producer
from reference import check, rotate
from test_gpu import Stream, Work

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qk,
    calls,
    dlpack,
    jit,
    tensor,
)

TOKENS, HEADS, PAIRS = 64, 4, 16
RNG = np.random.default_rng(61)
ANGLES = RNG.uniform(-3, 3, (TOKENS, PAIRS))


class CUDAError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"the runtime's error {status}")
        self.status = status


class Runtime:
    """What CUDA is asked for, told in order."""

    eventDisableTiming = 2  # noqa: N815
    CUDARuntimeError = CUDAError

    def __init__(self, captured=(), failing=0):
        self.captured, self.failing, self.told = captured, failing, []

    def getDeviceCount(self):  # noqa: N802
        return 4

    def streamIsCapturing(self, stream):  # noqa: N802
        if self.failing and stream == tensor.LEGACY:
            raise CUDAError(self.failing)
        return stream in self.captured

    def eventCreateWithFlags(self, flags):  # noqa: N802
        self.told.append(("create", flags))
        return 77

    def eventRecord(self, event, stream):  # noqa: N802
        self.told.append(("record", event, stream))

    def streamWaitEvent(self, stream, event):  # noqa: N802
        self.told.append(("wait", stream, event))

    def eventDestroy(self, event):  # noqa: N802
        self.told.append(("destroy", event))


@pytest.fixture
def cuda(monkeypatch):
    """A CuPy of which nothing but a runtime and the device are there."""

    def use(**captured):
        class CuPy:
            class cuda:  # noqa: N801
                runtime = Runtime(**captured)

                @staticmethod
                def Device(number):  # noqa: N802
                    CuPy.cuda.runtime.told.append(("device", number))
                    return contextlib.nullcontext()

        monkeypatch.setattr(tensor, "cupy", lambda: CuPy)
        return CuPy.cuda.runtime

    return use


WAITED = [
    ("device", 1),
    ("create", Runtime.eventDisableTiming),
    ("record", 77, 50),
    ("wait", 40, 77),
    ("destroy", 77),
]


@pytest.mark.parametrize("captured", [(), (40, 50)], ids=["no capture", "one capture"])
def test_a_stream_waits_for_an_event_on_the_earlier_one_and_the_host_for_nothing(cuda, captured):
    runtime = cuda(captured=captured)
    tensor.let_wait(1, 40, 50)
    assert runtime.told == WAITED


@pytest.mark.parametrize("captured", [40, 50])
def test_no_capture_waits_for_what_is_not_in_it(cuda, captured):
    runtime = cuda(captured=(captured,))
    tensor.let_wait(1, 40, 50)
    assert runtime.told == WAITED[:1]


@pytest.mark.parametrize("streams", [(40, 1), (1, 40)])
def test_the_default_stream_is_left_alone_while_a_capture_forbids_its_use(cuda, streams):
    runtime = cuda(captured=(40,), failing=tensor.CAPTURE_IMPLICIT)
    tensor.let_wait(1, *streams)
    assert runtime.told == WAITED[:1]
    cuda(failing=700)
    with pytest.raises(CUDAError, match="700"):
        tensor.let_wait(0, *streams)


# Whole calls on the CPU, whose arrays say that they are on a GPU: those of NumPy stand for CuPy's.

X = RNG.standard_normal((1, TOKENS, HEADS, 2 * PAIRS), dtype=np.float32)
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)
CACHE = np.zeros((4, TOKENS, HEADS, 2 * PAIRS), np.float32)
WEIGHT = np.ones(2 * PAIRS, np.float32)


class Launcher:
    """Tells of a launch, of which nothing is written."""

    told: ClassVar[list] = []

    def __init__(self, plan, device, stream_of):
        self.plan, self.device, self.stream_of = plan, device, stream_of

    def with_arguments(self, block):
        return lambda: self.told.append(("launch", self.stream_of(self.device)))


@pytest.fixture
def told(monkeypatch):
    """What comes onto which streams, in order; PyTorch's current one is 40 and CuPy's is 50."""
    for module, name in ((calls, "_calls"), (tensor, "_looks"), (tensor, "_glances")):
        monkeypatch.setattr(module, name, {})
    told, current = [], {"torch": 40, "numpy": 50}

    def describe(name, array, *stream, describe=tensor.describe):
        described = describe(name, array, *stream)
        return described._replace(spec=described.spec._replace(device="cuda:3"))

    def stream_of(library):
        def find(device):
            assert device == 3
            return current[library]

        return lambda _: find

    monkeypatch.setattr(tensor, "describe", describe)
    for array, library in ((torch.ones(1), "torch"), (np.ones(1), "numpy")):
        monkeypatch.setattr(type(tensor.library_of("x", array)), "streams", stream_of(library))
    monkeypatch.setattr(type(tensor._CUPY), "streams", stream_of("numpy"))
    monkeypatch.setattr(tensor, "let_wait", lambda *streams: told.append(streams))
    monkeypatch.setattr(Launcher, "told", told)
    monkeypatch.setattr(jit, "Launcher", Launcher)
    told_and_current = namedtuple("Told", "events current")
    return told_and_current(told, current)


def on(library, array):
    return torch.from_numpy(array.copy()) if library == "torch" else array.copy()


CALLS = {
    "nothing": lambda own, other: lambda: apply_rotary(own(X), (own(COS), own(SIN))),
    "cos": lambda own, other: lambda: apply_rotary(own(X), (other(COS), own(SIN))),
    "sin": lambda own, other: lambda: apply_rotary(own(X), (own(COS), other(SIN))),
    "k": lambda own, other: lambda: apply_rotary_qk(own(X), other(X), (own(COS), own(SIN))),
    "k_out": lambda own, other: (
        lambda: apply_rotary_qk(own(X), own(X), (own(COS), own(SIN)), out=(own(X), other(X)))
    ),
    "positions": lambda own, other: (
        lambda: apply_rotary(own(X), (own(COS), own(SIN)), positions=other(np.arange(TOKENS)))
    ),
    "cu_seqlens": lambda own, other: (
        lambda: apply_rotary(own(X[0]), (own(COS), own(SIN)), cu_seqlens=other(np.array([0, 9])))
    ),
    "weight": lambda own, other: (
        lambda: apply_norm_rotary(own(X), other(WEIGHT), (own(COS), own(SIN)))
    ),
    "slot_mapping": lambda own, other: lambda: write_cache(own, slots=other),
    "v_cache": lambda own, other: lambda: write_cache(own, cache=other),
    "x, of which out is not": lambda own, other: (
        lambda: apply_rotary(other(X), (own(COS), own(SIN)), out=own(X))
    ),
}


def write_cache(own, slots=None, cache=None):
    q, k, v, k_cache = own(X), own(X), own(X), own(CACHE)
    slot_mapping = (slots or own)(np.arange(TOKENS)[None])
    v_cache, table = (cache or own)(CACHE), (own(COS), own(SIN))
    apply_rotary_kv_cache(q, k, v, k_cache, v_cache, table, slot_mapping=slot_mapping)


@pytest.mark.parametrize(("own", "other"), [("torch", "numpy"), ("numpy", "torch")])
@pytest.mark.parametrize("argument", CALLS)
def test_the_streams_of_two_libraries_wait_for_each_other_at_every_call(argument, own, other, told):
    call = CALLS[argument](partial(on, own), partial(on, other))
    here, there = told.current[own], told.current[other]
    meeting = [(3, here, there), ("launch", here), (3, there, here)]
    for _ in range(3):
        call()
        assert told.events == ([("launch", here)] if argument == "nothing" else meeting)
        told.events.clear()


@pytest.mark.parametrize("handles", [(40, 40), (0, 0), (0, 1), (1, 0), (2, 2)], ids=str)
def test_nothing_waits_where_the_streams_of_two_libraries_are_one(handles, told):
    told.current["torch"], told.current["numpy"] = handles
    for _ in range(3):
        apply_rotary(torch.from_numpy(X), (COS, SIN))
    assert told.events == [("launch", handles[0])] * 3


def test_the_default_stream_of_a_thread_is_another_than_that_of_all(told):
    told.current["torch"], told.current["numpy"] = 2, 0
    apply_rotary(torch.from_numpy(X), (COS, SIN))
    assert told.events == [(3, 2, 1), ("launch", 2), (3, 1, 2)]


def test_a_table_that_is_looked_at_once_is_waited_for_on_the_stream_of_every_call(
    told, monkeypatch
):
    """In the shortest way of a call, by addresses that have been seen."""
    monkeypatch.setattr(type(tensor.library_of("x", X)), "private_view", lambda _, array: array[:])
    x, table = torch.from_numpy(X.copy()), RotaryTable(COS, SIN)
    assert table._source.fixed
    for numpy_stream in (50, 60, 40, 50):
        told.current["numpy"] = numpy_stream
        apply_rotary(x, table, out=x)
        meeting = [(3, 40, numpy_stream), ("launch", 40), (3, numpy_stream, 40)]
        assert told.events == (meeting if numpy_stream != 40 else [("launch", 40)])
        told.events.clear()


class OnGPU(Producer):
    """A producer that says that its array is on a GPU, and notes for which stream it is wanted."""

    asked: ClassVar[list] = []

    def __dlpack__(self, **options):
        self.asked.append(options.pop("stream"))
        capsule = super().__dlpack__(**options)
        contents, _ = dlpack._tensor_of("x", capsule)
        contents.device_type, contents.device_id = 2, 3
        return capsule

    def __dlpack_device__(self):
        return 2, 3


@pytest.mark.parametrize("write", ["new", "out"])
def test_other_producers_are_asked_for_the_stream_of_the_launch_which_waits_for_no_other(
    write, told, cuda, monkeypatch
):
    cuda()
    x = torch.from_numpy(X)
    for _ in range(2):
        table, positions = (OnGPU(COS), OnGPU(SIN)), OnGPU(np.arange(TOKENS))
        monkeypatch.setattr(OnGPU, "asked", [])
        apply_rotary(x, table, positions=positions, out=None if write == "new" else x.clone())
        assert OnGPU.asked == [40] * 3
        assert told.events == [("launch", 40)]
        told.events.clear()


@pytest.mark.parametrize("number", [-1, 4, 2**31 - 1])
def test_a_producer_on_a_gpu_that_is_not_here_is_refused(number, cuda, monkeypatch):
    cuda()
    monkeypatch.setattr(OnGPU, "__dlpack_device__", lambda _: (2, number))
    with pytest.raises(ValueError, match=rf"^x must be on a GPU that is here, got cuda:{number}"):
        apply_rotary(OnGPU(X), (COS, SIN), out=X.copy())


# On a GPU.


class External:
    """A stream as CuPy takes it from others."""

    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def delayed(work):
    """Do some work on a stream of PyTorch's own, behind what takes a while."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        work()
    return stream


class Both:
    """Streams of both libraries that wait for no other, and what a call reads, in both."""

    def __init__(self):
        self.cupy = pytest.importorskip("cupy")
        self.x = torch.randn(TOKENS, HEADS, 2 * PAIRS).cuda()
        self.made = [self.cupy.asarray(part) for part in (COS, SIN)]
        self.table = RotaryTable(*map(self.cupy.zeros_like, self.made))
        self.parts = self.table._source.arrays
        self.torch_stream = torch.cuda.Stream()
        self.cupy_stream = self.cupy.cuda.Stream(non_blocking=True)
        for y in (self.x, self.cupy.asarray(self.x)):  # their kernels are loaded
            apply_rotary(y, self.table)
        self.fill((0, 0))
        self.finish()

    def finish(self):
        self.cupy.cuda.runtime.deviceSynchronize()

    def fill(self, numbers):
        for part, source in zip(self.parts, numbers, strict=True):
            part[...] = source

    def check(self, y):
        self.finish()
        y = y.get() if isinstance(y, self.cupy.ndarray) else y.cpu().numpy()
        exact = rotate(np.float64(self.x.cpu())[None], np.float64(COS), np.float64(SIN))[0]
        check(np.float64(y), exact, "float32")


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_an_input_of_another_library_is_read_before_that_library_changes_it():
    both = Both()
    for out in (None, torch.empty_like(both.x), torch.empty_like(both.x)):
        both.fill(both.made)
        both.finish()
        with torch.cuda.stream(both.torch_stream), both.cupy_stream:
            torch.cuda._sleep(200_000_000)
            y = apply_rotary(both.x, both.table, out=out)
            both.fill((0, 0))
            assert not both.torch_stream.query(), "the work is done, so this shows nothing"
        both.check(y)


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_new_k_of_another_library_is_ready_on_that_librarys_stream():
    both = Both()
    both.fill(both.made)
    k = both.cupy.asarray(both.x)
    for _ in range(2):
        both.finish()
        with torch.cuda.stream(both.torch_stream), both.cupy_stream:
            torch.cuda._sleep(200_000_000)
            _, k_out = apply_rotary_qk(both.x, k, both.table)
            copy = k_out.copy()
            both.cupy_stream.synchronize()
            both.check(copy)


@pytest.mark.gpu
@pytest.mark.undisturbed
@pytest.mark.parametrize("library", ["cupy", "torch-cuda"])
def test_a_capture_takes_arrays_of_another_library_as_they_lie(library):
    work, stream = Work(library, OTHER[library]), Stream(library)
    replay, _ = stream.capture(lambda: work.call(work.out))
    for numbers in (work.new, -work.new):
        work.x[...] = numbers
        torch.cuda.synchronize()
        with stream.current():
            replay()
        stream.stream.synchronize()
        work.assert_rotated(work.out, numbers)


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_two_streams_of_one_capture_wait_for_each_other_in_its_graph():
    both = Both()
    graph, fork = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    out = torch.empty_like(both.x)
    apply_rotary(both.x, both.table, out=out)
    both.fill(both.made)  # so that nothing is compiled in the capture
    both.finish()
    with torch.cuda.graph(graph, stream=both.torch_stream):
        fork.wait_stream(both.torch_stream)
        with torch.cuda.stream(fork):
            torch.cuda._sleep(200_000_000)
        with both.cupy.cuda.Stream.from_external(External(fork.cuda_stream)):
            both.fill(both.made)
            apply_rotary(both.x, both.table, out=out)
        both.torch_stream.wait_stream(fork)
    both.fill((0, 0))
    both.finish()
    graph.replay()
    both.check(out)


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_torch_table_made_on_a_side_stream_is_waited_for_by_cupy_arrays():
    """In the first call and in the one that repeats it."""
    cupy = pytest.importorskip("cupy")
    x = RNG.standard_normal((TOKENS, HEADS, 2 * PAIRS), dtype=np.float32)
    made = [torch.from_numpy(part).float().cuda() for part in (np.cos(ANGLES), np.sin(ANGLES))]
    exact = rotate(np.float64(x)[None], *(np.float64(part.cpu()) for part in made))[0]
    table, out = RotaryTable(*map(torch.zeros_like, made)), cupy.empty(x.shape, "float32")
    y = cupy.asarray(x)

    def make():
        for part, source in zip(table._source.arrays, made, strict=True):
            part.copy_(source)

    for _ in range(3):
        for part in table._source.arrays:
            part.zero_()
        cupy.cuda.Device().synchronize()
        torch.cuda.synchronize()
        with torch.cuda.stream(delayed(make)):
            apply_rotary(y, table, out=out)
        cupy.cuda.get_current_stream().synchronize()
        check(np.float64(out.get()), exact, "float32")


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_cupy_table_made_on_a_side_stream_is_waited_for_by_tensors():
    cupy = pytest.importorskip("cupy")
    x = torch.randn(TOKENS, HEADS, 2 * PAIRS).cuda()
    made = [cupy.asarray(part, "float32") for part in (np.cos(ANGLES), np.sin(ANGLES))]
    table = RotaryTable(*(cupy.zeros_like(part) for part in made))
    exact = rotate(np.float64(x.cpu())[None], *(np.float64(part.get()) for part in made))[0]
    out = torch.empty_like(x)
    for _ in range(3):
        for part in table._source.arrays:
            part.fill(0)
        cupy.cuda.Device().synchronize()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
        with cupy.cuda.Stream.from_external(External(side.cuda_stream)):
            for part, source in zip(table._source.arrays, made, strict=True):
                cupy.copyto(part, source)
            apply_rotary(x, table, out=out)
        torch.cuda.current_stream().synchronize()
        check(np.float64(out.cpu()), exact, "float32")


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_an_output_of_another_library_is_ready_on_that_librarys_stream():
    cupy = pytest.importorskip("cupy")
    q = torch.randn(TOKENS, HEADS, 2 * PAIRS).cuda()
    table = tuple(
        torch.from_numpy(part).float().cuda() for part in (np.cos(ANGLES), np.sin(ANGLES))
    )
    exact = rotate(np.float64(q.cpu())[None], *(np.float64(part.cpu()) for part in table))[0]
    for _ in range(2):
        q_out, k_out = torch.zeros_like(q), cupy.zeros(q.shape, "float32")
        cupy.cuda.Device().synchronize()
        torch.cuda.synchronize()
        side, own = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
        with torch.cuda.stream(side), own:
            torch.cuda._sleep(200_000_000)
            apply_rotary_qk(q, q, table, out=(q_out, k_out))
            copy = k_out.copy()
            own.synchronize()
        check(np.float64(copy.get()), exact, "float32")
        torch.cuda.synchronize()
