"""Calls of every kind under torch.compile, with lengths that change, against plain calls."""

import numpy as np
import pytest
import torch
from arrays import EPS, WEIGHT_OFFSET, Call, known, sample
from functorch.compile import make_boxed_func
from reference import to_bits
from test_compile import in_a_process
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch.nn import Parameter

import rope_cupy
from rope_cupy import apply_rotary, apply_rotary_kv_cache, apply_rotary_qk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


class Arrays:
    """What a call is made of, with the weights of a norm as parameters."""

    def __init__(self, case, shared=False):
        self.call = call = Call(case)
        self.xs = tuple(held.array for held in call.inputs)
        self.outs = ()
        if case.write == "in place":
            self.outs = self.xs
        elif case.write != "new":
            held = call.hold_heads(case.library, [known("packed", case.library, True)] * 2)
            self.outs = tuple(each.array for each in held)
        weights = [held.array for held in call.weights]
        biases = [held.array for held in call.biases]
        if shared and len(weights) == 2 and weights[0].shape == weights[1].shape:
            weights = weights[:1] * 2  # one of q and k
        parameters = {id(each): Parameter(each, not self.outs) for each in weights + biases}
        self.weights = tuple(parameters[id(weight)] for weight in weights)
        self.biases = tuple(parameters[id(bias)] for bias in biases)

    def function(self):
        """The call as a function of arrays alone."""
        case, call, two = self.call.case, self.call, len(self.xs) == 2
        options = call.options | {"head_dim": call.split}
        options["layout"] = None if call.layout_is_plain(self.xs) else call.axes
        names = ["rotary_qk" if two else "rotary", "qk_norm_rotary" if two else "norm_rotary"]
        function = getattr(rope_cupy, f"apply_{names[case.norm != 'none']}")
        if case.norm != "none":
            options |= {"norm": case.norm, "eps": EPS, "weight_offset": WEIGHT_OFFSET}
            options |= {"round_norm": case.round_norm, "norm_after": case.norm_after}
        bias_names = ("q_bias", "k_bias") if two else ("bias",)

        def rotated(xs, weights, biases, table, where, outs):
            if case.norm != "none":
                weights = weights or (None,) * len(xs)
            out = None
            if outs:
                out = outs if two else outs[0]
            named = where | dict(zip(bias_names, biases, strict=False))
            result = function(*xs, *weights, table, out=out, **named, **options)
            return result if two else (result,)

        return rotated

    def bits(self, function):
        """What results, and what then lies in and around the arrays that were given."""
        of_norm, given = (self.weights, self.biases), (self.call.table, self.call.where)
        results = function(self.xs, *of_norm, *given, self.outs)
        around = [held._buffer for held in self.call.inputs]
        return [to_bits(each.detach()) for each in (*results, *self.outs, *around)]


def lengths_of(case):
    batch, tokens, *heads = case.sizes
    return [case._replace(sizes=(batch, tokens + more, *heads)) for more in (1, 4, 9)]


def compare(drawn, backend):
    for i, case in enumerate(drawn):
        torch.compiler.reset()
        function = Arrays(case).function()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for each in lengths_of(case):
            wanted = Arrays(each, shared=i % 2).bits(function)
            found = Arrays(each, shared=i % 2).bits(compiled)
            for actual, exact in zip(found, wanted, strict=True):
                assert actual.shape == exact.shape and (actual == exact).all(), (each, backend)


def calls(count, seed, **options):
    """Calls on tensors, in order of no kernel, so that a few are of many kinds."""
    drawn = sample(count, seed, **{"library": ["torch"], "table_library": ["same"]} | options)
    return [drawn[i] for i in np.random.default_rng(seed).permutation(len(drawn))]


@pytest.mark.parametrize("seed", range(3))
def test_a_compiled_call_of_any_kind_gives_the_bits_of_a_plain_one(seed):
    compare(calls(6, seed), "aot_eager")


NORMED = {"norm": ["head", "heads", "layer"], "norm_after": [False, True]}
NORMED |= {"weights": ["float32", "float64"], "write": ["new"]}
NORMED |= {"dtype": ["float32", "float64"], "style": ["dense", "packed"], "k_style": ["swapped"]}


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_gradients_of_parameters_are_those_of_plain_calls(shared):
    sizes = [(2, 5, 3, 3), (1, 7, 2, 2)]
    for case in calls(3, 3, sizes=sizes, outside=["inside"], **NORMED):
        torch.compiler.reset()
        function = Arrays(case).function()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for each in lengths_of(case):
            found = []
            for call in (function, compiled):
                arrays = Arrays(each, shared)
                xs = [x.detach().requires_grad_() for x in arrays.xs]
                assert len({*arrays.weights}) == 1 or not shared
                given = arrays.weights, arrays.biases, arrays.call.table, arrays.call.where, ()
                results = call(tuple(xs), *given)
                grads = [result.detach().cos() for result in results]
                asking = [*xs, *dict.fromkeys(arrays.weights + arrays.biases)]
                found.append((*results, *torch.autograd.grad(results, asking, grads)))
            for plain, graphed in zip(*found, strict=True):
                torch.testing.assert_close(graphed, plain, equal_nan=True)


# Written in place: views whose place in memory depends on a length.


def table_of(tokens, device):
    angles = torch.rand(tokens, 8, device=device) * 6
    return angles.cos(), angles.sin()


def one_of_three(buffer, table, _):
    k = buffer[:, 1]
    apply_rotary(k, table, out=k)
    return buffer


def a_layer(buffer, table, layer):
    k = buffer[layer]
    apply_rotary(k, table, out=k)
    return buffer, k


def all_of_one_unbind(buffer, table, _):
    q, k, _ = buffer.unbind(1)
    apply_rotary_qk(q, k, table, out=(q, k))
    return buffer, q


def of_a_new_buffer(buffer, table, _):
    buffer = buffer * 2
    q, k, _ = buffer.unbind(1)
    apply_rotary_qk(q, k, table, out=(q, k))
    return buffer + 1, q


def of_another(buffer, table, _):
    apply_rotary(buffer[:, 0] * 3, table, out=buffer[:, 2])
    return buffer


def caches_of_one_buffer(buffer, table, _):
    q, k, v = buffer[:1].unbind(1)
    slots = torch.arange(k.shape[1], device=buffer.device)
    caches = buffer.new_zeros(2, *k.shape[1:])
    apply_rotary_kv_cache(q, k, v, *caches, table, slot_mapping=slots, out=q)
    return buffer, caches


def caches_beside_k(buffer, table, _):
    q, k, v = buffer[:1].unbind(1)
    caches, new = buffer.new_zeros(2, *k.shape[1:]), torch.empty_like(k)
    slots = torch.arange(k.shape[1], device=buffer.device) - 3
    given = *caches, table
    apply_rotary_kv_cache(q, k, v, *given, slot_mapping=slots, k_out=new)
    apply_rotary_kv_cache(q, k, v, *given, slot_mapping=slots.flip(0), out=q, k_out=k)
    return buffer, caches, new


def caches_that_are_given(buffer, table, caches):
    q, k, v = (each * 1 for each in buffer[:1].unbind(1))
    slots = torch.arange(k.shape[1], device=buffer.device)
    apply_rotary_kv_cache(q, k, v, caches[0], caches[1], table, slot_mapping=slots)
    return caches


def slices_of_new_tensors(buffer, table, _):
    q, k, v = buffer.unbind(1)
    tokens = q.shape[1]
    joint = tuple([q.new_empty(3, 2 * tokens, *q.shape[2:]) for _ in range(2)])
    apply_rotary_qk(q, k, table, out=(joint[0][:, :tokens], joint[1][:, :tokens]))
    apply_rotary_qk(k, v, table, out=(joint[0][:, tokens:], joint[1][:, tokens:]))
    return joint


def a_slice_that_is_given(buffer, table, last):
    rows = last.shape[1] - buffer.shape[2]
    x, table = buffer[0, :2, :rows], tuple(part[:rows] for part in table)
    apply_rotary(x, table, out=last[:, -rows:])
    return last


def slices_of_one_tensor(buffer, table, last):
    rows = last.shape[1] - buffer.shape[2]
    x, table = buffer[0, :1, :rows], tuple(part[:rows] for part in table)
    apply_rotary_qk(x, x, table, out=(last[:1, -rows:], last[1:, -rows:]))
    return last


VIEWS = [
    *(one_of_three, a_layer, all_of_one_unbind, of_a_new_buffer, of_another),
    *(caches_of_one_buffer, caches_beside_k, caches_that_are_given),
    *(slices_of_new_tensors, a_slice_that_is_given, slices_of_one_tensor),
]


def compare_views(backend, device, *functions):
    for function in functions or VIEWS:
        torch.compiler.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        for i, tokens in enumerate((40, 41, 43)):
            table, outcomes = table_of(tokens, device), []
            buffer = torch.randn(3, 3, tokens, 4, 16, device=device)
            for call in (function, compiled):
                mine = buffer.clone()
                last = torch.zeros(2, tokens + 9, 4, 16, device=device)
                result = call(mine, table, i if function is a_layer else last)
                outcomes.append((mine, last, *(result if isinstance(result, tuple) else (result,))))
            for plain, graphed in zip(*outcomes, strict=True):
                assert torch.equal(graphed, plain), (function.__name__, tokens)


@pytest.mark.parametrize("function", VIEWS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_view_whose_offset_changes_with_a_length_is_written_where_it_lies(function, device):
    compare_views("aot_eager", device, function)


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_gives_the_bits_of_plain_calls_and_writes_views_where_they_lie(device):
    functions = "one_of_three", "all_of_one_unbind", "caches_of_one_buffer", "caches_beside_k"
    functions += ("slices_of_one_tensor",)
    names = ", ".join([f"own.{name}" for name in functions])
    calls = ["import test_compile_calls as own"]
    calls += ["own.compare(own.calls(3, 7), 'inductor')"] if device == "cpu" else []
    calls += [f"own.compare_views('inductor', {device!r}, {names})"]
    calls += [f"own.check_slices({device!r})"]
    in_a_process("; ".join(calls))


def check_slices(device):
    """Slices whose places change are written by inductor's code without a tensor between."""
    for function, num_new in ((slices_of_new_tensors, 2), (a_slice_that_is_given, 0)):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True)
        for tokens in (40, 43):
            buffer = torch.randn(3, 3, tokens, 4, 16, device=device)
            table = table_of(tokens, device)
            last = [torch.zeros(2, tokens + 9, 4, 16, device=device) for _ in range(2)]
            result, codes = run_and_get_code(compiled, buffer, table, last[0])
            torch.testing.assert_close(result, function(buffer, table, last[1]), rtol=0, atol=0)
            for code in codes:  # none of the second call
                called = code[code.index("def call(") : code.index("def get_args(")]
                assert "write_into_places" in called
                assert called.count("empty_strided") == num_new and "fused" not in called, called


def the_whole(buffer, table, _):
    x = buffer[:, 0] * 2
    apply_rotary(x, table, out=x)
    return x


def an_input(buffer, table, _):
    apply_rotary(buffer, table, out=buffer)
    return buffer


def of_packed_heads(buffer, table, _):
    q, k = buffer[:, :, 0], buffer[:, :, 1]
    apply_rotary_qk(q, k, table, out=(q, k))
    return buffer


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (the_whole, (2, 3, -1, 4, 16)),
        (an_input, (2, -1, 4, 16)),
        (of_packed_heads, (2, -1, 3, 4, 16)),
    ],
)
def test_what_is_whole_or_stays_in_its_place_is_written_without_a_copy(function, shape):
    graphs = []

    def keep(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for tokens in (40, 41, 43):
        table = table_of(tokens, "cpu")
        buffer = torch.randn([tokens if size == -1 else size for size in shape])
        mine = buffer.clone()
        assert torch.equal(compiled(mine, table, None), function(buffer, table, None))
        assert torch.equal(mine, buffer)
    assert len(graphs) == 2  # the second has a length that changes
    for code in graphs:
        assert "write_into" in code and "empty_like" not in code and "rotate_new" not in code
