"""What only a GPU can show: the kernel over the whole matrix, streams, graphs, devices, sizes."""

import numpy as np
import pytest
from arrays import (
    OPTIONS,
    OTHER,
    Case,
    Producer,
    alike,
    hold,
    in_both_pairings,
    possible,
    sample,
    verify,
)
from reference import FORMATS, check, rotate, rounded, to_bits, to_float64
from streams import Stream
from test_host_cuda import COLLECTIVES, collectives

from rope_cupy import RotaryTable, apply_rotary, apply_rotary_qk, frequencies, jit
from rope_cupy.problem import MAX_ROWS

pytestmark = pytest.mark.gpu

SIZES = [(2, 67, 8, 2), (1, 130, 6, 6), (3, 33, 5, 0), (2, 1, 16, 2), (1, 257, 4, 1), (4, 9, 3, 3)]
CASES = sample(1000, seed=2, library=["cupy", "torch-cuda"], sizes=SIZES)
CASES += sample(60, seed=3, library=["dlpack-cuda"], sizes=SIZES)
CASES += sample(  # what most callers have: whole vectors everywhere
    500,
    seed=4,
    library=["cupy", "torch-cuda"],
    sizes=SIZES,
    head=[head for head in OPTIONS["head"] if not any(size % 8 for size in head)],
    style=["dense", "dense", "dense", "padded", "swapped"],
    k_style=["dense", "dense", "dense", "padded", "swapped"],
    rows=["position", "position", "batch"],
    table_style=["dense", "dense", "padded"],
    write=["new", "in place"],
)
CASES += alike(250, seed=5, library=["cupy", "torch-cuda"], sizes=[(2, 300, 6, 6), (1, 33, 4, 4)])
in_both_libraries = pytest.mark.parametrize("library", ["cupy", "torch-cuda"])


EVERY_CASE = [  # one in sixteen belongs to the short form of the suite
    pytest.param(case, marks=pytest.mark.long, id=str(case)) if i % 16 else case
    for i, case in enumerate(CASES)
]


@pytest.mark.parametrize("case", EVERY_CASE, ids=str)
def test_a_call_of_any_kind_is_right(case, record):
    record(case.kind, *verify(case))


@in_both_pairings
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_million_elements_are_right(dtype, interleaved, layout, record):
    case = Case(dtype, interleaved=interleaved, library="torch-cuda", layout=layout)
    case = case._replace(head=(128, 128, 0), sizes=(1, 1024, 8, 2), write="in place")
    record(dtype, *verify(possible(case)))


class Work:
    """x, out and a table, ready and their kernel loaded, and other numbers to come into x."""

    def __init__(self, library, x_library):
        rng = np.random.default_rng(6)
        angle = rng.uniform(-np.pi, np.pi, (64, 32))
        self.cos, self.sin = (rounded(part, "float32") for part in (np.cos(angle), np.sin(angle)))
        old, new, out = rng.standard_normal((3, 2, 64, 4, 64))
        self.x, self.new = (hold(values, "float32", x_library).array for values in (old, new))
        self.out = hold(out, "float32", library).array
        self.table = RotaryTable(
            *(hold(part, "float32", library).array for part in (self.cos, self.sin))
        )
        self.call(None)
        self.call(self.out)

    def call(self, out):
        return apply_rotary(self.x, self.table, out=out)

    def assert_rotated(self, y, x):
        check(to_float64(y), rotate(to_float64(x), self.cos, self.sin), "float32")


@pytest.mark.undisturbed
@in_both_libraries
def test_the_launch_is_in_its_turn_on_the_current_stream_and_nothing_waits(library):
    work, stream = Work(library, library), Stream(library)
    with stream.current():
        stream.keep_busy()
        work.x[...] = work.new
        work.call(work.out)
        assert stream.is_busy(), "the call has waited for the work before it"
        fresh = work.call(None)
    stream.stream.synchronize()
    for y in (work.out, fresh):
        work.assert_rotated(y, work.new)


@pytest.mark.undisturbed
@in_both_libraries
def test_the_stream_is_that_of_the_library_that_owns_the_output(library):
    work, stream = Work(library, OTHER[library]), Stream(library)
    work.out[...] = 0
    assert not to_bits(work.out).any()
    with stream.current():
        stream.keep_busy()
        work.call(work.out)
    untouched = not to_bits(work.out).any()  # read on the default stream, which does not wait
    assert stream.is_busy(), "the default stream has waited, so this shows nothing"
    assert untouched, "the launch was not behind the work on the output's stream"
    stream.stream.synchronize()
    work.assert_rotated(work.out, work.x)


@pytest.mark.undisturbed
@pytest.mark.parametrize(
    ("library", "write"), [("cupy", "out"), ("torch-cuda", "out"), ("torch-cuda", "new")]
)
def test_a_graph_repeats_the_launch_on_new_numbers(library, write):
    work, stream = Work(library, library), Stream(library)
    work.out[...] = 0
    replay, y = stream.capture(lambda: work.call(work.out if write == "out" else None))
    assert not to_bits(work.out).any(), "a captured call must only be recorded"
    for numbers in (work.new, -work.new):
        with stream.current():
            work.x[...] = numbers
            replay()
        stream.stream.synchronize()
        work.assert_rotated(y, numbers)


@pytest.mark.undisturbed
@in_both_libraries
def test_the_first_call_in_a_capture_says_to_make_it_once_before(library, monkeypatch):
    work = Work(library, library)
    monkeypatch.setattr(jit, "_kernels", {})  # as in a new process
    before = to_bits(work.out)

    def first():
        work.x[...] = work.new
        with pytest.raises(RuntimeError, match="make the call once before the capture"):
            work.call(work.out)

    Stream(library).capture(first)  # which goes on
    assert np.array_equal(to_bits(work.out), before)
    stream = Stream(library)
    with stream.current():
        work.call(work.out)
    stream.stream.synchronize()
    replay, _ = stream.capture(lambda: work.call(work.out))
    with stream.current():
        work.x[...] = work.new
        replay()
    stream.stream.synchronize()
    work.assert_rotated(work.out, work.new)


@pytest.mark.undisturbed
@in_both_libraries
def test_nothing_is_allocated_but_the_result(library):
    cupy, torch = pytest.importorskip("cupy"), pytest.importorskip("torch")
    work = Work(library, library)
    sizes = []

    def allocate(size):
        sizes.append(size)
        return cupy.get_default_memory_pool().malloc(size)

    def allocated():
        return torch.cuda.memory_stats()["allocation.all.allocated"] + len(sizes)

    torch.cuda.init()
    for out, allocations in ((work.out, 0), (None, 1)):
        before = allocated()
        with cupy.cuda.using_allocator(allocate):
            y = work.call(out)
        assert allocated() - before == allocations
        work.assert_rotated(y, work.x)


@pytest.mark.parametrize("argument", ["k", "table", "positions", "out"])
@pytest.mark.parametrize(
    ("here", "there"),
    [("cupy", "numpy"), ("torch-cuda", "torch"), ("numpy", "cupy"), ("torch", "torch-cuda")],
)
def test_arrays_on_different_devices_are_refused(here, there, argument):
    rng = np.random.default_rng(9)
    where = dict.fromkeys(("q", "k", "table", "positions", "out"), here)
    where[argument] = there
    q, k, q_out, k_out = (
        hold(rng.standard_normal((2, 5, 3, 8)), "float32", where[name])
        for name in ("q", "k", "out", "out")
    )
    cos, sin = (hold(rng.standard_normal((5, 4)), "float32", where["table"]) for _ in range(2))
    positions = hold(np.arange(5), "int64", where["positions"])
    with pytest.raises(ValueError, match=rf"^(q_)?{argument} must .*, got .*"):
        apply_rotary_qk(
            q.array,
            k.array,
            (cos.array, sin.array),
            positions=positions.array,
            out=(q_out.array, k_out.array),
        )
    for held in (q, k, q_out, k_out, cos, sin, positions):
        held.assert_unchanged()


@in_both_libraries
def test_arrays_on_a_gpu_that_is_not_the_current_one_are_rotated_there(library):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    torch = pytest.importorskip("torch")
    with cupy.cuda.Device(1), torch.cuda.device(1):
        work = Work(library, library)
    work.assert_rotated(work.call(None), work.x)
    assert str(work.call(None).device) == str(work.x.device)


@pytest.fixture
def big():
    """A bfloat16 tensor of a little more than 2^31 elements, which are more than 2^32 bytes."""
    torch = pytest.importorskip("torch")
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    yield torch.empty(2**31 + 2**19, dtype=torch.bfloat16, device="cuda").normal_()
    torch.cuda.empty_cache()


@pytest.mark.long
@in_both_pairings
@pytest.mark.parametrize("in_place", [True, False])
def test_more_than_2_31_elements_are_rotated(big, interleaved, in_place, record):
    torch = pytest.importorskip("torch")
    x = big.view(1, -1, 32, 128)  # 2^19 tokens and another 128
    angle = torch.rand(x.shape[1], 64, device="cuda") * 6
    cos, sin = angle.cos(), angle.sin()
    probe = [0, 1, 2**18, 2**19 - 1, 2**19, 2**19 + 1, x.shape[1] - 1]
    exact = rotate(
        *(to_float64(part) for part in (x[:, probe], cos[probe], sin[probe])),
        interleaved=interleaved,
    )
    y = apply_rotary(x, (cos, sin), interleaved=interleaved, out=x if in_place else None)
    record("bfloat16", check(to_float64(y[:, probe]), exact, "bfloat16"))


@pytest.mark.long
def test_strides_may_pass_2_31_elements(big, record):
    x = big.as_strided((2, 4, 2, 128), (2**31 + 128, 256, 128, 1))
    before = to_float64(x)
    cos, sin = to_float64(big[4096:4352]).reshape(2, 2, 64)
    table = RotaryTable(*big[4096:4352].view(2, 2, 64).float())
    positions = hold(np.array([1, 0, 1, 1]), "int32", "torch-cuda")
    apply_rotary(x, table, positions=positions.array, out=x)
    exact = rotate(before, cos, sin, positions=positions.elements)
    record("bfloat16", check(to_float64(x), exact, "bfloat16"))


@pytest.mark.long
@pytest.mark.parametrize("stride", [2**31, 2**20 + 64], ids=["row", "product"])
def test_rows_of_a_table_may_lie_past_2_31_elements(big, stride, record):
    last = -(-(2**31) // stride)
    cos, sin = (big[64 * i :].as_strided((last + 1, 64), (stride, 1)) for i in range(2))
    rows = np.array([last, 0, last, last // 2])
    x = hold(np.random.default_rng(7).standard_normal((1, 4, 2, 128)), "float32", "torch-cuda")
    positions = hold(rows, "int64", "torch-cuda").array
    y = apply_rotary(x.array, RotaryTable(cos, sin), positions=positions)
    table = (to_float64(part[rows]) for part in (cos, sin))
    exact = rotate(to_float64(x.array), *table)
    record("float32", check(to_float64(y), exact, "float32"))


@pytest.mark.long
def test_every_element_of_a_tensor_that_takes_a_third_of_the_memory_is_rotated(record_property):
    """By quarter turns, which are exact, so that each of its elements can be compared."""
    torch = pytest.importorskip("torch")
    torch.cuda.empty_cache()
    size = 1 << int(np.log2(0.45 * torch.cuda.mem_get_info()[0] / 2))
    if size < 2**33:
        pytest.skip("needs 40 GiB of free GPU memory")
    x = torch.empty(size, dtype=torch.bfloat16, device="cuda").view(-1, 4096, 32, 128)
    numbers = torch.arange(x[0].numel(), device="cuda").mul(40503).remainder(16001).bfloat16()
    for i, tokens in enumerate(x):
        tokens.copy_(numbers.roll(i).view_as(tokens))
    turns = torch.randint(4, x.shape[:2], device="cuda")
    cos, sin = (torch.tensor([row] * 64).T.cuda() for row in ([1.0, 0, -1, 0], [0.0, 1, 0, -1]))
    apply_rotary(x, (cos, sin), positions=turns, out=x)
    for i, (tokens, turn) in enumerate(zip(x, turns, strict=True)):
        a, b = numbers.roll(i).view_as(tokens).chunk(2, -1)
        exact = torch.stack([torch.cat(y, -1) for y in ((a, b), (-b, a), (-a, -b), (b, -a))])
        assert torch.equal(tokens, exact[turn, torch.arange(4096, device="cuda")])
    record_property("largest", size)


@pytest.mark.long
def test_the_largest_number_of_rows_is_rotated():
    torch = pytest.importorskip("torch")
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    x = torch.ones((1, MAX_ROWS, 1, 2), dtype=torch.bfloat16, device="cuda")
    x[0, ::3] = 2
    cos = torch.zeros((1, 1), device="cuda").expand(MAX_ROWS, 1)
    apply_rotary(x, (cos, cos + 1), out=x)
    for start in range(0, MAX_ROWS, 2**28):
        part = x[0, start : start + 2**28, 0]
        exact = torch.ones_like(part[:, 0])
        exact[-start % 3 :: 3] = 2
        assert torch.equal(part[:, 0], -exact) and torch.equal(part[:, 1], exact)


@in_both_libraries
def test_a_table_may_hold_a_million_positions(library, record):
    tokens, last = 4096, 2**20 - 1
    x = hold(np.random.default_rng(11).standard_normal((1, tokens, 2, 128)), "float32", library)
    inv_freq = frequencies.inverse_frequencies(128)
    table = RotaryTable.from_inverse_frequencies(inv_freq, last + 1, like=x.array)
    positions = np.random.default_rng(12).integers(0, last, tokens)
    positions[:6] = last, last + 1, 0, -1, 2**40, last - 1
    held = hold(positions, "int64", library)
    for given, rows in (
        (held.array, positions),
        (last + 1 - tokens, np.arange(tokens) + last + 1 - tokens),
    ):
        y = apply_rotary(x.array, table, positions=given, out_of_range="keep")
        rotated = (rows >= 0) & (rows <= last)
        angle = np.outer(np.where(rotated, rows, 0), inv_freq)
        cos, sin = (rounded(part, "float32") for part in (np.cos(angle), np.sin(angle)))
        exact = rotate(to_float64(x.array), cos, sin)
        actual, before = to_float64(y), to_float64(x.array)
        record("float32", check(actual[:, rotated], exact[:, rotated], "float32"))
        assert np.array_equal(actual[:, ~rotated], before[:, ~rotated])


def test_a_producer_is_asked_to_be_ready_on_the_stream_of_the_launch():
    torch, asked = pytest.importorskip("torch"), []

    class Recorded(Producer):
        def __dlpack__(self, **options):
            asked.append(options["stream"])
            return super().__dlpack__(**options)

    rng = np.random.default_rng(10)
    x = hold(rng.standard_normal((2, 5, 3, 8)), "float32", "cupy")
    out = hold(rng.standard_normal((2, 5, 3, 8)), "float32", "torch-cuda")
    cos, sin = (hold(rng.standard_normal((5, 4)), "float32", "cupy") for _ in range(2))
    table = RotaryTable(Recorded(cos.array), Recorded(sin.array))
    assert set(asked) == {1}  # CuPy's default stream, when the table is made
    asked.clear()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        apply_rotary(Recorded(x.array), table, out=out.array)
    assert asked == [stream.cuda_stream] * 3
    stream.synchronize()
    exact = rotate(*(to_float64(part.array) for part in (x, cos, sin)))
    check(to_float64(out.array), exact, "float32")


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_barriers_shuffles_and_votes_do_what_they_do_in_the_tests_on_the_cpu(size):
    cupy = pytest.importorskip("cupy")
    code, names = COLLECTIVES.read_text(), ["collectives_kernel"]
    module = cupy.RawModule(code=code, options=("-std=c++17",), name_expressions=names)
    out = cupy.zeros((18, size), cupy.uint32)
    module.get_function(*names)((1,), (size,), (out,))
    assert np.array_equal(out.get(), collectives(size))
