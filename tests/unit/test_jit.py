"""From sources to a launch: kernels compiled once, by many threads, with and without the disk."""

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from rope_cupy import environment, jit

THREADS = 16
BLOCK = b"the arguments of a launch"
SOON = 20  # seconds, for what takes none unless it is blocked
FULL = OSError(28, "No space left on device")


class StandIn:
    """As much of CuPy as a launch takes; `compile` and `run` are what a kernel of a name does."""

    __version__ = "14.2.0"

    def __init__(self):
        self.compiled, self.in_memory, self.launched = [], [], []
        self.compile = self.run = lambda name: None
        self.device, self.functions, self.contexts = 0, [], threading.local()
        self.capability, self.cuda_of_driver, self.status = "90", 12030, 0
        self.captured, self.nvrtc_file = False, None
        self.cuda = SimpleNamespace(
            Device=self.entered,
            driver=SimpleNamespace(check_status=self.check_status),
            function=SimpleNamespace(Module=Module),
            compiler=SimpleNamespace(compile_using_nvrtc=self.compile_in_memory),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
            runtime=SimpleNamespace(
                getDevice=lambda: self.device,
                setDevice=self.set_device,
                getDeviceCount=lambda: 1,
                runtimeGetVersion=lambda: 12090,
                streamIsCapturing=lambda stream: self.captured and stream == 7,
            ),
        )

    def set_device(self, device):
        assert device == self.device
        self.contexts.here = True

    def entered(self, device):
        return Entered(self, device)

    def RawModule(self, code, options, name_expressions):  # noqa: N802
        assert "rotary_kernel" in code and options == jit.compile_options()
        return SimpleNamespace(get_function=self.get_function)

    def get_function(self, name):
        self.compiled.append(name)
        self.compile(name)
        self.functions.append(name)
        return SimpleNamespace(kernel=SimpleNamespace(ptr=len(self.functions) - 1))

    def launch_kernel_ex(self, config, function, parameters, extra):
        assert self.contexts.here, "a thread has a context once a device has been set in it"
        config = jit._Config.from_address(config)
        name = self.functions[function]
        self.run(name)
        block = ctypes.string_at(ctypes.c_void_p.from_address(parameters).value, len(BLOCK))
        assert (config.shared_bytes, extra, block) == (0, None, BLOCK)
        self.launched.append((name, self.device, [*config.sizes], config.stream))
        self.attributes = [
            (attribute.id, attribute.value[0])
            for attribute in config.attributes[: config.num_attributes]
        ]
        return self.status

    def check_status(self, status):
        raise RuntimeError(f"the driver's error {status}")

    def compile_in_memory(self, code, options, *, name_expressions, cache_in_memory):
        assert "rotary_kernel" in code and options == (*jit.compile_options(), "-ftz=true")
        assert cache_in_memory
        self.in_memory += name_expressions
        return b"cubin", {name: f"_Z{name}" for name in name_expressions}


class Entered:
    """A device of CuPy."""

    def __init__(self, cupy, device):
        self.cupy, self.device = cupy, device
        self.compute_capability = cupy.capability

    def __enter__(self):
        self.before, self.cupy.device = self.cupy.device, self.device

    def __exit__(self, *error):
        self.cupy.device = self.before


class Module:
    def load(self, cubin):
        self.cubin = cubin

    def get_function(self, name):
        return self.cubin, name


def pack_into(buffer, offset, *items):
    buffer[offset : offset + len(BLOCK)] = bytes(items)


def launcher(name, device=0, stream_of=lambda device: 7):
    packer = SimpleNamespace(size=len(BLOCK), pack_into=pack_into)
    plan = SimpleNamespace(kernel=name, grid=(2, 3), block=(4, 5), packer=packer)
    return jit.Launcher(plan, device, stream_of, lambda values: values)


def launch(name, device=0, stream_of=lambda device: 7):
    launcher(name, device, stream_of).launch(BLOCK)


@pytest.fixture
def cold(monkeypatch):
    """A process that has neither compiled a kernel nor warned."""
    state = {"_kernels": {}, "_locks": {}, "_not_warned": threading.Lock()}
    for name, value in (state | {"_thread": threading.local()}).items():
        monkeypatch.setattr(jit, name, value)


@pytest.fixture
def cupy(monkeypatch, cold):
    """A stand-in for CuPy on a machine with a GPU."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(jit, "_cu_launch_kernel_ex", lambda: stand_in.launch_kernel_ex)
    monkeypatch.setattr(jit, "driver", lambda: stand_in.cuda_of_driver)
    monkeypatch.setattr(environment, "nvrtc_file", lambda: stand_in.nvrtc_file)
    for function in (environment.cupy, jit._starts_early):
        function.cache_clear()
    yield stand_in
    for function in (environment.cupy, jit._starts_early):
        function.cache_clear()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(THREADS) as threads:
        yield threads


def at_once(pool, call, arguments):
    """The results of calls that start at the same time."""
    barrier = threading.Barrier(len(arguments))

    def started(argument):
        barrier.wait(SOON)
        return call(argument)

    return [future.result(SOON) for future in [pool.submit(started, each) for each in arguments]]


def test_an_install_without_kernels_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "rope_cupy" / "jit.py"))
    jit.sources.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"are missing: .*/kernels must hold rotary\.cu"):
            jit.sources()
    finally:
        jit.sources.cache_clear()


def test_a_launch_is_that_of_its_plan_on_the_stream(cupy):
    launch("a")
    launch("a")
    assert cupy.compiled == ["a"]
    assert cupy.launched == [("a", 0, [2, 3, 1, 4, 5, 1], 7)] * 2


def test_a_launch_on_another_device_is_made_there_and_leaves_the_current_one(cupy):
    launch("a", device=1)
    assert cupy.launched == [("a", 1, [2, 3, 1, 4, 5, 1], 7)]
    assert cupy.device == 0


def test_what_is_prepared_is_launched_on_the_stream_that_is_current(cupy):
    streams = [7, 7, 9, 0, 7]
    several = launcher("a", 0, lambda device: streams[len(cupy.launched)])
    for _ in streams:
        several.launch(BLOCK)
    assert [stream or 0 for _, _, _, stream in cupy.launched] == streams


def test_the_first_call_in_a_capture_says_to_make_it_once_before(cupy):
    cupy.captured = True
    with pytest.raises(RuntimeError, match="make the call once before the capture"):
        launch("a")
    assert not cupy.compiled and not cupy.launched
    launch("a", 0, lambda device: 9)  # on a stream that is not captured
    launch("a")
    assert [stream for *_, stream in cupy.launched] == [9, 7]


def test_streams_that_come_and_go_are_forgotten(cupy, monkeypatch):
    monkeypatch.setattr(jit, "MAX_STREAMS", 3)
    of_many = launcher("a", stream_of=lambda device: 1 + len(cupy.launched))
    for _ in range(10):
        of_many.launch(BLOCK)
        assert len(of_many.configs) <= 3
    assert [stream for _, _, _, stream in cupy.launched] == [*range(1, 11)]


@pytest.mark.parametrize(
    ("capability", "driver", "early"),
    [("90", 12030, True), ("120", 13000, True), ("89", 13000, False), ("90", 12020, False)],
)
def test_a_kernel_may_start_early_where_gpu_and_driver_know_how(cupy, capability, driver, early):
    cupy.capability, cupy.cuda_of_driver = capability, driver
    launch("a")
    assert cupy.attributes == ([(6, 1)] if early else [])


def test_an_error_of_the_driver_is_raised_by_cupy(cupy):
    cupy.status = 719
    with pytest.raises(RuntimeError, match="the driver's error 719"):
        launch("a")


def test_a_thread_hands_over_its_own_arguments_while_another_launch_blocks(cupy, pool):
    """The driver reads them only in the launch, and CuPy lets other threads run meanwhile."""
    two, seen = threading.Barrier(2), []

    def launch_kernel_ex(config, function, parameters, extra):
        two.wait(SOON)
        seen.append(ctypes.string_at(ctypes.c_void_p.from_address(parameters).value, len(BLOCK)))
        return 0

    shared = launcher("a")
    shared.launch(BLOCK)
    jit_launch = jit._cu_launch_kernel_ex
    jit._cu_launch_kernel_ex = lambda: launch_kernel_ex
    try:
        shared = launcher("a")
    finally:
        jit._cu_launch_kernel_ex = jit_launch
    blocks = [bytes([i]) * len(BLOCK) for i in (1, 2)]
    at_once(pool, shared.launch, blocks)
    assert sorted(seen) == blocks


def test_the_drivers_structures_are_as_large_as_in_cuda_h():
    assert ctypes.sizeof(jit._Attribute) == 72
    assert ctypes.sizeof(jit._Config) == 56


def test_threads_that_ask_for_one_kernel_at_once_have_it_compiled_once(cupy, pool):
    in_compilation = threading.Event()
    cupy.compile = lambda name: in_compilation.wait(0.2)  # until the others have come, too
    kernels = at_once(pool, lambda name: jit.kernel(name, 0), ["a"] * THREADS)
    assert cupy.compiled == ["a"]
    assert len(set(map(id, kernels))) == 1


@pytest.mark.parametrize("fails", [False, True], ids=["in time", "in vain"])
def test_the_builtins_beside_nvrtc_are_loaded_before_any_thread_compiles(
    cupy, pool, monkeypatch, fails
):
    loaded = []

    def load(name):
        loaded.append(name)
        if fails:
            raise OSError(name)

    def compile_with_builtins(name):
        assert loaded

    cupy.nvrtc_file, cupy.compile = Path("/a/folder/libnvrtc.so.13"), compile_with_builtins
    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    at_once(pool, lambda name: jit.kernel(name, 0), [str(i) for i in range(THREADS)])
    assert len(cupy.compiled) == THREADS
    assert set(loaded) == {"/a/folder/libnvrtc-builtins.so.13.0"}


def test_a_kernel_is_compiled_for_each_device(cupy):
    first, second = (jit.kernel("a", device) for device in (0, 1))
    assert first is not second
    assert cupy.compiled == ["a", "a"]


def test_different_kernels_are_compiled_at_the_same_time(cupy, pool):
    both = threading.Barrier(2)
    cupy.compile = lambda name: both.wait(SOON)
    at_once(pool, lambda name: jit.kernel(name, 0), ["a", "b"])


def test_while_a_launch_blocks_others_launch_and_compile(cupy, pool):
    blocked, go_on = threading.Event(), threading.Event()

    def block_once(name):
        if name == "slow" and not blocked.is_set():
            blocked.set()
            assert go_on.wait(SOON)

    launch("warm")
    cupy.run = block_once
    slow = pool.submit(launch, "slow")
    try:
        assert blocked.wait(SOON)
        for name in ("warm", "cold", "slow"):
            pool.submit(launch, name).result(SOON / 4)
        assert not slow.done()
    finally:
        go_on.set()
    slow.result(SOON)
    assert cupy.compiled == ["warm", "slow", "cold"]


def test_while_a_kernel_is_compiled_another_is_launched(cupy, pool):
    compiling, go_on = threading.Event(), threading.Event()

    def block(name):
        compiling.set()
        assert go_on.wait(SOON)

    launch("warm")
    cupy.compile = block
    cold = pool.submit(launch, "cold")
    try:
        assert compiling.wait(SOON)
        pool.submit(launch, "warm").result(SOON / 4)
    finally:
        go_on.set()
    cold.result(SOON)


def test_a_kernel_that_is_there_is_found_without_a_lock(cupy, monkeypatch):
    kernel = jit.kernel("a", 0)
    monkeypatch.setattr(jit, "_locks", None)
    assert jit.kernel("a", 0) is kernel


def test_a_failed_compilation_reaches_its_caller_and_the_next_call_tries_again(cupy, pool):
    def fail_once(name):
        if len(cupy.compiled) == 1:
            raise ZeroDivisionError("a mistake of our own")

    def outcome(name):
        try:
            return jit.kernel(name, 0)
        except ZeroDivisionError as error:
            return error

    cupy.compile = fail_once
    outcomes = at_once(pool, outcome, ["a"] * THREADS)
    (failed,) = (each for each in outcomes if isinstance(each, Exception))
    assert str(failed) == "a mistake of our own"
    assert len(set(map(id, outcomes))) == 2
    assert cupy.compiled == ["a", "a"]


def test_a_kernel_that_cannot_be_cached_is_compiled_in_memory_and_one_warning_says_so(
    cupy, monkeypatch, tmp_path
):
    def fail(name):
        raise FULL

    cupy.compile = fail
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "removed"))
    expected = (
        rf"^kernels cannot be cached in {tmp_path}/removed \(No such file or directory\): "
        r"export CUPY_CACHE_DIR=/a/folder/that/can/be/written$"
    )
    with pytest.warns(RuntimeWarning, match=expected):
        assert jit.kernel("a", 0) == (b"cubin", "_Za")
    assert jit.kernel("b", 0) == (b"cubin", "_Zb")
    assert jit.kernel("a", 0) == (b"cubin", "_Za")
    assert cupy.in_memory == ["a", "b"]


def test_where_cupy_cannot_compile_in_memory_the_fault_of_the_disk_is_an_error(cupy, monkeypatch):
    def fail(name):
        raise FULL

    cupy.compile = fail
    monkeypatch.setattr(cupy.cuda, "compiler", SimpleNamespace())
    with pytest.raises(
        RuntimeError, match=r"^kernels cannot be cached in .*: export CUPY_CACHE_DIR"
    ):
        jit.kernel("a", 0)


def test_threads_without_a_cache_are_warned_once(cupy, pool, recwarn):
    def fail(name):
        raise FULL

    cupy.compile = fail
    at_once(pool, lambda name: jit.kernel(name, 0), [str(i) for i in range(THREADS)])
    assert len(cupy.in_memory) == THREADS
    assert len(recwarn) == 1


def test_a_cached_kernel_that_cannot_be_read_is_compiled_in_memory(cupy, monkeypatch, tmp_path):
    def fail(name):
        raise PermissionError(13, "Permission denied", "1234.cubin")

    cupy.compile = fail
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    with pytest.warns(RuntimeWarning, match=rf"{tmp_path} .*Permission denied: '1234\.cubin'\): "):
        assert jit.kernel("a", 0) == (b"cubin", "_Za")


def test_what_the_machine_lacks_for_a_compilation_is_explained_and_mistakes_are_not(cupy):
    def fail(name):
        raise error

    cupy.compile = fail
    error = RuntimeError("Failure finding libnvrtc.so.12")
    with pytest.raises(RuntimeError, match=r"pip install --force-reinstall nvidia-") as raised:
        launch("a")
    assert raised.value.__cause__ is error
    error = RuntimeError("default_program(1): error: expected a ;")
    with pytest.raises(RuntimeError) as raised:
        launch("a")
    assert raised.value is error
