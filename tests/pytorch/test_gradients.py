"""Gradients through PyTorch: right, of every option, never lost; in place by autograd's rules."""

import gc
import weakref

import numpy as np
import pytest
import torch
from arrays import Producer
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from rope_cupy import RotaryTable, apply_norm_rotary, apply_rotary, apply_rotary_qk, cpu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS, PAIRS = 5, 3


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def randn(*shape, device="cpu", dtype=torch.float64, grad=True):
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def parts(*shape, device="cpu", dtype=torch.float64):
    """Cosines and sines of random angles."""
    angles = torch.rand(*shape, device=device, dtype=torch.float64) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def by_position(device):
    return parts(TOKENS + 4, PAIRS, device=device)


def full_width(device):
    return RotaryTable.from_full_width(*(part.repeat(1, 2) for part in by_position(device)))


def complex_numbers(device):
    return RotaryTable.from_complex(torch.complex(*by_position(device)))


def frequencies(device):
    like = torch.empty(1, device=device, dtype=torch.float64)
    return RotaryTable.from_inverse_frequencies([1.0, 0.3, 0.1], like=like, precompute=False)


def matrices(device):
    cos, sin = by_position(device)
    stacked = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    return RotaryTable.from_matrices(stacked)


def by_element(device):
    return RotaryTable.from_elementwise(*parts(TOKENS + 4, 2 * PAIRS, device=device))


def general_matrices(device):
    matrices = torch.rand(TOKENS + 4, PAIRS, 2, 2, device=device, dtype=torch.float64)
    return RotaryTable.from_matrices(matrices.transpose(-1, -2))


CALLS = {  # shapes of q and k, a table, and options
    "halves": ((2, TOKENS, 4, 6), (2, TOKENS, 2, 6), by_position, {}),
    "interleaved": ((2, TOKENS, 4, 6), (2, TOKENS, 2, 6), by_position, {"interleaved": True}),
    "conjugate": ((2, TOKENS, 4, 6), (2, TOKENS, 2, 6), by_position, {"conjugate": True}),
    "a slice": ((1, TOKENS, 2, 9), (1, TOKENS, 1, 9), by_position, {"rotary_offset": 2}),
    "heads first": ((2, 4, TOKENS, 6), (2, 2, TOKENS, 6), by_position, {"layout": "bhsd"}),
    "packed sequences": ((TOKENS, 4, 6), (TOKENS, 2, 6), by_position, {"layout": "thd"}),
    "split": ((2, TOKENS, 24), (2, TOKENS, 12), by_position, {"head_dim": 6}),
    "an offset": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_position, {"positions": 4}),
    "positions": (
        *((2, TOKENS, 2, 6), (2, TOKENS, 2, 6), by_position),
        {"positions": [[8, 0, 3, 3, 1], [2, 2, 0, 7, 5]]},
    ),
    "padding": (
        *((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_position),
        {"positions": [0, 1, 2, -1, 100], "out_of_range": "keep"},
    ),
    "an offset of each batch": (
        *((2, TOKENS, 2, 6), (2, TOKENS, 2, 6), by_position),
        {"seqlen_offsets": [3, 5], "positions": -1},
    ),
    "sequences": (
        *((TOKENS, 4, 6), (TOKENS, 2, 6), by_position),
        {"cu_seqlens": [0, 2, 5], "seqlen_offsets": [4, 0]},
    ),
    "three axes": (
        *((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_position),
        {"positions": [[0, 1, 2, 3, 4], [8, 7, 6, 5, 4], [0] * 5], "mrope_section": (1, 1, 1)},
    ),
    "three axes in turn": (
        *((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_position),
        {
            "positions": [[0, 1, 2, 3, 4], [8, 7, 6, 5, 4], [0] * 5],
            "mrope_section": (1, 1, 1),
            "mrope_interleaved": True,
        },
    ),
    "frequencies": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), frequencies, {"positions": 10**6}),
    "full width": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), full_width, {}),
    "complex": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), complex_numbers, {"interleaved": True}),
    "matrices": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), matrices, {"interleaved": True}),
    "by element": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_element, {}),
    "by element, neighbours": (
        *((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), by_element),
        {"interleaved": True, "conjugate": True},
    ),
    "matrices of no rotation": ((1, TOKENS, 2, 6), (1, TOKENS, 2, 6), general_matrices, {}),
    "a batch's own": (
        *((2, TOKENS, 2, 6), (2, TOKENS, 4, 6)),
        *(lambda device: parts(2, TOKENS, PAIRS, device=device), {}),
    ),
    "a head's own": (
        *((2, TOKENS, 2, 6), (2, TOKENS, 2, 6)),
        *(lambda device: parts(2, TOKENS, 2, PAIRS, device=device), {}),
    ),
}


def options_on(device, options):
    """Options whose lists are tensors."""
    lists = {name: value for name, value in options.items() if isinstance(value, list)}
    return options | {name: torch.tensor(lists[name], device=device) for name in lists}


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_of_q_and_k_are_right(name, device):
    q_shape, k_shape, make_table, options = CALLS[name]
    table, options = make_table(device), options_on(device, options)

    def rotate(q, k):
        return apply_rotary_qk(q, k, table, **options)

    inputs = randn(*q_shape, device=device), randn(*k_shape, device=device)
    assert gradcheck(rotate, inputs)
    assert gradgradcheck(rotate, inputs)


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives_of_one_tensor_in_place_are_right(name, device):
    shape, _, make_table, options = CALLS[name]
    table, options = make_table(device), options_on(device, options)

    def rotate(x):
        y = 3 * x
        return apply_rotary(y, table, out=y, **options) * 2

    assert gradcheck(rotate, randn(*shape, device=device))
    assert gradgradcheck(rotate, randn(*shape, device=device))


def bits(x):
    return x.detach().cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_is_the_conjugate_rotation_of_the_results_gradient(dtype, device):
    table = parts(8, 32, device=device, dtype=torch.float32)
    shapes = (2, 8, 4, 64), (2, 8, 2, 64)
    q, k = (randn(*shape, device=device, dtype=dtype) for shape in shapes)
    grads = [randn(*shape, device=device, dtype=dtype, grad=False) for shape in shapes]
    torch.autograd.backward(apply_rotary_qk(q, k, table), grads)
    for x, wanted in zip((q, k), apply_rotary_qk(*grads, table, conjugate=True), strict=True):
        assert torch.equal(bits(x.grad), bits(wanted))


def test_gradients_are_taken_with_the_strides_that_they_come_with(device):
    table = parts(TOKENS, 32, device=device)
    x = randn(1, TOKENS, 2, 64, device=device)
    apply_rotary(x, table).sum().backward()  # one number, seen as (1, s, h, d)
    ones = torch.ones_like(x)
    assert torch.equal(x.grad, apply_rotary(ones, table, conjugate=True))
    turned = randn(1, 2, 64, TOKENS, device=device, grad=False).permute(0, 3, 1, 2)
    x.grad = None
    apply_rotary(x, table).backward(turned)
    assert torch.equal(x.grad, apply_rotary(turned, table, conjugate=True))


@pytest.mark.parametrize("which", ["q", "k"])
def test_only_the_gradients_that_are_asked_for_are_made(which, device):
    table = parts(TOKENS, 32, device=device)
    q, k = (randn(1, TOKENS, 2, 64, device=device, grad=name == which) for name in "qk")
    results = dict(zip("qk", apply_rotary_qk(q, k, table), strict=True))
    assert [results[name].requires_grad for name in "qk"] == [name == which for name in "qk"]
    results[which].square().sum().backward()
    assert [x.grad is not None for x in (q, k)] == [name == which for name in "qk"]


def test_a_result_that_is_not_used_has_no_gradient(device):
    table = parts(TOKENS, 32, device=device)
    q, k = (randn(1, TOKENS, 2, 64, device=device) for _ in "qk")
    _, k_out = apply_rotary_qk(q, k, table)
    k_out.sum().backward()
    assert q.grad is None
    assert torch.equal(k.grad, apply_rotary(torch.ones_like(k), table, conjugate=True))


def test_a_parameter_has_its_gradient(device):
    table = parts(TOKENS, 32, device=device)
    x = torch.nn.Parameter(randn(1, TOKENS, 2, 64, device=device, grad=False))
    apply_rotary(x, table).sum().backward()
    assert torch.equal(x.grad, apply_rotary(torch.ones_like(x), table, conjugate=True).detach())


def test_a_checkpoint_recomputes_it(device):
    table = parts(TOKENS, 32, device=device)
    x = randn(1, TOKENS, 2, 64, device=device)
    apply_rotary(x, table).sin().sum().backward()
    wanted, x.grad = x.grad, None
    checkpoint(lambda x: apply_rotary(x, table).sin(), x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, wanted)


def test_the_input_is_not_kept(device):
    table = parts(TOKENS, 32, device=device)
    x = 2 * randn(1, TOKENS, 2, 64, device=device)
    alive = weakref.ref(x)
    y = apply_rotary(x, table)
    del x
    gc.collect()
    assert alive() is None and y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(mode, device):
    table = parts(TOKENS, 32, device=device)
    x = randn(1, TOKENS, 2, 64, device=device)
    wanted = apply_rotary(x.detach(), table)
    for _ in range(3):  # the third is guarded by what the second saw
        with mode():
            y = apply_rotary(x, table)
        assert not y.requires_grad and torch.equal(y, wanted)
        assert apply_rotary(x, table).requires_grad


# In place.


def test_in_place_the_history_and_the_version_move_on(device):
    table = parts(TOKENS, 32, device=device)
    leaf = randn(1, TOKENS, 2, 64, device=device)
    x = 3 * leaf
    before, wanted = x._version, apply_rotary(x.detach(), table)
    y = apply_rotary(x, table, out=x)
    assert y is x and torch.equal(x, wanted)
    assert x._version > before and "Rotation" in type(x.grad_fn).__name__
    x.sum().backward()
    wanted = 3 * apply_rotary(torch.ones_like(leaf), table, conjugate=True)
    torch.testing.assert_close(leaf.grad, wanted)


def test_views_of_a_packed_buffer_turn_in_place(device):
    table = parts(TOKENS, 32, device=device)
    leaf = randn(TOKENS, 3, 4, 64, device=device)
    qkv = 1 * leaf
    q, k = qkv[:, 0], qkv[:, 1]
    results = apply_rotary_qk(q, k, table, out=(q, k))
    assert results[0] is q and results[1] is k
    for i in (0, 1):
        assert torch.equal(qkv[:, i], apply_rotary(leaf.detach()[:, i], table))
    assert torch.equal(qkv[:, 2], leaf[:, 2])
    weight = randn(TOKENS, 3, 4, 64, device=device, grad=False)
    qkv.backward(weight)
    for i in (0, 1):
        wanted = apply_rotary(weight[:, i], table, conjugate=True)
        torch.testing.assert_close(leaf.grad[:, i], wanted)
    assert torch.equal(leaf.grad[:, 2], weight[:, 2])


def a_leaf(leaf):
    return leaf, leaf


def a_view_of_a_leaf(leaf):
    return leaf[:], leaf


def one_of_several_views(leaf):
    base = 1 * leaf
    return base.unbind(0)[0].unsqueeze(0), base


def a_view_made_without_gradients(leaf):
    base = 1 * leaf
    with torch.no_grad():
        return base[:], base


VIEWS = [a_leaf, a_view_of_a_leaf, one_of_several_views, a_view_made_without_gradients]


@pytest.mark.parametrize("make", VIEWS)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_in_place_what_autograd_refuses_is_refused_before_anything_is_written(make, beside, device):
    table = parts(TOKENS, 32, device=device)
    x, base = make(randn(1, TOKENS, 2, 64, device=device))
    other = 1 * randn(1, TOKENS, 2, 64, device=device)
    before = base.detach().clone(), other.detach().clone()
    history = other._version, other.grad_fn
    with pytest.raises(ValueError, match=r"x must not|k must not"):
        if beside:
            apply_rotary_qk(other, x, table, out=(other, x))
        else:
            apply_rotary(x, table, out=x)
    assert torch.equal(base, before[0]) and torch.equal(other, before[1])
    assert (other._version, other.grad_fn) == history


def test_what_was_saved_for_another_gradient_must_not_be_overwritten(device):
    table = parts(TOKENS, 32, device=device)
    x = randn(1, TOKENS, 2, 64, device=device).exp()  # whose gradient needs its result
    apply_rotary(x, table, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@pytest.mark.parametrize("what", ["cos", "positions"])
def test_a_table_that_changes_before_the_backward_pass_is_an_error(what, device):
    cos, sin = parts(TOKENS, 32, device=device)
    positions = torch.arange(TOKENS, device=device)
    x = randn(1, TOKENS, 2, 64, device=device)
    y = apply_rotary(x, RotaryTable(cos, sin), positions=positions)
    {"cos": cos, "positions": positions}[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class NoLaunchError(Exception):
    pass


@pytest.mark.parametrize("views", [False, True])
def test_in_place_a_launch_that_fails_moves_no_history(views, monkeypatch):
    def fail(*_):
        raise NoLaunchError

    table = parts(TOKENS, 32)
    base = 1 * randn(1, TOKENS, 2, 2, 64)
    q, k = (base[:, :, i] if views else base[:, :, i].clone() for i in (0, 1))
    before = [(x.detach().clone(), x._version, x.grad_fn) for x in (q, k)]
    monkeypatch.setattr(cpu, "rotate", fail)
    with pytest.raises(NoLaunchError):
        apply_rotary_qk(q, k, table, out=(q, k))
    monkeypatch.undo()
    for x, (numbers, version, history) in zip((q, k), before, strict=True):
        assert torch.equal(x, numbers) and (x._version, x.grad_fn) == (version, history)
    apply_rotary_qk(q, k, table, out=(q, k))
    assert torch.equal(q, apply_rotary(before[0][0], table)) and q.grad_fn is not before[0][2]


def test_in_place_arguments_are_checked_before_the_history_moves_on(device):
    x = 1 * randn(1, TOKENS, 2, 64, device=device)
    before = x._version, x.grad_fn
    with pytest.raises(ValueError, match="table must hold the positions"):
        apply_rotary(x, parts(TOKENS - 1, 32, device=device), out=x)
    assert (x._version, x.grad_fn) == before


def test_an_output_that_is_not_the_input_is_refused(device):
    table = parts(TOKENS, 32, device=device)
    x, out = (randn(1, TOKENS, 2, 64, device=device, grad=grad) for grad in (True, False))
    before = out.clone()
    for y in (out, x.detach()):
        with pytest.raises(ValueError, match="out must be its input itself, or a new array"):
            apply_rotary(x, table, out=y)
    with pytest.raises(ValueError, match="out must be its input itself, or a new array"):
        apply_rotary(out, table, out=x)
    assert torch.equal(out, before)


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_table_that_requires_a_gradient_is_refused(repeats, device):
    cos, sin = parts(TOKENS, 32, device=device)
    x = randn(1, TOKENS, 2, 64, device=device)
    for grad in (True, False) * repeats:
        for table in ((cos.clone().requires_grad_(), sin), (cos, sin.clone().requires_grad_())):
            with pytest.raises(ValueError, match="table must not require a gradient"):
                apply_rotary(x.detach().requires_grad_(grad), table)


OTHERS = {  # a table and positions of another library, and what is changed later
    "cos": ("table", {}),
    "cos of later positions": ("table", {"positions": 3}),
    "cos by positions": ("table", {"positions": "array"}),
    "positions": ("positions", {"positions": "array"}),
    "seqlen_offsets": ("seqlen_offsets", {"seqlen_offsets": "offsets"}),
    "cos of each batch": ("table of each batch", {}),
    "a cache": ("cache", {"positions": 2}),
    "matrices": ("matrices", {"positions": 2}),
    "frequencies": ("frequencies", {"positions": 2}),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "library", ["numpy", "dlpack", pytest.param("cupy", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", OTHERS)
def test_an_array_of_another_library_that_changes_later_leaves_the_gradient(
    name, library, in_place
):
    what, options = OTHERS[name]
    device = "cuda" if library == "cupy" else "cpu"
    module = pytest.importorskip(library) if library == "cupy" else np
    angles = np.random.default_rng(1).random((TOKENS + 4, 32)) * 6
    if what == "table of each batch":
        angles = angles[None, :TOKENS]
    cos, sin = (module.asarray(part(angles)) for part in (np.cos, np.sin))
    arrays = [cos, sin]
    make = lambda cos, sin: (cos, sin)  # noqa: E731
    if what == "cache":
        arrays, make = [module.concatenate([cos, sin], -1)], RotaryTable.from_cache
    elif what == "matrices":
        rows = module.stack([cos, -sin, sin, cos], -1).reshape(*cos.shape, 2, 2)
        arrays, make = [rows], RotaryTable.from_matrices
    rows = {"array": [8, 0, 3, 3, 1], "offsets": [3]}
    for key, kind in options.items():
        if isinstance(kind, str):
            options = options | {key: module.asarray(rows[kind])}
    wrap = Producer if library == "dlpack" else lambda array: array
    if what == "frequencies":
        like = wrap(module.zeros(1))
        table = RotaryTable.from_inverse_frequencies(np.ones(32), like=like, precompute=False)
        arrays = [getattr(table._source.arrays[0], "array", table._source.arrays[0])]
    else:
        table = make(*map(wrap, arrays))
    given = {key: each if isinstance(each, int) else wrap(each) for key, each in options.items()}
    leaf, grad = (randn(1, TOKENS, 2, 64, device=device, grad=each) for each in (True, False))
    wanted = apply_rotary(grad, table, conjugate=True, **given)
    x = 1 * leaf
    y = apply_rotary(x, table, out=x if in_place else None, **given)
    for array in [options[what]] if what in options else arrays:
        array[...] = 0
    y.backward(grad)
    assert torch.equal(leaf.grad, wanted)


def test_a_tensor_beside_a_numpy_table_is_seen_to_change():
    cos, sin = parts(TOKENS, 32)
    x = randn(1, TOKENS, 2, 64)
    y = apply_rotary(x, (cos, sin.numpy()))
    cos.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_compiled_gradient_by_a_numpy_table_is_refused_or_right():
    cos, sin = (part.numpy() for part in parts(TOKENS, 32))
    x, grad = randn(1, TOKENS, 2, 64), randn(1, TOKENS, 2, 64, grad=False)
    wanted = apply_rotary(grad, (cos, sin), conjugate=True)
    for fullgraph in (True, False):
        torch.compiler.reset()
        compiled = torch.compile(apply_rotary, backend="aot_eager", fullgraph=fullgraph)
        if fullgraph:
            with pytest.raises(Exception, match="table must be a tensor of PyTorch where"):
                compiled(x, (cos, sin))
            continue
        y = compiled(x, (cos, sin))  # which breaks its graph here
        cos[...] = 0
        y.backward(grad)
        assert torch.equal(x.grad, wanted)


@pytest.mark.parametrize("which", ["x", "k"])
def test_what_is_no_tensor_is_refused_by_name_where_a_gradient_is_recorded(which):
    table = parts(TOKENS, 32)
    q, k = randn(1, TOKENS, 2, 64), randn(1, TOKENS, 2, 64, grad=False).numpy()
    with pytest.raises(TypeError, match=f"{which} must be a tensor where a gradient is recorded"):
        if which == "x":
            apply_norm_rotary(k, randn(64), table)
        else:
            apply_rotary_qk(q, k, table)


def test_a_numpy_table_cannot_change_unseen_but_serves(device):
    if device == "cuda":
        pytest.skip("a table lies on the device of its tensors")
    cos, sin = (part.numpy() for part in parts(TOKENS, 32))
    x = randn(1, TOKENS, 2, 64)
    apply_rotary(x, (cos, sin)).sum().backward()
    wanted = apply_rotary(np.ones(x.shape), (cos, sin), conjugate=True)
    assert np.array_equal(x.grad.numpy(), wanted)


@pytest.mark.parametrize("norm_after", [False, True])
@pytest.mark.parametrize(("weight", "largest"), [(7e4, 1.0), (1.0, 5e4), (7e4, 5e4)])
def test_gradients_of_float16_are_finite_where_a_kernel_holds_more(norm_after, weight, largest):
    # A weight, or a rotated element before its norm, lies beyond the numbers of float16.
    angle = torch.outer(torch.arange(6.0), 1 / (1 + torch.arange(4.0)))
    halves = [largest, -largest * 0.9] * 4  # a rotation by an eighth adds neighbours up
    x = torch.tensor([[halves] * 2] * 6)[None].half().requires_grad_()
    weights = torch.full((8,), weight).requires_grad_()
    options = {"norm_after": norm_after, "round_norm": False, "interleaved": True}
    grad = torch.full((1, 6, 2, 8), 1e-3) * torch.linspace(-1, 1, 8)
    found, wanted = [], []
    for dtype, gradients in (torch.float16, found), (torch.float64, wanted):
        q = x.detach().to(dtype).requires_grad_()
        w = weights.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        table = angle.cos().to(w.dtype), angle.sin().to(w.dtype)
        y = apply_norm_rotary(q, w, table, **options)
        y.backward(grad.to(dtype))
        gradients += [q.grad.double(), w.grad.double()]
    for mine, exact, least in zip(found, wanted, (2.0**-24, 0.0), strict=True):
        assert torch.allclose(mine, exact, rtol=3e-3, atol=least + 1e-3 * exact.abs().max())
