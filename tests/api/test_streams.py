"""Arrays of several libraries in one call: the current stream of each of them is waited for."""

import contextlib

import numpy as np
import pytest
from reference import check, rotate

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, prepared
from rope_cupy.arrays import base

TOKENS, HEADS, PAIRS = 64, 4, 16
RNG = np.random.default_rng(61)
ANGLES = RNG.uniform(-3, 3, (TOKENS, PAIRS))


class Runtime:
    """What `let_wait` asks of CUDA, told in order."""

    eventDisableTiming = 2  # noqa: N815

    def __init__(self, captured=()):
        self.captured, self.told = captured, []

    def streamIsCapturing(self, stream):  # noqa: N802
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

        monkeypatch.setattr(base, "cupy", lambda: CuPy)
        return CuPy.cuda.runtime

    return use


def test_a_stream_waits_for_an_event_on_the_earlier_one_and_the_host_for_nothing(cuda):
    runtime = cuda()
    base.let_wait(1, 40, 50)
    assert runtime.told == [
        ("device", 1),
        ("create", Runtime.eventDisableTiming),
        ("record", 77, 50),
        ("wait", 40, 77),
        ("destroy", 77),
    ]


@pytest.mark.parametrize("streams", [(40, 40), (0, 0), (0, 1), (1, 0)])
def test_nothing_is_asked_of_cuda_where_the_streams_are_one(cuda, streams):
    runtime = cuda()
    base.let_wait(0, *streams)
    assert runtime.told == []


@pytest.mark.parametrize("captured", [40, 50])
def test_no_capture_waits_for_what_is_not_in_it(cuda, captured):
    runtime = cuda(captured=(captured,))
    base.let_wait(0, 40, 50)
    assert runtime.told == []


class Launcher:
    device = 3

    def __init__(self, told):
        self.launch = told.append

    def stream_of(self, device):
        return 10 * device


class Library:
    def __init__(self, stream):
        self._stream = stream

    def stream(self, device):
        return self._stream


def test_a_launch_waits_for_all_that_it_reads_and_is_waited_for_by_outputs(monkeypatch):
    told = []
    monkeypatch.setattr(prepared, "let_wait", lambda *streams: told.append(streams))
    one, other = Library(5), Library(6)
    prepared._in_order(Launcher(told), (one, other), (other,))("values")
    assert told == [(3, 30, 5), (3, 30, 6), "values", (3, 6, 30)]


class External:
    """A stream as CuPy takes it from others."""

    def __init__(self, handle):
        self.handle = handle

    def __cuda_stream__(self):
        return 0, self.handle


def delayed(torch, work):
    """Do some work on a stream of PyTorch's own, behind what takes a while."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        work()
    return stream


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_torch_table_made_on_a_side_stream_is_waited_for_by_cupy_arrays():
    """In the first call and in the one that repeats it."""
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
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
        with torch.cuda.stream(delayed(torch, make)):
            apply_rotary(y, table, out=out)
        cupy.cuda.get_current_stream().synchronize()
        check(np.float64(out.get()), exact, "float32")


@pytest.mark.gpu
@pytest.mark.undisturbed
def test_a_cupy_table_made_on_a_side_stream_is_waited_for_by_tensors():
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
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
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
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
