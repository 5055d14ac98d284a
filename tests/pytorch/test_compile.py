"""torch.compile, torch.export, fake tensors: one graph, the same bits, compiled once."""

import os
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from rope_cupy import (
    RotaryTable,
    Stream,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary,
    apply_rotary_qk,
    apply_rotary_qkv,
    join_qkv,
)
from rope_cupy.call import kind_of
from rope_cupy.options import Cache, Norm, Packed, check_options
from rope_cupy.table_forms import FORMS
from rope_cupy.ways import graphs, operators
from rope_cupy.ways.operators import VERSION

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PAIRS = 32
TESTS = Path(__file__).parents[1]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def parts(device, positions=64):
    angles = torch.rand(positions, PAIRS, device=device) * 6
    return angles.cos(), angles.sin()


def q_and_k(device, tokens=16, grad=False):
    return [
        torch.randn(2, tokens, heads, 2 * PAIRS, device=device).requires_grad_(grad)
        for heads in (4, 2)
    ]


def new(q, k, table, positions):
    q, k = apply_rotary_qk(q, k, table, positions=positions)
    return 2 * q, k.sin()


def in_place(q, k, table, positions):
    q, k = q + 1, k * 2
    apply_rotary_qk(q, k, table, positions=positions, out=(q, k))
    return 2 * q, k.sin()


def into_others(q, k, table, positions):
    outs = torch.zeros_like(q), torch.zeros_like(k)
    q, k = apply_rotary_qk(q, k, table, positions=positions, out=outs)
    return 2 * q, k.sin()


def one_of_each(q, k, table, positions):
    q = apply_rotary(q, table, positions=positions, conjugate=True)
    k = apply_rotary(k, (table._source.arrays[0], table._source.arrays[1]), interleaved=True)
    return q, k


def table_inside(q, k, table, positions):
    cos, sin = (part.repeat(1, 2) for part in table._source.arrays)
    return apply_rotary_qk(q, k, RotaryTable.from_full_width(cos, sin), positions=positions)


FUNCTIONS = [new, in_place, into_others, one_of_each, table_inside]


def assert_same(results, wanted):
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(result, exact) and result.stride() == exact.stride()


@pytest.mark.parametrize("positions", [None, 3, "array"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_gives_the_same_bits(backend, function, positions, device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device)
    if positions == "array":
        positions = torch.arange(16, device=device) * 3
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert_same(compiled(q, k, table, positions), function(q, k, table, positions))
    assert_same(compiled(q, k, table, positions), function(q, k, table, positions))


def by_offsets(q, k, table, rows):
    return apply_rotary_qk(q, k, table, positions=1, seqlen_offsets=rows["offsets"])


def by_an_offset(q, k, table, rows):
    return apply_rotary_qk(q, k, table, seqlen_offsets=3)


def by_sequences(q, k, table, rows):
    q, k = q[:1], k[:1]
    return apply_rotary_qk(
        q, k, table, cu_seqlens=rows["ends"], seqlen_offsets=rows["offsets"], out_of_range="keep"
    )


def by_axes(q, k, table, rows):
    sections = {"mrope_section": (12, 11, 9), "mrope_interleaved": True}
    q = apply_rotary(q, table, positions=rows["axes"], mrope_section=(16, 8, 8))
    return q, apply_rotary(k, table, positions=rows["axes"], **sections)


@pytest.mark.parametrize("computed", [False, True], ids=["a table", "frequencies"])
@pytest.mark.parametrize("function", [by_offsets, by_an_offset, by_sequences, by_axes])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_tells_the_positions_of_tokens_is_in_the_graph(backend, function, computed, device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device, grad=True)
    if computed:
        inv_freq = torch.rand(PAIRS)
        table = RotaryTable.from_inverse_frequencies(inv_freq, like=q, precompute=False)
    rows = {
        "offsets": torch.tensor([7, 30], device=device),
        "ends": torch.tensor([2, 5, 16], device=device),
        "axes": torch.randint(64, (3, 2, 16), device=device),
    }
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    gradients = []
    for call in (function, compiled):
        results = call(q, k, table, rows)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        gradients.append((*results, q.grad, k.grad))
        q.grad = k.grad = None
    for eager, result in zip(*gradients, strict=True):
        assert torch.equal(result, eager)


def compare_with_inductor(function, device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device, grad=True)
    positions = torch.arange(16, device=device)
    gradients = []
    for call in (function, torch.compile(function, fullgraph=True, backend="inductor")):
        results = call(q, k, table, positions)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
        gradients.append((*results, q.grad, k.grad))
        q.grad = k.grad = None
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_inductor_gives_the_same_results_gradients_and_inputs(device):
    calls = (
        f"compare_with_inductor(tests.new, {device!r})",
        f"compare_with_inductor(tests.in_place, {device!r})",
        f"compare_inputs_with('inductor', {device!r})",
    )
    in_a_process("; ".join(f"tests.{call}" for call in calls))


def environment():
    """That of a process which imports this checkout."""
    folders = TESTS.parent, TESTS, TESTS / "api", TESTS / "models"
    paths = *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def in_a_process(code):
    """Run what uses inductor, which needs setuptools' distutils where others have Python's."""
    command = [sys.executable, "-W", "ignore", "-c", f"import test_compile as tests; {code}"]
    done = subprocess.run(
        command, cwd=TESTS / "pytorch", env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def rotate_inputs(qkv, table):
    """Rotate views of a packed input in place, and a part of it again by itself."""
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    apply_rotary_qk(q, k, table, out=(q, k))
    apply_rotary(q[:, 4:], table, out=q[:, 4:], conjugate=True)
    return q + k


def compare_inputs_with(backend, device):
    table, qkv = RotaryTable(*parts(device)), torch.randn(2, 16, 3, 4, 2 * PAIRS, device=device)
    others = qkv.clone(), qkv.clone()
    compiled = torch.compile(rotate_inputs, fullgraph=True, backend=backend)
    for _ in range(2):  # what has been rotated is rotated on
        with torch.no_grad():
            results = rotate_inputs(others[0], table), compiled(others[1], table)
        assert torch.equal(*results) and torch.equal(*others)
    assert not torch.equal(others[0][:, :, 0], qkv[:, :, 0])
    assert torch.equal(others[0][:, :, 2], qkv[:, :, 2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_views_of_an_input_are_written_in_place(backend, device):
    compare_inputs_with(backend, device)


@pytest.mark.parametrize("function", FUNCTIONS[:2] + FUNCTIONS[3:])
def test_a_compiled_backward_pass_gives_the_same_gradients(function, device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device, grad=True)
    gradients = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        results = call(q, k, table, None)
        torch.autograd.backward(results, [result.detach().cos() for result in results])
        gradients.append((q.grad, k.grad))
        q.grad = k.grad = None
    assert_same(gradients[1], gradients[0])


@pytest.mark.parametrize("function", [new, in_place])
@pytest.mark.parametrize("grad", [False, True])
def test_sequences_of_other_lengths_are_not_compiled_again(function, grad, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    table = RotaryTable(*parts(device))
    for tokens in (16, 24, 33, 64):
        q, k = q_and_k(device, tokens, grad)
        positions = torch.arange(tokens, device=device)
        results = compiled(q, k, table, positions)
        assert_same(results, function(q, k, table, positions))
        if grad:
            sum(result.sum() for result in results).backward()
    assert counter.frame_count == 1


def test_starts_of_sequences_are_not_compiled_again(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(new, fullgraph=True, backend=counter, dynamic=True)
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device)
    for first in (3, 5, 17, 40):
        assert_same(compiled(q, k, table, first), new(q, k, table, first))
    assert counter.frame_count == 1


def test_a_start_that_is_a_size_is_not_compiled_again(device):
    """As of tokens behind those of a text, whose number changes."""
    counter = CompileCounterWithBackend("aot_eager")

    def behind_text(q, k, text, table):
        return apply_rotary_qk(q, k, table, positions=text.shape[0])

    compiled = torch.compile(behind_text, fullgraph=True, backend=counter, dynamic=True)
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device)
    for length in (5, 6, 9, 40):
        text = torch.ones(length, device=device)
        assert_same(compiled(q, k, text, table), behind_text(q, k, text, table))
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="table must hold the positions"):
        behind_text(q, k, torch.ones(1000, device=device), table)
    with pytest.raises(ValueError, match="table must hold the positions"):
        compiled(q, k, torch.ones(1000, device=device), table)


OTHER_ARRAYS = (None,) * 7  # weights, biases, slots and scales
NO_PARTS = (None, 0.0, 0.0, "False", False, *(None,) * 5)  # no norm, no caches
SAMPLES = {  # what is behind the table and its form
    "halves": (
        *(None, None, None, None, *OTHER_ARRAYS),
        *(False, None, None, 0, False, "nan", None, False, "once", *NO_PARTS),
    ),
    "a start": (
        *(None, None, None, 3, *OTHER_ARRAYS),
        *(True, "bshd", None, 0, True, "keep", None, False, "once", *NO_PARTS),
    ),
    "positions": (
        *("array", None, None, None, *OTHER_ARRAYS),
        *(False, None, None, 0, False, "nan", None, False, "eager", *NO_PARTS),
    ),
}


def behind(name, device):
    positions, *rest = SAMPLES[name]
    positions = None if positions is None else torch.arange(16, device=device)
    return *parts(device), "half_width", positions, *rest, VERSION


def as_run(xs, outs, arguments):
    """What an operator takes that runs, for what one takes that is traced."""
    return operators.arguments_of(graphs.traced_call(xs, outs, arguments))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("num", [1, 2])
def test_the_operators_of_new_results_pass_opcheck(num, name, grad, device):
    xs, arguments = q_and_k(device, grad=grad)[:num], behind(name, device)
    defined, kind = torch.ops.rope_cupy, "_qk" if num == 2 else ""
    torch.library.opcheck(getattr(defined, f"rotate{kind}").default, (*xs, *arguments))
    if not grad:
        run = *xs, *as_run((*xs,), None, arguments)
        torch.library.opcheck(getattr(defined, f"rotate{kind}_new").default, run)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("num", [1, 2])
def test_the_operators_that_write_pass_opcheck(num, name, device):
    xs = q_and_k(device)[:num]
    outs = tuple(torch.zeros_like(x) for x in xs)
    arguments, written = behind(name, device), operators.of_written(xs, outs)
    torch.library.opcheck(torch.ops.rope_cupy.rotate_into.default, (*written, *arguments))
    run = *written, *as_run(xs, outs, arguments)
    torch.library.opcheck(torch.ops.rope_cupy.write_into.default, run)


KINDS_OF_CALLS = {
    "plain": ((), {}),
    "sections": (("positions",), {"mrope_section": (16, 8, 8), "mrope_interleaved": True}),
    "a norm": (("q_weight",), {"norm": Norm("head", 0.1 + 0.2, 1.0, "before_weight")}),
    "a layer": (("k_weight", "q_bias"), {"norm": Norm("layer", 1e-6, 0.0, False, True)}),
    "packed": (("k_weight",), {"packed": Packed(4, 2), "head_dim": 64, "interleaved": True}),
    "a cache": (
        ("slot_mapping", "k_scale"),
        {"cache": Cache("HND", "float8_e5m2", 1.0, float(np.float32(0.1)))},
    ),
}


@pytest.mark.parametrize("name", KINDS_OF_CALLS)
def test_the_text_of_a_kind_gives_the_kind_again(name):
    extra_names, options = KINDS_OF_CALLS[name]
    plain = check_options(False, None, None, 0, False, "nan", None, False, "once")
    kind = kind_of(("q", "k"), FORMS["cos_sin_cache"], extra_names, plain._replace(**options))
    found, has_positions = operators.kind_of_text(operators.text_of(kind))
    assert found is kind and has_positions == (name == "sections")


def test_a_graph_names_the_version_of_the_operators_that_it_runs(device):
    """For PyTorch keeps graphs on the disk by what is traced, and runs those of another version."""
    graphs_seen = []

    def backend(graph, inputs):
        graphs_seen.append(graph)
        return graph.forward

    compiled = torch.compile(new, fullgraph=True, backend=backend)
    compiled(*q_and_k(device), RotaryTable(*parts(device)), None)
    (node,) = [each for each in graphs_seen[0].graph.nodes if "rope_cupy" in str(each.target)]
    assert node.args[-1] == VERSION


# One set of checks for every way in.


def norm_rotary(x, table, **options):
    return apply_norm_rotary(x, None, table, **options)


def qkv_rotary(x, table, **options):
    return apply_rotary_qkv(x, table, **options)


def into(x, table, kind):
    """Write what overlaps or does not fit."""
    if kind == "double":
        return apply_rotary(x, table, out=x.double())
    if kind == "shifted":
        return apply_rotary(x[:, :12], table, out=x[:, 2:14])
    if kind == "repeated":
        return apply_rotary(x, table, out=torch.zeros_like(x[:, :1]).expand(x.shape))
    return apply_rotary(x[:1, :4, :2], table, out=table[0].view(-1)[:512].view(1, 4, 2, 64))


def qk_into(x, table, kind):
    q, k = x[:, :8], x[:, 8:]
    if kind == "norm":
        return apply_qk_norm_rotary(q, k, None, None, table, out=(None, k))
    outs = {"one": (None, k), "overlapping": (q, x[:, 4:12])}[kind]
    return apply_rotary_qk(q, k, table, out=outs)


class Rotate(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        cos, sin = parts(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q, k):
        return apply_rotary_qk(q, k, RotaryTable(self.cos, self.sin))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_takes_sequences_of_any_length(strict, device):
    module = Rotate(device)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = {"q": {1: tokens}, "k": {1: tokens}}
    arguments = tuple(q_and_k(device))
    program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("rope_cupy" in target for target in targets)
    for length in (16, 7, 64):
        q, k = q_and_k(device, length)
        assert_same(program.module()(q, k), module(q, k))


class BehindText(torch.nn.Module):
    """Tokens of an image, whose positions begin behind those of a text."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, text, image):
        first = text.shape[1]
        return (
            apply_rotary(image, self.table, positions=first),
            apply_rotary(image, self.table, positions=1, seqlen_offsets=first),
            *join_qkv([Stream(*[text] * 3, self.table), Stream(*[image] * 3, self.table, first)]),
        )


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_position_may_be_a_length_that_changes(strict, device):
    module = BehindText(parts(device))
    dims = [torch.export.Dim(name, min=2, max=30) for name in ("text", "image")]
    given = [torch.randn(1, tokens, 4, 2 * PAIRS, device=device) for tokens in (5, 6)]
    shapes = tuple({1: dim} for dim in dims)
    program = torch.export.export(module, tuple(given), dynamic_shapes=shapes, strict=strict)
    for lengths in ((5, 6), (9, 3), (2, 30)):
        given = [torch.randn(1, tokens, 4, 2 * PAIRS, device=device) for tokens in lengths]
        for found, plain in zip(program.module()(*given), module(*given), strict=True):
            assert torch.equal(found, plain)


def test_another_thread_that_exports_changes_no_result(device, monkeypatch):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device, grad=True)
    wanted = new(q, k, table, None)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # which is of all threads
    results = new(q, k, RotaryTable(*table._source.arrays), None)
    assert_same(results, wanted)
    (results[0].sum() + results[1].sum()).backward()


def test_a_call_that_is_not_compiled_passes_the_operator_by(device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device, grad=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        new(q, k, table, None)
    assert not [event.key for event in profile.key_averages() if "rope_cupy" in event.key]


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_and_meta_tensors_give_shapes_and_strides(layout):
    def make(device):
        x = torch.empty(2, 4, 16, 64, device=device)
        return x.transpose(1, 2) if layout == "transposed" else x.view(2, 16, 4, 64)

    wanted = apply_rotary(make("cpu").zero_(), parts("cpu"))
    y = apply_rotary(make("meta"), parts("meta"))
    assert (y.device.type, y.shape, y.stride()) == ("meta", wanted.shape, wanted.stride())
    with FakeTensorMode():
        y = apply_rotary(make("cpu"), parts("cpu"))
    assert (type(y).__name__, y.shape, y.stride()) == ("FakeTensor", wanted.shape, wanted.stride())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "bsdh"}, "layout must name the axes"),
        ({"out_of_range": "clip"}, "out_of_range must be 'nan' or 'keep'"),
        ({"rotary_offset": 1}, "rotary_offset must be in"),
        ({"positions": 60}, "table must hold the positions 60 to 75"),
        (
            {"positions": torch.arange(16), "seqlen_offsets": 3},
            "seqlen_offsets must be None where positions are an array",
        ),
        (
            {"positions": torch.arange(16), "cu_seqlens": torch.arange(2)},
            "cu_seqlens must be None where positions are an array",
        ),
        ({"cu_seqlens": 5}, "cu_seqlens must be None or an int32 or int64 array"),
    ],
)
def test_a_mistake_is_told_when_it_is_compiled_or_when_it_runs(options, message, device):
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device)
    compiled = torch.compile(
        lambda q, k: apply_rotary_qk(q, k, table, **options), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=message):
        compiled(q, k)


TAKEN = {  # what plain calls take, given as arguments
    "an int of NumPy": {"positions": np.int64(3)},
    "offsets by an int of NumPy": {"positions": 2, "seqlen_offsets": np.int32(3)},
    "two ints of NumPy": {"positions": np.int64(2), "seqlen_offsets": np.int64(3)},
    "positions of NumPy": {"positions": np.arange(16)[::-1].copy()},
    "positions of NumPy, 32 bits": {"positions": np.arange(32, dtype=np.int32).reshape(2, 16)},
    "offsets of NumPy": {"seqlen_offsets": np.array([3, 8])},
    "an int past the table with an array": {
        "positions": 2**63 - 1,
        "seqlen_offsets": torch.tensor([2**63 - 1] * 2),
    },
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_a_plain_call_takes_is_taken_by_a_graph(name):
    table, (q, k) = RotaryTable(*parts("cpu")), q_and_k("cpu")
    compiled = torch.compile(apply_rotary_qk, fullgraph=True, backend="aot_eager")
    wanted = apply_rotary_qk(q, k, table, **TAKEN[name])
    for result, exact in zip(compiled(q, k, table, **TAKEN[name]), wanted, strict=True):
        assert torch.equal(result.view(torch.int32), exact.view(torch.int32))


def test_a_position_past_64_bits_is_refused_by_a_graph():
    table, (q, k) = RotaryTable(*parts("cpu")), q_and_k("cpu")
    compiled = torch.compile(apply_rotary_qk, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="positions must fit 64 bits"):
        compiled(q, k, table, positions=2**63)


def test_a_table_and_other_arrays_of_numpy_are_in_the_graph():
    q, k = q_and_k("cpu")
    table = RotaryTable(*(part.numpy() for part in parts("cpu")))
    weight = torch.rand(2 * PAIRS).numpy()
    compiled = torch.compile(apply_qk_norm_rotary, fullgraph=True, backend="aot_eager")
    wanted = apply_qk_norm_rotary(q, k, weight, weight, table)
    assert_same(compiled(q, k, weight, weight, table), wanted)


REFUSED = {  # a function and what it is given; all of them write nothing
    "a flag as a position": (apply_rotary, {"positions": True}),
    "a fraction as a position": (apply_rotary, {"positions": 1.5}),
    "a position below 0": (apply_rotary, {"positions": -1}),
    "a sum past 64 bits": (apply_rotary, {"positions": 2**62, "seqlen_offsets": 2**62}),
    "positions without axes": (apply_rotary, {"positions": torch.tensor(3)}),
    "positions past the table": (apply_rotary, {"positions": np.int64(60)}),
    "positions of another length": (apply_rotary, {"positions": torch.arange(15)}),
    "positions of 8 bits": (apply_rotary, {"positions": torch.arange(16, dtype=torch.int8)}),
    "1 as interleaved": (apply_rotary, {"interleaved": 1}),
    "1 as conjugate": (apply_rotary, {"conjugate": 1}),
    "a flag as head_dim": (apply_rotary, {"head_dim": True}),
    "a flag as rotary_offset": (apply_rotary, {"rotary_offset": True}),
    "a flag as eps": (norm_rotary, {"eps": True}),
    "1 as round_norm": (norm_rotary, {"round_norm": 1}),
    "a word as round_norm": (norm_rotary, {"round_norm": "True"}),
    "an eps below 0": (norm_rotary, {"eps": -1.0}),
    "a flag as num_kv_heads": (qkv_rotary, {"num_heads": 2, "num_kv_heads": True}),
    "heads of no number": (qkv_rotary, {"num_heads": 3, "num_kv_heads": 1}),
    "an out of another dtype": (into, {"kind": "double"}),
    "an out that overlaps": (into, {"kind": "shifted"}),
    "an out that overlaps itself": (into, {"kind": "repeated"}),
    "an out in the table": (into, {"kind": "table"}),
    "one out of two": (qk_into, {"kind": "one"}),
    "outs that overlap": (qk_into, {"kind": "overlapping"}),
    "no out of two of a norm": (qk_into, {"kind": "norm"}),
}


def refused_by(call, x, table, options):
    with pytest.raises(Exception, match=r" must ") as error:
        call(x, table, **options)
    return str(error.value)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_plain_call_refuses_is_refused_by_a_graph(name, fullgraph):
    function, options = REFUSED[name]
    cos, sin = parts("cpu")
    x, table = torch.randn(2, 16, 4, 2 * PAIRS), (cos, sin)
    before = x.clone(), cos.clone()
    message = refused_by(function, x, table, options)
    compiled = torch.compile(function, fullgraph=fullgraph, backend="aot_eager")
    found = refused_by(compiled, x, table, options)
    argument = message.partition(" must ")[0]
    assert f"{argument} must " in found
    assert torch.equal(x, before[0]) and torch.equal(cos, before[1])


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize(
    "name", [name for name in REFUSED if "without axes" not in name and "NumPy" not in name]
)
def test_tensors_without_memory_are_checked_like_others(name, kind):
    function, options = REFUSED[name]
    message = refused_by(function, torch.randn(2, 16, 4, 2 * PAIRS), parts("cpu"), options)
    with FakeTensorMode() if kind == "fake" else nullcontext() as mode:
        device = "meta" if kind == "meta" else "cpu"
        like = (lambda x: x.to("meta")) if kind == "meta" else mode.from_tensor
        x = torch.empty(2, 16, 4, 2 * PAIRS, device=device)
        table = tuple(torch.empty(64, PAIRS, device=device) for _ in "cs")
        given = {
            key: like(each) if isinstance(each, torch.Tensor) else each
            for key, each in options.items()
        }
        found = refused_by(function, x, table, given)
    assert found.partition(" must ")[0] == message.partition(" must ")[0]
    assert found.rpartition("got ")[2] == message.rpartition("got ")[2]


def test_tensors_without_memory_must_fit_each_other():
    x, (cos, sin) = torch.empty(1, 40, 2, 2 * PAIRS, device="meta"), parts("meta")
    for table, message in (
        ((cos[:8], sin[:8]), "table must hold the positions 0 to 39"),
        ((cos, sin[:8]), "sin must have cos's shape"),
        ((cos.int(), sin.int()), "cos must have one of the dtypes"),
        ((cos.repeat(1, 2), sin.repeat(1, 2)), "table must have a rotary_dim in"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            apply_rotary(x, table)
    with pytest.raises(ValueError, match="positions must be on x's device meta, got cpu"):
        apply_rotary(x, (cos, sin), positions=torch.arange(40))
    with pytest.raises(ValueError, match="x must be on the CPU or on a CUDA device, got meta"):
        apply_rotary(x, parts("cpu"))


@pytest.mark.parametrize("trace", ["fx", "jit"])
def test_a_trace_that_records_no_launch_is_refused(trace):
    table, x = parts("cpu"), torch.randn(2, 16, 4, 2 * PAIRS)

    def call(x):
        return apply_rotary(x, table)

    for _ in range(3):  # the third has been seen before
        call(x)
        with pytest.raises(TypeError, match="x must "), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, which means to give this up
            torch.fx.symbolic_trace(call) if trace == "fx" else torch.jit.trace(call, x)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused_by_name(layout):
    table, x = parts("cpu"), torch.randn(16, 4, 2 * PAIRS)
    nested = torch.nested.nested_tensor([x, x], layout=layout)
    with pytest.raises(TypeError, match="x must be a strided tensor, got layout nested"):
        apply_rotary(nested, table)
    with pytest.raises(TypeError, match="table must be a strided tensor, got layout nested"):
        apply_rotary(x, (nested, nested))
    with pytest.raises(TypeError, match="positions must be a strided tensor, got layout nested"):
        apply_rotary(x, table, positions=nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_may_lie_where_a_known_one_did():
    """PyTorch's guards, asked whether it is that one, would end the process."""
    table, x = parts("cpu"), torch.randn(16, 4, 2 * PAIRS)
    positions = torch.arange(16)
    for _ in range(3):  # the third has been seen before
        apply_rotary(x, table, positions=positions, out=x)

    def nested(like):
        sizes = torch.tensor([[like.numel() // 2], [like.numel() // 2]])
        at = torch.tensor([0, like.numel() // 2])
        return torch._nested_view_from_buffer(like.flatten(), sizes, torch.ones_like(sizes), at)

    odd = nested(x)
    assert odd.data_ptr() == x.data_ptr()
    with pytest.raises(TypeError, match="x must be a strided tensor, got layout nested"):
        apply_rotary(odd, table, positions=positions, out=odd)
    with pytest.raises(TypeError, match="positions must be a strided tensor, got layout nested"):
        apply_rotary(x, table, positions=nested(positions), out=x)


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "vmap": torch.func.vmap,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_functions_is_refused_by_a_graph(name):
    table, x = parts("cpu"), torch.randn(2, 16, 4, 2 * PAIRS)
    call = TRANSFORMS[name](
        lambda x: apply_rotary(x, table, layout="shd" if name == "vmap" else None).sum()
    )
    compiled = torch.compile(call, backend="aot_eager")
    for each in (call, compiled):
        with pytest.raises(Exception, match=r"must not come from a transform of torch\.func"):
            each(x)


IMPORTED_TWICE = """
import importlib, sys, torch, rope_cupy, rope_cupy.torch
angles = torch.rand(8, 16)
x, table = torch.randn(2, 8, 4, 32, requires_grad=True), (angles.cos(), angles.sin())
before = torch.compile(rope_cupy.apply_rotary, backend="aot_eager", fullgraph=True)
def check(rope_cupy, compiled):
    wanted = rope_cupy.apply_rotary(torch.ones_like(x), table, conjugate=True)
    for call in (rope_cupy.apply_rotary, *compiled):
        y = call(x, table)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, rope_cupy.apply_rotary(x.detach(), table))
        assert torch.equal(grad, wanted)
check(rope_cupy, [before])
for _ in range(2):
    importlib.reload(rope_cupy.torch)
    check(rope_cupy, [before])
for name in [name for name in sys.modules if name.partition(".")[0] == "rope_cupy"]:
    del sys.modules[name]
import rope_cupy.torch as again
assert again is not rope_cupy
import rope_cupy
after = torch.compile(rope_cupy.apply_rotary, backend="aot_eager", fullgraph=True)
check(rope_cupy, [before, after])
"""


def test_what_is_imported_again_records_and_compiles_as_before():
    run_alone(IMPORTED_TWICE)


OTHER_VERSION = """
import torch
torch.library.define("rope_cupy::rotate", "(Tensor x, Tensor[] table) -> Tensor")
try:
    import rope_cupy.torch
except ImportError as error:
    assert "new process" in str(error), error
else:
    raise AssertionError("another version's operator would have been called")
"""


def test_operators_of_another_version_are_no_operators_of_this_one():
    run_alone(OTHER_VERSION)


ONE_AND_TWO = """
import torch, rope_cupy, rope_cupy.torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        angles = torch.rand(64, 8)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
    def forward(self, q, k):
        table, weight = (self.cos, self.sin), self.cos[0].repeat(2)
        x = rope_cupy.apply_rotary(q, table, positions=2)
        q, k = rope_cupy.apply_qk_norm_rotary(q, k, weight, weight, table)
        y = q * 2
        rope_cupy.apply_rotary(y, table, out=y)
        cache = torch.zeros(2, 200, 2, 16)
        slots = torch.arange(k.shape[1])
        rope_cupy.apply_rotary_kv_cache(q, k, k, cache[0], cache[1], table, slot_mapping=slots)
        return x, q, k, y, cache
model = Model()
def inputs(tokens):
    return torch.randn(1, tokens, 4, 16), torch.randn(1, tokens, 2, 16)
def check(compiled):
    for tokens in (41, 17):
        given = inputs(tokens)
        for found, wanted in zip(compiled(*given), model(*given), strict=True):
            torch.testing.assert_close(found, wanted)
"""
CPP_WRAPPER = """
check(torch.compile(model, options={"cpp_wrapper": True}, fullgraph=True, dynamic=True))
"""
AOT_INDUCTOR = """
import sys, torch._inductor.config
torch._inductor.config.aot_inductor.precompile_headers = False  # for one model it takes longer
tokens = torch.export.Dim("tokens", min=2, max=60)
program = torch.export.export(model, inputs(41), dynamic_shapes=({1: tokens}, {1: tokens}))
path = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
check(torch._inductor.aoti_load_package(path))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("code", [CPP_WRAPPER, AOT_INDUCTOR], ids=["wrapper", "AOTInductor"])
def test_graphs_in_cpp_call_the_operators(code, tmp_path):
    run_alone(ONE_AND_TWO + code, str(tmp_path / "model.pt2"))


LOADS = """
import sys, torch, rope_cupy.torch
program = torch.export.load(sys.argv[1] + ".pt2")
q, k, *wanted = torch.load(sys.argv[1] + ".pt")
for found, exact in zip(program.module()(q, k), wanted, strict=True):
    assert torch.equal(found, exact)
"""


def test_an_exported_program_is_loaded_where_the_operators_are_imported(tmp_path):
    q, k = q_and_k("cpu")
    module, path = Rotate("cpu"), str(tmp_path / "program")
    torch.export.save(torch.export.export(module, (q, k)), path + ".pt2")
    torch.save([q, k, *module(q, k)], path + ".pt")
    run_alone(LOADS, path)


def run_alone(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_that_requires_a_gradient_is_refused_by_a_trace(device):
    (cos, sin), (q, k) = parts(device), q_and_k(device)
    cos.requires_grad_()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="table must not require a gradient"):
        compiled(q, k, (cos, sin), None)


def test_make_fx_records_the_operator(device):
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    table, (q, k) = RotaryTable(*parts(device)), q_and_k(device)
    graph = make_fx(lambda q, k: apply_rotary_qk(q, k, table))(q, k)
    assert "rope_cupy.rotate_qk_new" in graph.code
    assert_same(graph(q, k), apply_rotary_qk(q, k, table))
