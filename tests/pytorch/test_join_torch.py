"""Calls that are written together, as PyTorch records and compiles them."""

import pytest

torch = pytest.importorskip("torch")

from test_compile import in_a_process  # noqa: E402

import rope_cupy  # noqa: E402
from rope_cupy import RotaryTable, Stream, join_qkv  # noqa: E402

SIZES = {"text": 5, "image": 11}
NORMS = {
    "none": {},
    "head": {"norm": "head"},
    "heads": {"norm": "heads"},
    "layer": {"norm": "layer"},
    "after": {"norm": "head", "norm_after": True, "eps": 1e-4},
}


def angles(tokens, pairs=8):
    return torch.outer(torch.arange(tokens) + 1.0, 50.0 ** -(torch.arange(pairs) / pairs))


def tensors(norm="none", dtype=torch.float64, device="cpu", batch=2, **sizes):
    """Of each stream: q, k, v, and weights and biases where the norm has them."""
    torch.manual_seed(1)
    made = {}
    for name, tokens in (SIZES | sizes).items():
        heads = (4, 2, 2)
        made[name] = [torch.randn(batch, tokens, n, 16, dtype=dtype, device=device) for n in heads]
        width = [16 * n if norm == "heads" else 16 for n in heads[:2]]
        of_norm = [torch.randn(n, dtype=dtype, device=device) for n in width]
        if norm != "none":
            made[name] += of_norm
        if norm == "layer":
            made[name] += [torch.randn(16, dtype=dtype, device=device) for _ in range(2)]
    return made


def streams_of(made, tables):
    """Streams of a text, which may have no table, and of an image with positions behind it."""
    text, image = made.values()
    return [
        Stream(*text[:3], tables[0], None, *text[3:]),
        Stream(*image[:3], tables[1], text[0].shape[1], *image[3:]),
    ]


def tables_of(kind, dtype=torch.float64, device="cpu"):
    angle = angles(40).to(dtype).to(device)
    half = angle.cos(), angle.sin()
    if kind == "complex":
        return [RotaryTable.from_complex(torch.polar(torch.ones_like(angle), angle))] * 2
    return {"shared": [half, half], "none": [None, half], "own": [half, (half[1], half[0])]}[kind]


def joined(made, tables, **options):
    return join_qkv(streams_of(made, tables), **options)


def one_by_one(made, tables, **options):
    """The same by a call for each stream, and torch.cat."""
    parts = []
    for q, k, v, table, positions, *of_norm in streams_of(made, tables):
        weights = [*of_norm, *[None] * (4 - len(of_norm))]
        names = dict(zip(("q_bias", "k_bias"), weights[2:], strict=True))
        where = {} if table is None else {"positions": positions}
        if options:
            q_out, k_out = rope_cupy.apply_qk_norm_rotary(
                q, k, *weights[:2], table, **names, **where, **options
            )
        elif table is None:
            q_out, k_out = q, k
        else:
            q_out, k_out = rope_cupy.apply_rotary_qk(q, k, table, **where)
        parts.append((q_out, k_out, v))
    return [torch.cat(each, 1) for each in zip(*parts, strict=True)]


def gradients(function, made, *arguments, **options):
    inputs = [each.requires_grad_() for group in made.values() for each in group]
    results = function(made, *arguments, **options)
    weights = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in results]
    total = sum((y * w.to(y.device)).square().sum() for y, w in zip(results, weights, strict=True))
    return torch.autograd.grad(total, inputs, create_graph=True), inputs


@pytest.mark.parametrize("kind", ["shared", "none", "own", "complex"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_calls_one_by_one(norm, kind):
    if norm == "none" and kind == "none":
        norm = "head"
    tables, results = tables_of(kind), []
    for function in (joined, one_by_one):
        found, inputs = gradients(function, tensors(norm), tables, **NORMS[norm])
        second = torch.autograd.grad(sum(each.square().sum() for each in found), inputs)
        results.append((*found, *second))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["shared", "none", "own", "complex"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("records", [False, True])
def test_a_compiled_call_is_one_operator_with_the_bits_of_a_plain_one(norm, kind, records):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(joined, backend=backend, fullgraph=True)
    tables = tables_of(kind)
    if records:
        own = gradients(joined, tensors(norm), tables, **NORMS[norm])[0]
        found = gradients(compiled, tensors(norm), tables, **NORMS[norm])[0]
    else:
        made = tensors(norm)
        own = joined(made, tables, **NORMS[norm])
        found = compiled(made, tables, **NORMS[norm])
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if "rope_cupy" in str(node.target)]
    assert operators == ["rope_cupy.join"]
    assert all(torch.equal(*each) for each in zip(found, own, strict=True))


def compile_once_for_all_lengths_and_copy_nothing():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    made, tables = tensors("head"), tables_of("none")
    compiled = torch.compile(joined, fullgraph=True, dynamic=True)
    with torch.no_grad():
        found, (code,) = run_and_get_code(compiled, made, tables, norm="head")
        assert all(map(torch.equal, found, joined(made, tables, norm="head")))
        assert code.count("rope_cupy.join_new.default(") == 1
        assert "cpp_fused" not in code and ".copy_(" not in code
        longer = tensors("head", text=7, image=13)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(longer, tables, norm="head")
        assert all(map(torch.equal, found, joined(longer, tables, norm="head")))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_joint_tensors_that_are_given_are_written_by_a_compiled_call(backend):
    write_what_is_given(backend)


def write_what_is_given(backend):
    torch._dynamo.reset()
    made, tables = tensors("head"), tables_of("shared")
    with torch.no_grad():
        expected = joined(made, tables, norm="head")
        out = tuple(torch.full_like(y, 7) for y in expected)
        compiled = torch.compile(joined, backend=backend, fullgraph=True)
        found = compiled(made, tables, norm="head", out=out)
    for y, given, wanted in zip(found, out, expected, strict=True):
        assert y is given and torch.equal(y, wanted)


def test_inductor_compiles_one_operator_that_is_right():
    calls = "compile_once_for_all_lengths_and_copy_nothing()", "write_what_is_given('inductor')"
    in_a_process("; ".join(["import test_join_torch as own", *(f"own.{call}" for call in calls)]))


def test_joint_tensors_that_are_given_record_no_gradient():
    made, tables = tensors(), tables_of("shared")
    out = tuple(joined(made, tables))
    for each in made["image"]:
        each.requires_grad_()
    for function in (joined, torch.compile(joined, backend="eager")):
        with pytest.raises(Exception, match="out must be None where a gradient is recorded"):
            function(made, tables, out=out)


def apart(q, k, tables, **options):
    weights = options.pop("weights", None)
    rotate = rope_cupy.apply_rotary_qk if weights is None else rope_cupy.apply_qk_norm_rotary
    return rotate(q, k, *(weights or ()), tables[0], k_table=tables[1], k_positions=3, **options)


@pytest.mark.parametrize("normed", [False, True])
def test_k_with_a_table_of_its_own_has_its_gradients_plain_and_compiled(normed):
    tables, results = tables_of("own"), []

    def separately(q, k, tables, weights=None):
        if weights is None:
            return (
                rope_cupy.apply_rotary(q, tables[0]),
                rope_cupy.apply_rotary(k, tables[1], positions=3),
            )
        return (
            rope_cupy.apply_norm_rotary(q, weights[0], tables[0]),
            rope_cupy.apply_norm_rotary(k, weights[1], tables[1], positions=3),
        )

    torch._dynamo.reset()
    for function in (apart, separately, torch.compile(apart, backend="aot_eager", fullgraph=True)):
        made = tensors("head")
        inputs = [made["text"][0], made["image"][1], made["text"][3], made["image"][4]]
        inputs = [each.requires_grad_() for each in inputs][: 4 if normed else 2]
        q_out, k_out = function(*inputs[:2], tables, **({"weights": inputs[2:]} if normed else {}))
        total = (q_out.square() * q_out).sum() + (k_out.square() * k_out).sum()
        results.append(torch.autograd.grad(total, inputs))
    for ours, theirs, compiled in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.allclose(compiled, theirs, rtol=1e-12, atol=1e-12)


def test_k_with_a_table_of_its_own_is_rotated_in_place_where_gradients_are_recorded():
    tables = tables_of("own")
    q, k = (torch.randn(2, n, 2, 16, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    expected = apart(q, k, tables)
    q_own, k_own = q * 1, k * 1
    found = apart(q_own, k_own, tables, out=(q_own, k_own))
    assert found[0] is q_own and all(map(torch.equal, found, expected))
    grads = [torch.autograd.grad([y.sum() for y in each], (q, k)) for each in (found, expected)]
    assert all(map(torch.equal, *grads))
    before = q.detach().clone()
    copied = k * 1
    with pytest.raises(ValueError, match="q must not be a leaf"):
        apart(q, copied, tables, out=(q, copied))
    assert torch.equal(q, before) and torch.equal(copied, k)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize(
    "v",
    [(5, 2, 8), (3, 2, 6), (3, 2, 8, torch.float64), (3, 2, 8, torch.int32), (3, 2, 8, "meta")],
    ids=str,
)
def test_v_is_checked_whether_a_gradient_is_recorded_or_not(v, records):
    *shape, kind = v if len(v) > 3 else (*v, torch.float32)
    own = {"device": "meta"} if kind == "meta" else {"dtype": kind}
    q, k = torch.ones(1, 3, 4, 8, requires_grad=records), torch.ones(1, 3, 2, 8)
    streams = [Stream(q, k, torch.ones(1, *shape, **own), (angles(9, 4).cos(), angles(9, 4).sin()))]
    with pytest.raises((TypeError, ValueError), match=r"streams\[0\].*v must have"):
        join_qkv(streams)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"v must have|Observed exception"):
        torch.compile(join_qkv, backend="aot_eager", fullgraph=True)(streams)


def test_a_compiled_call_writes_no_stream_that_another_one_reads_and_none_too_long():
    def exchanged(q, k, v):
        parts = [[x[:, 2:] for x in (q, k, v)], [x[:, :2] for x in (q, k, v)]]
        return join_qkv([Stream(*each) for each in parts], out=(q, k, v))

    torch._dynamo.reset()
    xs = [torch.randn(1, 4, 1, 4) for _ in range(3)]
    wanted = [x.roll(2, 1) for x in xs]
    found = torch.compile(exchanged, backend="aot_eager", fullgraph=True)(*xs)
    assert all(map(torch.equal, found, wanted))
    with pytest.raises(ValueError, match=r"streams\[0\].q_out must .* with streams\[1\].q"):
        exchanged(*xs)
    out = [torch.ones(1, n, 1, 4) for n in (4, 5, 9)]
    with pytest.raises(Exception, match=r"of all tokens|Observed exception"):
        torch.compile(join_qkv, backend="aot_eager")([Stream(*xs)], out=tuple(out))


@pytest.mark.parametrize("records", [False, True])
def test_joint_tensors_lie_in_memory_as_the_first_stream_does(records):
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_(records)
    for y in join_qkv([Stream(x, x, x), Stream(x, x, x)], layout="bhsd"):
        assert y.shape == (2, 3, 10, 4) and y.stride() == (120, 4, 12, 1)


def test_second_gradients_of_a_bias_without_a_weight_are_there():
    half = angles(3, 2).cos(), angles(3, 2).sin()
    x, g = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(2))
    bias = torch.randn(4, requires_grad=True)
    y = rope_cupy.apply_norm_rotary(x, None, half, norm="layer", bias=bias)
    x_grad, bias_grad = torch.autograd.grad(y, (x, bias), g, create_graph=True)
    total = x_grad.square().sum() + bias_grad.sum()
    assert all(each.abs().sum() > 0 for each in torch.autograd.grad(total, (x, g)))


@pytest.mark.parametrize(
    "k", [(4, 5, 2, 16), (1, 5, 2, 8), (5, 2, 16), (1, 5, 2, 16, torch.float64)], ids=str
)
def test_k_with_positions_of_its_own_differs_in_heads_and_tokens_alone(k):
    *shape, dtype = k if k[-1] is torch.float64 else (*k, torch.float32)
    q, k = torch.ones(1, 3, 2, 16), torch.ones(shape, dtype=dtype)
    compiled = torch.compile(rope_cupy.apply_rotary_qk, backend="eager")
    for function in (rope_cupy.apply_rotary_qk, compiled):
        with pytest.raises(Exception, match=r"k must have|Observed exception"):
            function(q, k, (angles(9).cos(), angles(9).sin()), k_positions=0)


def test_streams_that_are_known_without_gradients_record_them_where_they_are_wanted():
    made, tables = tensors("head"), tables_of("own")
    for each in made.values():
        for i in (0, 3):
            each[i] = torch.nn.Parameter(each[i])
    with torch.no_grad():
        known = [joined(made, tables, norm="head") for _ in range(4)][-1]
    assert not any(y.requires_grad for y in known)
    results = joined(made, tables, norm="head")
    assert results[0].requires_grad and not results[2].requires_grad
    results[0].sum().backward()
    assert all(each[i].grad is not None for each in made.values() for i in (0, 3))
    for y, wanted in zip(results, known, strict=True):
        assert torch.equal(y, wanted)


def test_a_compiled_call_says_which_stream_goes_beyond_its_table():
    half = angles(9, 2).cos(), angles(9, 2).sin()
    text, image = ([torch.randn(1, tokens, 1, 4) for _ in range(3)] for tokens in (2, 3))

    def join_from(first):
        return join_qkv([Stream(*text, half), Stream(*image, half, first)])

    torch._dynamo.reset()
    compiled = torch.compile(join_from, backend="aot_eager", fullgraph=True, dynamic=True)
    for first in 3, 6:
        for y, wanted in zip(compiled(first), join_from(first), strict=True):
            assert torch.equal(y, wanted)
    with pytest.raises(ValueError, match=r"streams\[1\]: table must hold the positions 7 to 9"):
        compiled(7)
