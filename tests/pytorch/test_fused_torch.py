"""PyTorch around the functions that do more than rotate: gradients, graphs, DTensors, models."""

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from arrays import NORM_ERROR
from blocks import CONFIGS, SIZES, model_of, tokens
from test_compile import in_a_process
from test_dtensor import distribute, in_processes
from test_gradients import options_on, parts, randn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import checkpoint

from rope_cupy import (
    RotaryTable,
    apply_norm_rotary,
    apply_qk_norm_rotary,
    apply_rotary_kv_cache,
    apply_rotary_qkv,
)
from rope_cupy.ways import graphs, operators

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, KV_HEADS = 2, 1


@pytest.fixture(params=DEVICES)
def device(request):
    torch.manual_seed(5)
    return request.param


# The definition, in PyTorch's plain operations, whose gradients are autograd's.


def normalised(x, weight, bias, call):
    """RMSNorm or LayerNorm of (..., heads, head_dim)."""
    axes = (-2, -1) if call.norm == "heads" else -1
    if call.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(axes, keepdim=True) + call.eps).sqrt()
    if weight is not None:
        y = y * (weight.view(-1, x.shape[-1]) + call.weight_offset)
    return y if bias is None else y + bias


def turned(x, cos, sin, interleaved, rotary_offset, conjugate):
    """(batch, tokens, heads, head_dim) turned by (tokens, pairs) or (batch, tokens, pairs)."""
    cos, sin = cos[..., None, :], -sin[..., None, :] if conjugate else sin[..., None, :]
    size = 2 * cos.shape[-1]
    before, slice_, after = x.split(
        (rotary_offset, size, x.shape[-1] - rotary_offset - size), dim=-1
    )
    a, b = slice_.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else slice_.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    slice_ = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([before, slice_, after], -1)


class Call(NamedTuple):
    """What a call is told."""

    norm: str | None = "head"
    norm_after: bool = False
    rotates: bool = True
    eps: float = 1e-6
    weight_offset: float = 0.0
    layout: str = "bshd"
    head_dim: int | None = None
    rotary_offset: int = 0
    interleaved: bool = False
    conjugate: bool = False
    positions: Any = None

    def options(self, device="cpu"):
        own = options_on(device, self._asdict())
        del own["rotates"]
        return {name: own[name] for name in own if own[name] != Call._field_defaults[name]} | {
            "layout": self.layout,
            "norm": self.norm,
        }


def exactly(call, xs, of_norm, table):
    """Each x, in the layout of the call, normalised and turned; weights come before biases."""
    weights, biases = of_norm[: len(xs)], (*of_norm[len(xs) :], None, None)
    cos, sin = (part[: xs[0].shape[call.layout.replace("t", "s").index("s")]] for part in table)
    if call.positions is not None:
        cos, sin = (part[torch.tensor(call.positions, device=part.device)] for part in table)
    layout = call.layout.replace("t", "s")
    layout = layout if "b" in layout else "b" + layout
    results = []
    for x, weight, bias in zip(xs, weights, biases, strict=False):
        y = x if call.head_dim is None else x.unflatten(-1, (-1, call.head_dim))
        y = y if y.ndim == 4 else y[None]
        y = y.permute([layout.index(axis) for axis in "bshd"])
        if call.norm and not call.norm_after:
            y = normalised(y, weight, bias, call)
        if call.rotates:
            y = turned(y, cos, sin, call.interleaved, call.rotary_offset, call.conjugate)
        if call.norm and call.norm_after:
            y = normalised(y, weight, bias, call)
        results.append(y.permute(["bshd".index(axis) for axis in layout]).reshape(x.shape))
    return results


def packed_exactly(call, qkv, weights, table):
    axis = -1 if call.head_dim else call.layout.index("h") - len(call.layout)
    sizes = [heads * (call.head_dim or 1) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = qkv.split(sizes, axis)
    return torch.cat([*exactly(call, (q, k), weights, table), v], axis)


# The functions, each from what may have a gradient, in a tuple, to a tuple of results.


def one(call, leaves, table):
    x, weight, *bias = leaves
    options = call.options(x.device) | ({"bias": bias[0]} if bias else {})
    return (apply_norm_rotary(x, weight, table if call.rotates else None, **options),)


def one_exactly(call, leaves, table):
    return exactly(call, leaves[:1], leaves[1:], table)


def two(call, leaves, table):
    options = call.options(leaves[0].device)
    options |= dict(zip(("q_bias", "k_bias"), leaves[4:], strict=False))
    return apply_qk_norm_rotary(*leaves[:4], table if call.rotates else None, **options)


def two_exactly(call, leaves, table):
    return exactly(call, leaves[:2], leaves[2:], table)


def packed(call, leaves, table):
    qkv, *of_norm = leaves
    names = "q_weight", "k_weight", "q_bias", "k_bias"
    weights = dict(zip(names, of_norm, strict=False))
    heads, table = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}, table if call.rotates else None
    return (apply_rotary_qkv(qkv, table, **heads, **weights, **call.options(qkv.device)),)


def packed_whole_exactly(call, leaves, table):
    return (packed_exactly(call, leaves[0], leaves[1:], table),)


class Function(NamedTuple):
    ours: Callable[..., Any]
    exact: Callable[..., Any]
    heads: tuple[int, ...]  # of each x
    normed: tuple[int, ...]  # heads of each weight


FUNCTIONS = {
    "one": Function(one, one_exactly, (HEADS,), (HEADS,)),
    "two": Function(two, two_exactly, (HEADS, KV_HEADS), (HEADS, KV_HEADS)),
    "packed": Function(packed, packed_whole_exactly, (HEADS + 2 * KV_HEADS,), (HEADS, KV_HEADS)),
}
of_each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)

CALLS = {  # and the size of a head
    "each head": (Call(), 6),
    "all heads": (Call("heads"), 6),
    "interleaved": (Call(interleaved=True), 6),
    "conjugate": (Call("heads", conjugate=True), 6),
    "another eps": (Call(eps=0.3), 6),
    "weights from one": (Call(weight_offset=1.0), 6),
    "weights of all heads from one": (Call("heads", weight_offset=1.0), 6),
    "heads first": (Call(layout="bhsd"), 6),
    "all heads, first": (Call("heads", layout="bhsd"), 6),
    "tokens first": (Call("heads", layout="sbhd"), 6),
    "packed sequences": (Call(layout="thd"), 6),
    "split": (Call(head_dim=6), 6),
    "split, all heads": (Call("heads", head_dim=6), 6),
    "a slice": (Call(rotary_offset=2), 9),
    "a slice of all heads": (Call("heads", rotary_offset=1, interleaved=True), 8),
    "positions": (Call(positions=[[6, 0, 3], [2, 2, 5]]), 6),
    "layer": (Call("layer", weight_offset=1.0), 6),
    "a slice of a layer": (Call("layer", rotary_offset=2, interleaved=True, layout="bhsd"), 9),
    "after": (Call(norm_after=True, conjugate=True, positions=[[6, 0, 3], [2, 2, 5]]), 6),
    "all heads, after": (Call("heads", norm_after=True, head_dim=6, weight_offset=1.0), 6),
    "a layer, after": (Call("layer", norm_after=True, rotary_offset=1, eps=0.3), 8),
    "no table": (Call(rotates=False, weight_offset=1.0), 5),
    "no table for all heads": (Call("heads", rotates=False, layout="sbhd"), 6),
    "no table for a layer": (Call("layer", norm_after=True, rotates=False, head_dim=7), 7),
}
TOKENS, PAIRS = 3, 3


def table_of(device, dtype=torch.float64, positions=TOKENS + 4, pairs=PAIRS):
    return parts(positions, pairs, device=device, dtype=dtype)


def shape_of(call, heads, size):
    sizes = {"b": 2, "s": TOKENS, "t": TOKENS, "h": heads, "d": size}
    shape = [sizes[axis] for axis in call.layout]
    return shape if call.head_dim is None else [*shape[:-2], heads * size]


def leaves_of(function, call, size, device, dtype=torch.float64, weight_dtype=None):
    """Inputs, weights and biases, all of which require a gradient."""
    of_token = call.norm == "heads"
    xs = [
        randn(*shape_of(call, heads, size), device=device, dtype=dtype) for heads in function.heads
    ]
    return *xs, *(
        randn(heads * size if of_token else size, device=device, dtype=weight_dtype or dtype)
        for heads in function.normed * (2 if call.norm == "layer" else 1)
    )


def gradients_of(function, call, leaves, table, grads):
    """Results, and the gradients of what asks for one."""
    results = function(call, leaves, table)
    asking = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return *results, *torch.autograd.grad(results, asking, grads)


@of_each_function
@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_plain_operations(name, function, device):
    call, size = CALLS[name]
    leaves, table = leaves_of(function, call, size, device), table_of(device)
    grads = [torch.randn_like(x) for x in leaves[: len(function.heads)]]
    wanted = gradients_of(function.exact, call, leaves, table, grads)
    found = gradients_of(function.ours, call, leaves, table, grads)
    for ours, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


@of_each_function
@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_of_inputs_and_weights_are_right(name, function, device):
    call, size = CALLS[name]
    leaves, table = leaves_of(function, call, size, device), table_of(device)

    def results(*leaves):
        return function.ours(call, leaves, table)

    assert gradcheck(results, leaves, fast_mode=True)  # along random directions
    assert gradgradcheck(results, leaves, fast_mode=True)


@of_each_function
@pytest.mark.parametrize("norm", ["head", "heads", "layer"])
def test_a_weight_that_is_not_given_is_one_and_a_bias_is_zero(norm, function, device):
    call, table = Call(norm), table_of(device)
    leaves = leaves_of(function, call, 6, device)
    num = len(function.heads)
    for there in [(False,) * 4, (True, False, False, True), (False, True, True, False)]:
        given = [w if t else None for w, t in zip(leaves[num:], there, strict=False)]
        some = *leaves[:num], *given
        grads = [torch.randn_like(x) for x in leaves[:num]]
        wanted = gradients_of(function.exact, call, some, table, grads)
        found = gradients_of(function.ours, call, some, table, grads)
        for ours, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-11)


def test_a_packed_projection_without_a_norm_has_its_gradient_in_place_too(device):
    call, table = Call(None), table_of(device)
    qkv, grad = (randn(2, TOKENS, HEADS + 2 * KV_HEADS, 6, device=device) for _ in range(2))

    def in_place(x):
        y = 3 * x
        heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
        return apply_rotary_qkv(y, table, **heads, out=y)

    assert gradcheck(in_place, qkv) and gradgradcheck(in_place, qkv)
    wanted = packed_exactly(call, 3 * qkv, (None, None), table)
    torch.testing.assert_close(in_place(qkv), wanted, rtol=1e-10, atol=1e-11)
    (found,) = torch.autograd.grad(in_place(qkv), qkv, grad)
    (exact,) = torch.autograd.grad(wanted, qkv, grad)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-11)


TOLERANCES = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-21}
KINDS = [  # of q, and of weights
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
]


@of_each_function
@pytest.mark.parametrize(("dtype", "weight_dtype"), KINDS, ids=str)
@pytest.mark.parametrize(
    "call",
    [Call(), Call("heads", weight_offset=1.0), Call("layer"), Call(norm_after=True)],
    ids=["head", "heads", "layer", "after"],
)
def test_gradients_have_their_inputs_dtype_and_are_those_of_float64(
    call, dtype, weight_dtype, function, device
):
    leaves = leaves_of(function, call, 64, device, dtype, weight_dtype)
    table = table_of(device, torch.float32, pairs=32)
    grads = [torch.randn_like(x) for x in leaves[: len(function.heads)]]
    found = gradients_of(function.ours, call, leaves, table, grads)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients_of(
        *(function.exact, call, doubles, [part.double() for part in table]),
        [grad.double() for grad in grads],
    )
    dtypes = [*(x.dtype for x in leaves[: len(function.heads)]), *(x.dtype for x in leaves)]
    assert [each.dtype for each in found] == dtypes
    for ours, wanted in zip(found, exact, strict=True):
        error = (ours.double() - wanted).norm() / wanted.norm()
        assert error <= max(TOLERANCES[dtype], TOLERANCES.get(ours.dtype, 0)), error


@of_each_function
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_only_the_gradients_that_are_asked_for_are_made(which, function, device):
    call, table = Call(), table_of(device)
    leaves = leaves_of(function, call, 6, device)
    if which >= len(leaves):
        pytest.skip("has not as many inputs")
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)
    results = function.ours(call, leaves, table)
    with_grad = [result.requires_grad for result in results]
    # q and its weight change the first of two results only, k and its weight the second.
    assert with_grad == ([which % 2 == i for i in (0, 1)] if function.ours is two else [True])
    sum(result.square().sum() for result in results if result.requires_grad).backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == which for i in range(len(leaves))]
    doubles = [leaf.detach().clone().requires_grad_(i == which) for i, leaf in enumerate(leaves)]
    sum(result.square().sum() for result in function.exact(call, doubles, table)).backward()
    torch.testing.assert_close(leaves[which].grad, doubles[which].grad, rtol=1e-10, atol=1e-11)


def test_a_result_that_is_not_used_has_no_gradient(device):
    call, table = Call(), table_of(device)
    q, k, q_weight, k_weight = leaves_of(FUNCTIONS["two"], call, 6, device)
    two(call, (q, k, q_weight, k_weight), table)[1].sum().backward()
    assert q.grad is None and q_weight.grad is None
    assert k.grad is not None and k_weight.grad is not None
    wanted = two_exactly(call, (q, k, q_weight, k_weight), table)[1].sum()
    for leaf, exact in zip((k, k_weight), torch.autograd.grad(wanted, (k, k_weight)), strict=True):
        torch.testing.assert_close(leaf.grad, exact, rtol=1e-10, atol=1e-11)


@of_each_function
def test_a_graph_that_is_kept_gives_its_gradients_again(function, device):
    call, table = Call("heads"), table_of(device)
    leaves = leaves_of(function, call, 6, device)
    loss = sum(result.sin().sum() for result in function.ours(call, leaves, table))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for again, before in zip(second, first, strict=True):
        torch.testing.assert_close(again, before)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, leaves)


@of_each_function
def test_a_checkpoint_recomputes_it(function, device):
    leaves, table = leaves_of(function, Call(), 6, device), table_of(device)

    def loss(*leaves):
        return sum(result.sin().sum() for result in function.ours(Call(), leaves, table))

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
    for found, exact in zip(again, wanted, strict=True):
        torch.testing.assert_close(found, exact)


@of_each_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_result_and_no_gradient(dtype, function, device):
    leaves = leaves_of(function, Call(), 64, device, dtype, torch.float32)
    table = table_of(device, torch.float32, pairs=32)
    grads = [torch.randn_like(x) for x in leaves[: len(function.heads)]]
    wanted = gradients_of(function.ours, Call(), leaves, table, grads)
    with torch.autocast(device, torch.bfloat16):
        found = gradients_of(function.ours, Call(), leaves, table, grads)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == exact.dtype
        assert (ours.double() - exact).norm() <= TOLERANCES[dtype] * exact.double().norm()


@pytest.mark.parametrize("what", ["x", "weight", "cos", "positions"])
def test_what_changes_before_the_backward_pass_is_an_error(what, device):
    cos, sin = table_of(device)
    positions = torch.arange(TOKENS, device=device)
    x, weight = leaves_of(FUNCTIONS["one"], Call(), 6, device)
    saved = {"x": 1 * x, "weight": 1 * weight, "cos": cos, "positions": positions}
    y = apply_norm_rotary(saved["x"], saved["weight"], (cos, sin), positions=positions)
    with torch.no_grad():
        saved[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@of_each_function
@pytest.mark.parametrize("asking", ["all", "weights", "inputs"])
def test_in_place_a_gradient_of_a_norm_is_refused_and_nothing_is_written(asking, function, device):
    num, table = len(function.heads), table_of(device)
    leaves = leaves_of(function, Call(), 6, device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(asking == "all" or (i >= num) == (asking == "weights"))
    xs = [1 * x for x in leaves[:num]]
    before, versions = [x.detach().clone() for x in xs], [x._version for x in xs]
    calls = {
        one: lambda: apply_norm_rotary(*xs, *leaves[num:], table, out=xs[0]),
        two: lambda: apply_qk_norm_rotary(*xs, *leaves[num:], table, out=(*xs,)),
        packed: lambda: apply_rotary_qkv(
            *xs,
            table,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            q_weight=leaves[num],
            k_weight=leaves[num + 1],
            out=xs[0],
        ),
    }
    with pytest.raises(ValueError, match="out must be None when the norm needs gradients"):
        calls[function.ours]()
    assert all(map(torch.equal, xs, before)) and [x._version for x in xs] == versions
    with torch.no_grad():
        calls[function.ours]()
    assert not any(map(torch.equal, xs, before))


@of_each_function
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(mode, function, device):
    table, leaves = table_of(device), leaves_of(function, Call(), 6, device)
    wanted = function.exact(Call(), leaves, table)
    for _ in range(3):  # the third is guarded by what the second saw
        with mode():
            results = function.ours(Call(), leaves, table)
        for ours, exact in zip(results, wanted, strict=True):
            assert not ours.requires_grad
            torch.testing.assert_close(ours, exact.detach(), rtol=1e-10, atol=1e-11)
        assert all(y.requires_grad for y in function.ours(Call(), leaves, table))


def test_a_weight_must_be_a_tensor_where_a_gradient_is_recorded():
    (x, weight), table = leaves_of(FUNCTIONS["one"], Call(), 6, "cpu"), table_of("cpu")
    numbers = weight.detach().numpy()
    with pytest.raises(TypeError, match="weight must be a tensor where a gradient is recorded"):
        apply_norm_rotary(x, numbers, table)
    y = apply_norm_rotary(x.detach(), numbers, table)
    assert torch.equal(y, apply_norm_rotary(x, weight, table))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@of_each_function
def test_transforms_of_functions_and_tangents_are_refused(function):
    leaves, table = leaves_of(function, Call(), 6, "cpu"), table_of("cpu")
    num, plain = len(function.heads), [leaf.detach() for leaf in leaves]

    def call(*leaves):
        return function.ours(Call(), leaves, table)

    def total(*leaves):
        return call(*leaves)[0].sum()

    axes = (0,) * num + (None,) * (len(leaves) - num)
    refused = pytest.raises(TypeError, match=r"must not come from a transform of torch\.func")
    with refused:
        torch.func.vmap(call, in_dims=axes)(*plain)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with refused:
            transform(total)(*plain)
    with refused:
        torch.func.vjp(call, *plain)
    with refused:
        torch.func.jvp(total, (*plain,), (*plain,))
    results = call(*leaves)
    batches = [torch.ones(2, *result.shape, dtype=result.dtype) for result in results]
    with refused:
        torch.autograd.grad(results, leaves, batches, is_grads_batched=True)
    for i, leaf in enumerate(plain):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(ValueError, match="must not carry a forward-mode tangent"):
                call(*plain[:i], dual, *plain[i + 1 :])


# Caches.


@pytest.fixture
def nothing_compiled():
    torch.compiler.reset()


class Cached:
    """q, k, v and caches of a device, in slots that leave gaps."""

    def __init__(self, device):
        self.q, self.k, self.v = (torch.randn(2, 16, n, 64, device=device) for n in (4, 2, 2))
        self.caches = [torch.zeros(8, 16, 2, 64, device=device) for _ in "kv"]
        self.slots = torch.randperm(8 * 16, device=device)[:32].view(2, 16)
        self.weights = [torch.rand(64, device=device) + 0.5 for _ in "qk"]
        self.table = table_of(device, torch.float32, 64, 32)

    def call(self, **options):
        xs, how = (self.q, self.k, self.v), {"slot_mapping": self.slots} | options
        return apply_rotary_kv_cache(*xs, *self.caches, self.table, **how)


@pytest.mark.parametrize("which", ["q", "k", "v", "q_weight", "cache"])
def test_a_gradient_is_refused_where_a_cache_is_written_and_the_cache_stays(which, device):
    cached = Cached(device)
    asking = {"q": cached.q, "k": cached.k, "v": cached.v, "q_weight": cached.weights[0]}
    weights = {"q_weight": cached.weights[0], "k_weight": cached.weights[1]}
    (cached.caches[0] if which == "cache" else asking[which]).requires_grad_()
    with pytest.raises(ValueError, match="must not require a gradient, which is not recorded"):
        cached.call(**weights)
    assert not any(cache.any() for cache in cached.caches)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                q = cached.call(**weights)
            assert not q.requires_grad
    assert all(cache.any() for cache in cached.caches)


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
@pytest.mark.parametrize("graph", [False, True])
def test_a_gradient_of_a_scale_is_refused_by_its_name(graph, scale, device, nothing_compiled):
    cached = Cached(device)
    cached.caches = [cache.to(torch.float8_e4m3fn) for cache in cached.caches]
    scales = {name: torch.ones(1, device=device) for name in ("k_scale", "v_scale")}
    scales[scale].requires_grad_()
    call = cached.call
    if graph:
        call = torch.compile(cached.call, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=f"{scale} must not require a gradient, which is not rec"):
        call(**scales)
    assert not any(cache.view(torch.uint8).any() for cache in cached.caches)
    with torch.no_grad():
        call(**scales)
    assert all(cache.view(torch.uint8).any() for cache in cached.caches)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_written_has_another_version(in_place, device):
    cached = Cached(device)
    for _ in range(3):
        written = [*cached.caches, *([cached.q] if in_place else [])]
        read = [cached.k, cached.v, cached.slots, *([] if in_place else [cached.q])]
        before = [[x._version for x in xs] for xs in (written, read)]
        cached.call(out=cached.q if in_place else None)
        assert all(x._version > old for x, old in zip(written, before[0], strict=True))
        assert [x._version for x in read] == before[1]


@of_each_function
def test_outputs_that_are_given_have_another_version(function, device):
    leaves, num = leaves_of(function, Call(), 6, device), len(function.heads)
    xs, weights = [x.detach() for x in leaves[:num]], [w.detach() for w in leaves[num:]]
    outs, table = [torch.zeros_like(x) for x in xs], table_of(device)
    for out in (outs, xs):
        for _ in range(3):
            before = [y._version for y in out]
            if function.ours is one:
                apply_norm_rotary(*xs, *weights, table, out=out[0])
            elif function.ours is two:
                apply_qk_norm_rotary(*xs, *weights, table, out=(*out,))
            else:
                heads = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
                apply_rotary_qkv(*xs, table, **heads, q_weight=weights[0], out=out[0])
            assert all(y._version > old for y, old in zip(out, before, strict=True))


def test_what_was_saved_for_another_gradient_must_not_be_overwritten_by_a_cache(device):
    cached = Cached(device)
    weight = torch.ones(2, device=device, requires_grad=True)
    loss = (weight[0] * cached.caches[1]).sum()
    cached.call()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Graphs that PyTorch traces.


class Traced(NamedTuple):
    """Tensors of a traced call, of which `tokens` may vary."""

    q: Any
    k: Any
    v: Any
    q_weight: Any
    k_weight: Any
    positions: Any
    slots: Any
    k_cache: Any
    v_cache: Any
    k_scale: Any


def traced_inputs(device, tokens=16, grad=False):
    def leaf(*shape):
        return torch.randn(*shape, device=device).requires_grad_(grad)

    return Traced(
        *(leaf(2, tokens, heads, 64) for heads in (4, 2, 2)),
        *(leaf(64), leaf(64)),
        torch.arange(tokens, device=device) * 3 % 64,
        torch.arange(2 * tokens, device=device).view(2, tokens).flip(1),
        *(torch.zeros(130, 2, 64, device=device) for _ in "kv"),
        torch.full((1,), 0.5, device=device),
    )


def norm_one(x, table):
    y = apply_norm_rotary(2 * x.q, x.q_weight, table, positions=x.positions)
    return (y.sin(),)


def norm_both(x, table):
    weights = x.q_weight, x.k_weight
    q, k = apply_qk_norm_rotary(x.q, x.k, *weights, table, norm="head", weight_offset=1.0)
    return 2 * q, k.sin()


def norm_tokens(x, table):
    q, k = apply_qk_norm_rotary(x.q, x.k, None, None, table, norm="heads", interleaved=True)
    return q + 1, k


def norm_layer(x, table):
    weights, biases = (x.q_weight, x.k_weight), {"q_bias": x.k_weight, "k_bias": x.q_weight}
    q, k = apply_qk_norm_rotary(2 * x.q, x.k, *weights, table, norm="layer", **biases)
    return q.sin(), k


def norm_after(x, table):
    options = {"norm": "layer", "norm_after": True, "positions": x.positions}
    (y,) = (apply_norm_rotary(x.q, x.q_weight, table, bias=x.k_weight, **options),)
    q, k = apply_qk_norm_rotary(x.q, x.k, None, x.k_weight, table, norm_after=True)
    return y.sin(), 2 * q, k


def norm_alone(x, _):
    q, k = apply_qk_norm_rotary(x.q + 1, x.k, x.q_weight, None, None)
    y = apply_norm_rotary(x.v, x.k_weight, None, norm="layer", bias=x.q_weight)
    return q.sin(), k, y


def pack(x, table):
    qkv = torch.cat([x.q, x.k, x.v], 2)
    heads = {"num_heads": 4, "num_kv_heads": 2}
    return (apply_rotary_qkv(qkv, table, **heads, q_weight=x.q_weight, positions=3),)


def pack_layers(x, _):
    qkv = torch.cat([x.q, x.k, x.v], 2)
    heads = {"num_heads": 4, "num_kv_heads": 2, "norm": "layer"}
    return (apply_rotary_qkv(qkv, None, **heads, k_weight=x.k_weight, q_bias=x.q_weight),)


def pack_in_place(x, table):
    qkv = torch.cat([x.q, x.k, x.v], 2) * 2
    heads = {"num_heads": 4, "num_kv_heads": 2}
    apply_rotary_qkv(qkv, table, **heads, out=qkv)
    return (qkv.sin(),)


def norm_in_place(x, table):
    q, k = 2 * x.q, x.k + 1
    apply_qk_norm_rotary(q, k, x.q_weight, None, table, out=(q, k))
    apply_qk_norm_rotary(q, k, x.q_weight, None, table, norm_after=True, out=(q, k))
    apply_norm_rotary(k, None, None, norm="layer", bias=x.q_weight, out=k)
    return q.sin(), k


def into_caches(x, table):
    how = {"slot_mapping": x.slots, "q_weight": x.q_weight, "positions": x.positions}
    q = apply_rotary_kv_cache(x.q, x.k, x.v, x.k_cache, x.v_cache, table, **how)
    return q.sin(), x.k_cache[:3] + 1, x.v_cache


def into_caches_in_place(x, table):
    q = 2 * x.q
    caches = x.k_cache, x.v_cache
    apply_rotary_kv_cache(q, x.k, x.v, *caches, table, slot_mapping=x.slots, out=q)
    return q, *caches


def into_caches_of_8_bits(x, table):
    caches = [cache.to(torch.float8_e4m3fn) for cache in (x.k_cache, x.v_cache)]
    scales = {"k_scale": x.k_scale, "v_scale": 0.25}
    q = apply_rotary_kv_cache(x.q, x.k, x.v, *caches, table, slot_mapping=x.slots, **scales)
    return q, *(cache.view(torch.uint8) for cache in caches)


def norms_into_caches(x, table):
    caches, how = (x.k_cache, x.v_cache), {"slot_mapping": x.slots, "norm_after": True}
    q = apply_rotary_kv_cache(x.q, x.k, x.v, *caches, table, q_weight=x.q_weight, **how)
    how = {"slot_mapping": x.slots - 1, "norm": "layer", "k_bias": x.k_weight}
    return q, apply_rotary_kv_cache(x.q, x.k, x.v, *caches, None, **how), *caches


RECORDED = [norm_one, norm_both, norm_tokens, norm_layer, norm_after, norm_alone]
RECORDED += [pack, pack_layers, pack_in_place]
UNRECORDED = [norm_in_place, into_caches, into_caches_in_place, into_caches_of_8_bits]
UNRECORDED += [norms_into_caches]


def assert_same(results, wanted):
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(result, exact) and result.stride() == exact.stride()


def fresh(x):
    """The same tensors with caches of their own."""
    return x._replace(k_cache=x.k_cache.clone(), v_cache=x.v_cache.clone())


def graph_and_plain(function, compiled, x, table):
    """Compare results and what became of caches, bit by bit, and gradients."""
    outcomes = []
    for call in (function, compiled):
        mine = fresh(x)
        results = call(mine, table)
        grads = []
        if any(result.requires_grad for result in results):
            torch.manual_seed(3)
            asking = [leaf for leaf in x[:5] if leaf.requires_grad]
            weights = [torch.randn_like(result) for result in results]
            grads = torch.autograd.grad(results, asking, weights, allow_unused=True)
        outcomes.append(((*results, mine.k_cache, mine.v_cache), grads))
    (plain, plain_grads), (graphed, graphed_grads) = outcomes
    assert_same(graphed, plain)
    for found, wanted in zip(graphed_grads, plain_grads, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("function", RECORDED + UNRECORDED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_gives_the_same_bits(backend, function, device, nothing_compiled):
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    graph_and_plain(function, compiled, x, table)


@pytest.mark.parametrize("function", RECORDED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_gives_the_same_gradients(backend, function, device, nothing_compiled):
    table = RotaryTable(*table_of(device, torch.float32, 64, 32))
    x = traced_inputs(device, grad=True)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    graph_and_plain(function, compiled, x, table)


@pytest.mark.parametrize("asking", ["q", "q_weight", "k_weight"])
def test_one_graph_records_what_one_input_asks_for(asking, device, nothing_compiled):
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    getattr(x, asking).requires_grad_()

    def call(x, table):
        outs = norm_both(x, table)
        return (sum(out.sum() for out in outs if out.requires_grad),)

    graph_and_plain(call, torch.compile(call, fullgraph=True, backend="aot_eager"), x, table)


@pytest.mark.parametrize("function", UNRECORDED)
def test_a_graph_refuses_a_gradient_that_would_be_lost(function, device, nothing_compiled):
    table = RotaryTable(*table_of(device, torch.float32, 64, 32))
    x = traced_inputs(device, grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"is not recorded|the norm needs gradients"):
        compiled(x, table)
    assert not x.k_cache.any() and not x.v_cache.any()
    with torch.no_grad():
        graph_and_plain(function, compiled, x, table)


def another_out(x, table):
    return apply_norm_rotary(x.q.detach(), None, table, out=x.k_cache)


@pytest.mark.parametrize("function", [into_caches, another_out])
def test_a_graph_refuses_an_output_that_requires_a_gradient(function, device, nothing_compiled):
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    if function is another_out:
        x = x._replace(k_cache=torch.zeros_like(x.q))
    x.k_cache.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for call in (function, compiled):
        with pytest.raises(Exception, match=r"is not recorded|the norm needs gradients"):
            call(x, table)
    assert not x.k_cache.any()


def scaled(x, table, k_scale, v_scale):
    slots, caches = x.slots, [torch.zeros_like(x.k_cache).to(torch.float8_e5m2) for _ in "kv"]
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    apply_rotary_kv_cache(x.q, x.k, x.v, *caches, table, slot_mapping=slots, **scales)
    return [cache.view(torch.uint8) for cache in caches]


def test_scales_of_other_numbers_serve_one_compiled_function(device, nothing_compiled):
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    arrays = [torch.tensor(value, device=device) for value in (0.5, 0.75)]
    for scales in ((0.5, 0.25), (0.75, 0.3), (2, None), (arrays[0], 0.7), (arrays[1], 0.7)):
        assert_same(compiled(x, table, *scales), scaled(x, table, *scales))


@pytest.mark.parametrize(
    ("function", "grad"),
    [*((each, True) for each in RECORDED), *((each, False) for each in RECORDED + UNRECORDED)],
)
def test_sequences_of_other_lengths_are_not_compiled_again(
    function, grad, device, nothing_compiled
):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    table = RotaryTable(*table_of(device, torch.float32, 67, 32))
    for length in (16, 24, 33, 64):
        x = traced_inputs(device, length, grad)
        for each, axis in zip((*x[:3], x.positions, x.slots), (1, 1, 1, 0, 1), strict=True):
            torch._dynamo.mark_dynamic(each, axis)
        graph_and_plain(function, compiled, x, table)
    assert counter.frame_count == 1


def test_inductor_gives_the_same_results_gradients_and_caches(device):
    in_a_process(f"import test_fused_torch; test_fused_torch.compare_with_inductor({device!r})")


def compare_with_inductor(device):
    cos, sin = table_of(device, torch.float32, 64, 32)
    tables = RotaryTable(cos, sin), RotaryTable.from_complex(torch.complex(cos, sin))
    functions = norm_both, norm_after, norm_alone, pack, into_caches
    for function, table in itertools.product(functions, tables):
        x = traced_inputs(device, grad=function in RECORDED)
        outcomes = []
        for call in (function, torch.compile(function, fullgraph=True, backend="inductor")):
            mine = fresh(x)
            results = call(mine, table)
            grads = []
            if function in RECORDED:
                asking = x.q, x.k, x.q_weight
                grads = torch.autograd.grad(results, asking, [y.detach().cos() for y in results])
            outcomes.append((*results, mine.k_cache, mine.v_cache, *grads))
        for plain, compiled in zip(*outcomes, strict=True):
            torch.testing.assert_close(compiled, plain)


OF_POSITIONS = (None, None, None, None)  # three arrays and an int
PLAIN = (False, None, None, 0, False, "nan", None, False, "once")
NO_NORM, NO_CACHE = (None, 0.0, 0.0, "False", False), (None, None, None, None)
SAMPLES = {  # which weights there are, and what is behind all arrays
    "heads": ((True, True), (*PLAIN, "head", 1e-6, 1.0, "True", False, None, *NO_CACHE)),
    "one weight": ((False, True), (*PLAIN, "head", 1e-6, 0.0, "False", False, None, *NO_CACHE)),
    "all heads": ((False, False), (*PLAIN, "heads", 1e-5, 0.0, "True", False, None, *NO_CACHE)),
    "before": ((True, True), (*PLAIN, "head", 1e-6, 1.0, "before_weight", False, None, *NO_CACHE)),
    "after": ((True, False), (*PLAIN, "head", 1e-6, 1.0, "True", True, None, *NO_CACHE)),
    "layer": ((True, True), (*PLAIN, "layer", 1e-6, 0.0, "True", False, None, *NO_CACHE)),
    "eager": ((False, False), (*PLAIN[:-1], "eager", *NO_NORM, None, *NO_CACHE)),
    "packed": ((True, False), (*PLAIN, "head", 1e-6, 0.0, "True", False, [4, 2], *NO_CACHE)),
    "no table": ((True, True), (*PLAIN, "head", 1e-6, 0.0, "True", False, None, *NO_CACHE)),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("grad", [False, True])
def test_the_operators_of_new_results_pass_opcheck(name, grad, device):
    there, behind = SAMPLES[name]
    x = traced_inputs(device, grad=grad)
    xs, kind = [x.q, x.k], "_qk"
    if name == "packed":
        xs, kind = [torch.cat(x[:3], 2).detach().requires_grad_(grad)], ""
    weights = [w if given else None for w, given in zip(x[3:5], there, strict=True)]
    table = *table_of(device, torch.float32, 64, 32), "half_width"
    if name == "no table":
        table = None, None, "no_table"
    others = [None] * 5  # biases, slots and scales
    if name == "layer":
        others[:2] = weights
    arguments = *table, *OF_POSITIONS, *weights, *others, *behind, operators.VERSION
    defined = torch.ops.rope_cupy
    torch.library.opcheck(getattr(defined, f"rotate{kind}").default, (*xs, *arguments))
    if not grad:
        run = operators.arguments_of(graphs.traced_call((*xs,), None, arguments))
        torch.library.opcheck(getattr(defined, f"rotate{kind}_new").default, (*xs, *run))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5, "array"])
def test_the_operators_that_write_caches_pass_opcheck(scale, kept, device):
    x, scaled = traced_inputs(device), scale is not None
    caches = [
        cache.to(torch.float8_e5m2).view(torch.uint8) if scaled else cache for cache in x[7:9]
    ]
    others = [None, None, None, None, x.slots, None, None]
    if scale == "array":
        others[5], scale = x.k_scale, None
    cache = "NHD", "float8_e5m2" if scaled else None, scale, None
    table = *table_of(device, torch.float32, 64, 32), "half_width"
    behind = *table, *OF_POSITIONS, *others, *PLAIN, *NO_NORM, None, *cache, operators.VERSION
    xs, outs = (x.q, x.k, x.v), (torch.zeros_like(x.q), *caches)
    outs += (torch.zeros_like(x.k),) if kept else ()
    written = operators.of_written(xs, outs)
    torch.library.opcheck(torch.ops.rope_cupy.rotate_into.default, (*written, *behind))
    run = operators.arguments_of(graphs.traced_call(xs, outs, behind))
    torch.library.opcheck(torch.ops.rope_cupy.write_into.default, (*written, *run))


class Norms(torch.nn.Module):
    """Weights that are parameters, and a table in buffers."""

    def __init__(self, device):
        super().__init__()
        self.q_weight, self.k_weight = (
            torch.nn.Parameter(torch.rand(64, device=device)) for _ in "qk"
        )
        cos, sin = table_of(device, torch.float32, 64, 32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, q, k):
        weights = self.q_weight, self.k_weight
        return apply_qk_norm_rotary(q, k, *weights, (self.cos, self.sin), weight_offset=1.0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_module_takes_sequences_of_any_length(strict, device):
    module, x = Norms(device), traced_inputs(device)
    any_length = torch.export.Dim("tokens", min=2, max=64)
    shapes = {"q": {1: any_length}, "k": {1: any_length}}
    program = torch.export.export(module, (x.q, x.k), dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("rope_cupy" in target for target in targets)
    for length in (16, 7, 64):
        x = traced_inputs(device, length)
        with torch.no_grad():
            assert_same(program.module()(x.q, x.k), module(x.q, x.k))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_fake_and_meta_tensors_give_shapes_and_strides(layout):
    def make(device, heads=4):
        x = torch.zeros(2, heads, 16, 64, device=device)
        return x.transpose(1, 2) if layout == "transposed" else x.view(2, 16, heads, 64)

    def call(device):
        table, weight = table_of(device, torch.float32, 64, 32), torch.ones(64, device=device)
        q, k = apply_qk_norm_rotary(make(device), make(device, 2), weight, weight, table)
        heads = {"num_heads": 2, "num_kv_heads": 1}
        qkv = apply_rotary_qkv(make(device), table, **heads, norm="heads")
        cache = torch.zeros(40, 2, 64, device=device)
        slots = torch.arange(32, device=device).view(2, 16)
        kv = make(device, 2), make(device, 2)
        caches = cache, cache.clone()
        q_out = apply_rotary_kv_cache(make(device), *kv, *caches, table, slot_mapping=slots)
        return q, k, qkv, q_out

    def looks(results):
        return [(y.shape, y.stride(), y.dtype) for y in results]

    wanted, meta = looks(call("cpu")), call("meta")
    assert looks(meta) == wanted and {y.device.type for y in meta} == {"meta"}
    with FakeTensorMode():
        fakes = call("cpu")
    assert looks(fakes) == wanted and {type(y).__name__ for y in fakes} == {"FakeTensor"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "token"}, "norm must be 'head' or 'heads'"),
        ({"norm": "heads"}, "q_weight must have the shape"),
        ({"eps": -1.0}, "eps must be 0 or more"),
        ({"rotary_offset": 1}, "rotary_offset must be in"),
        ({"norm_after": 1}, "norm_after must be True or False"),
        ({"q_bias": [1.0] * 64}, "q_bias must be None unless norm="),
        ({"table": None, "positions": 2}, "positions must be None without a table"),
        ({"table": None, "interleaved": False}, "interleaved must be None without a table"),
    ],
)
def test_a_mistake_is_told_when_it_is_compiled_or_when_it_runs(
    options, message, device, nothing_compiled
):
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    weights = x.q_weight, x.k_weight
    options = options_on(device, options)
    compiled = torch.compile(
        lambda q, k: apply_qk_norm_rotary(q, k, *weights, **{"table": table} | options),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=message):
        compiled(x.q, x.k)


@pytest.mark.parametrize("function", [norm_one, norm_both, norm_tokens, pack])
def test_make_fx_records_the_operator(function, device):
    make_fx = torch.fx.experimental.proxy_tensor.make_fx
    table, x = RotaryTable(*table_of(device, torch.float32, 64, 32)), traced_inputs(device)
    graph = make_fx(lambda *x: function(Traced(*x), table))(*x)
    assert "rope_cupy.rotate" in graph.code
    assert_same(graph(*x), function(x, table))


# Models, whose norms and rotation are one call.

QWEN3 = CONFIGS["Qwen3"]
MODELS = {  # a config, what a call is told, and of this what must not be forgotten
    "Qwen3": (QWEN3, {"norm": "head", "eps": 1e-6}, {"norm": "heads"}),
    "Gemma 3": (
        CONFIGS["Gemma 3"],
        {"norm": "head", "eps": 1e-6, "weight_offset": 1.0},
        {"weight_offset": 0.0},
    ),
    "OLMo 2": ({"model_type": "olmo2"}, {"norm": "heads", "eps": 1e-5}, {"norm": "head"}),
}


class Fused:
    """Makes one call of what a model's attention does to q and k."""

    def __init__(self, model, monkeypatch, told):
        self.told, self.calls = told, 0
        self.weights = []
        for layer in model.model.layers:
            attention = layer.self_attn
            self.weights.append((attention.q_norm.weight, attention.k_norm.weight))
            attention.q_norm = attention.k_norm = torch.nn.Identity()
        module = importlib.import_module(type(model).__module__)
        assert callable(module.apply_rotary_pos_emb)
        monkeypatch.setattr(module, "apply_rotary_pos_emb", self.rotate)

    def rotate(self, q, k, cos, sin):
        q_weight, k_weight = self.weights[self.calls % len(self.weights)]
        self.calls += 1
        if self.told["norm"] == "head":  # or as they come from elsewhere
            q_weight, k_weight = q_weight[: q.shape[-1]], k_weight[: q.shape[-1]]
        table = RotaryTable.from_full_width(cos, sin)
        return apply_qk_norm_rotary(q, k, q_weight, k_weight, table, layout="bhsd", **self.told)


def logits_and_gradients(model, weights, inputs, device):
    inputs = {name: each.to(device) for name, each in inputs.items()}
    logits = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    return logits, *torch.autograd.grad(logits.square().mean(), weights)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_logits_and_gradients_of_its_norms(name, device, monkeypatch):
    config, told, forgotten = MODELS[name]
    model = model_of(config).to(device)
    norms = [
        norm.weight
        for layer in model.model.layers
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)
    ]
    with torch.no_grad():
        for weight in norms:
            weight.add_(torch.rand_like(weight) - 0.5)
    asking, inputs = [*norms, model.model.embed_tokens.weight], tokens()
    wanted = logits_and_gradients(model, asking, inputs, device)
    fused = Fused(model, monkeypatch, told)
    found = logits_and_gradients(model, asking, inputs, device)
    assert fused.calls == SIZES["num_hidden_layers"]
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < 1e-4, errors
    fused.told = told | forgotten
    if fused.told["norm"] == "heads":
        fused.weights = [
            (q.repeat(SIZES["num_attention_heads"]), k.repeat(SIZES["num_key_value_heads"]))
            for q, k in fused.weights
        ]
    with torch.no_grad():
        inputs = {name: each.to(device) for name, each in inputs.items()}
        astray = model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()]
    assert (astray - wanted[0]).norm() > 1e-2 * wanted[0].norm()


# On a GPU: graphs, and sizes that models have.


@pytest.mark.gpu
@pytest.mark.undisturbed
@pytest.mark.parametrize("function", RECORDED + UNRECORDED)
def test_a_cuda_graph_repeats_a_call_on_new_numbers(function):
    table, x = RotaryTable(*table_of("cuda", torch.float32, 64, 32)), traced_inputs("cuda")
    function(x, table)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = function(x, table)
    for _ in range(2):
        for each in x[:5]:
            each.normal_()
        x.k_cache.zero_()
        x.v_cache.zero_()
        x.slots.copy_(torch.randperm(130, device="cuda")[: x.slots.numel()].view_as(x.slots))
        x.positions.copy_(torch.randint_like(x.positions, 64))
        mine = fresh(x)
        graph.replay()
        assert_same((*results, x.k_cache, x.v_cache), (*function(mine, table), *mine[7:9]))


@pytest.mark.gpu
@pytest.mark.undisturbed
@pytest.mark.parametrize("function", [norm_one, norm_both, norm_tokens, pack])
def test_a_cuda_graph_repeats_a_backward_pass_on_new_numbers(function):
    table = RotaryTable(*table_of("cuda", torch.float32, 64, 32))
    x = traced_inputs("cuda", grad=True)

    def step():
        results = function(x, table)
        loss = sum(result.square().sum() for result in results)
        return torch.autograd.grad(loss, x[:5], allow_unused=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        grads = step()
    for _ in range(2):
        with torch.no_grad():
            for each in x[:5]:
                each.normal_()
        graph.replay()
        for found, wanted in zip(grads, step(), strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted)


LARGE = {  # tokens of two batches, heads of q and of k, size of a head
    "cpu": (24, 16, 4, 128),
    "cuda": (1024, 32, 8, 128),
}


@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_models_have_is_right(norm, dtype, interleaved, packed, device):
    num_tokens, num_heads, num_kv_heads, size = LARGE[device]
    cos, sin = table_of(device, torch.float32, num_tokens, size // 2)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(2, num_tokens, each, size, device=device).to(dtype) for each in heads)
    weights = [
        (torch.rand(each * size if norm == "heads" else size, device=device) + 0.5).to(dtype)
        for each in heads[:2]
    ]
    options = {"norm": norm, "interleaved": interleaved, "round_norm": False}
    if packed:
        named = {"q_weight": weights[0], "k_weight": weights[1]}
        counts = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
        qkv = torch.cat([q, k, v], 2)
        out = apply_rotary_qkv(qkv, (cos, sin), **counts, **named, **options)
        *results, v_out = out.split(heads, 2)
        assert torch.equal(v_out, v)
    else:
        results = apply_qk_norm_rotary(q, k, *weights, (cos, sin), **options)
    doubles = [[each.double() for each in both] for both in ((q, k), weights, (cos, sin))]
    call = Call(norm, interleaved=interleaved)
    for result, exact in zip(results, exactly(call, *doubles), strict=True):
        pairs = exact.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        norms = pairs.norm(dim=-1 if interleaved else -2, keepdim=True).expand_as(pairs)
        info = torch.finfo(dtype)
        allowed = info.eps / 2 * (exact.abs() + info.tiny) + NORM_ERROR * norms.flatten(-2)
        assert ((result.double() - exact).abs() <= allowed).all()


# DTensors in two processes.

CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.undisturbed])


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_two_processes(device, tmp_path):
    checks = "check_heads", "check_tokens", "check_refused", "check_traced"
    in_processes("test_fused_torch", checks, device, tmp_path)


def whole_weight_gradient(grad):
    """Of all heads and tokens: the sum over processes of a plain tensor's."""
    if isinstance(grad, DTensor):
        return grad.full_tensor()
    grad = grad.clone()
    torch.distributed.all_reduce(grad)
    return grad


def compare_sharded(mesh, axis, norm, replicated, *, rotates=True, **options):
    """Normalise and rotate sharded tensors, forward and backward, without a word."""
    from torch.distributed.tensor.debug import CommDebugMode

    device = mesh.device_type
    table = table_of(device, torch.float32, 64, 32)
    q, k = (torch.randn(2, 7, heads, 64, device=device) for heads in (4, 2))  # 7: uneven shards
    sizes = (4 * 64, 2 * 64) if norm == "heads" else (64, 64)
    sizes = sizes * 2 if norm == "layer" else sizes
    weights = [torch.rand(size, device=device) for size in sizes]
    wholes = [x.clone().requires_grad_() for x in (q, k, *weights)]
    table = table if rotates else None

    def call(q, k, q_weight, k_weight, *biases):
        named = dict(zip(("q_bias", "k_bias"), biases, strict=False))
        return apply_qk_norm_rotary(q, k, q_weight, k_weight, table, norm=norm, **named, **options)

    wanted = call(*wholes)
    grads = [torch.randn_like(x) for x in (q, k)]
    exact_grads = torch.autograd.grad(wanted, wholes, grads)
    shards = [distribute(x, mesh, axis).requires_grad_() for x in (q, k)]
    if replicated:
        weights = [distribute_whole(weight, mesh) for weight in weights]
    weights = [weight.requires_grad_() for weight in weights]
    shard_grads = [distribute(x, mesh, axis) for x in grads]
    with CommDebugMode() as messages:
        results = call(*shards, *weights)
        found = torch.autograd.grad(results, (*shards, *weights), shard_grads)
    assert messages.get_total_counts() == 0
    sharded = zip((*results, *found[:2]), (*wanted, *exact_grads[:2]), 2 * shards, strict=True)
    for result, exact, shard in sharded:
        assert result.placements == shard.placements
        torch.testing.assert_close(result.full_tensor(), exact)
    for grad, exact in zip(found[2:], exact_grads[2:], strict=True):
        if axis or isinstance(grad, DTensor):
            grad = whole_weight_gradient(grad)
        torch.testing.assert_close(grad, exact)


def distribute_whole(x, mesh):
    return DTensor.from_local(x, mesh, [Replicate()])


def check_heads(mesh, device):
    for replicated in (False, True):
        compare_sharded(mesh, "h", "head", replicated)
        compare_sharded(mesh, "h", "head", replicated, interleaved=True, weight_offset=1.0)
        compare_sharded(mesh, "h", "layer", replicated, norm_after=True)


def check_tokens(mesh, device):
    positions = torch.randint(64, (2, 7), device=device)
    for axis in ("s", "b", ""):
        for norm in ("head", "heads"):
            for replicated in (False, True):
                compare_sharded(mesh, axis, norm, replicated)
                compare_sharded(mesh, axis, norm, replicated, positions=positions)
        compare_sharded(mesh, axis, "layer", False)
        compare_sharded(mesh, axis, "head", True, norm_after=True, positions=positions)
        compare_sharded(mesh, axis, "heads", True, rotates=False)


def check_refused(mesh, device):
    table = table_of(device, torch.float32, 64, 32)
    q = torch.randn(2, 6, 4, 64, device=device)
    by_head, by_token = distribute(q, mesh, "h"), distribute(q, mesh, "s")
    weight = torch.rand(64, device=device)

    def refused(error, message, function, *arguments, **options):
        with pytest.raises(error, match=message):
            function(*arguments, **options)

    one = apply_norm_rotary
    refused(ValueError, "norm must be 'head' where heads", one, by_head, None, table, norm="heads")
    sharded = distribute(weight, mesh, "h", "h")
    refused(ValueError, "weight must be a plain tensor or replicated", one, by_head, sharded, table)
    leaf = distribute(q, mesh, "s").requires_grad_()
    refused(ValueError, "out must be None", one, leaf, weight, table, out=leaf)
    asking = weight.clone().requires_grad_()
    refused(ValueError, "out must be None", one, by_token, asking, table, out=by_token)
    assert torch.equal(by_token.full_tensor(), q)
    assert one(by_token, weight, table, out=by_token) is by_token
    assert torch.equal(by_token.full_tensor(), one(q, weight, table))
    heads = {"num_heads": 2, "num_kv_heads": 1}
    refused(TypeError, "must be plain tensors here", apply_rotary_qkv, by_head, table, **heads)
    caches = [torch.zeros(12, 4, 64, device=device) for _ in "kv"]
    slots = {"slot_mapping": torch.arange(12, device=device).view(2, 6)}
    arguments = apply_rotary_kv_cache, *[by_head] * 3, *caches, table
    refused(TypeError, "must be plain tensors here", *arguments, **slots)
    assert not any(cache.any() for cache in caches)


def check_traced(mesh, device):
    table = RotaryTable(*table_of(device, torch.float32, 64, 32))
    for axis, norm in (("h", "head"), ("s", "heads"), ("b", "head")):
        torch.compiler.reset()
        q, k = (torch.randn(2, 6, heads, 64, device=device) for heads in (4, 2))
        sizes = (4 * 64, 2 * 64) if norm == "heads" else (64, 64)
        weights = [distribute_whole(torch.rand(size, device=device), mesh) for size in sizes]
        leaves = [distribute(x, mesh, axis) for x in (q, k)] + weights
        leaves = [leaf.requires_grad_() for leaf in leaves]
        call = functools.partial(apply_qk_norm_rotary, norm=norm)
        outcomes = []
        for each in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            results = each(*leaves, table)
            loss = sum(result.to_local().square().sin().sum() for result in results)
            outcomes.append((*results, *torch.autograd.grad(loss, leaves)))
        for eager, compiled in zip(*outcomes, strict=True):
            assert compiled.placements == eager.placements
            torch.testing.assert_close(compiled.to_local(), eager.to_local())


@pytest.mark.parametrize("compiled", [False, True])
def test_one_weight_for_q_and_k_of_a_packed_array_gets_both_gradients_once(compiled, device):
    qkv = torch.randn(6, 4, 8, device=device, dtype=torch.float64)
    angles = torch.rand(6, 4, device=device, dtype=torch.float64)
    weights = torch.rand(2, 8, device=device, dtype=torch.float64)

    def loss(q_weight, k_weight):
        table = angles.cos(), angles.sin()
        heads = {"num_heads": 2, "num_kv_heads": 1}
        return (
            apply_rotary_qkv(qkv, table, q_weight=q_weight, k_weight=k_weight, **heads).pow(3).sum()
        )

    call = torch.compile(loss, backend="aot_eager") if compiled else loss
    own = [weights[0].clone().requires_grad_() for _ in range(2)]
    each = torch.autograd.grad(call(*own), own)
    shared = weights[0].clone().requires_grad_()
    (both,) = torch.autograd.grad(call(shared, shared), shared)
    assert torch.allclose(both, sum(each), rtol=1e-12)
