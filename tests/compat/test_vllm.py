"""rope_cupy.compat.vllm, over the matrix of vLLM's own tests in small."""

from typing import ClassVar

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    both_elements,
    check,
    double,
    eager,
    normalised,
    rotate,
    share_of_equal,
    table,
    values,
)

from rope_cupy.compat import vllm

H, K, D = 4, 2, 64
pytestmark = pytest.mark.parametrize("device", DEVICES)
styles = pytest.mark.parametrize("is_neox", [True, False])


def cache(rows, rotary_dim, dtype, device):
    return torch.cat(table(rows, rotary_dim // 2, dtype=dtype, device=device), -1)


def rows_of(cos_sin, positions):
    rows = double(cos_sin)[positions.cpu().long()]
    return rows.chunk(2, -1)


@styles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["flat", "heads", "batch flat", "batch heads"])
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
def test_rotary_embedding(rotary_dim, form, cache_dtype, dtype, is_neox, device):
    cos_sin = cache(40, rotary_dim, cache_dtype, device)
    shape = (2, 5) if "batch" in form else (10,)
    positions = torch.tensor([0, 5, 3, 3, 39, 7, 8, 9, 1, 0], device=device).reshape(shape)
    q = values(*shape, H, D, dtype=dtype, device=device)
    k = values(*shape, K, D, dtype=dtype, device=device)
    before = q.clone(), k.clone()
    given = (q.flatten(-2), k.flatten(-2)) if "flat" in form else (q, k)
    assert vllm.rotary_embedding(positions, *given, D, cos_sin, is_neox) is None
    for y, x in zip((q, k), before, strict=True):
        cos, sin = (part[..., None, :] for part in rows_of(cos_sin, positions))
        check(y, rotate(x, cos, sin, interleaved=not is_neox))  # one rounding


@styles
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("with_key", [False, True])
def test_an_offset_in_the_head_the_inverse_and_strided_views(
    with_key, inverse, dtype, is_neox, device
):
    cos_sin = cache(40, 32, torch.float32, device)
    positions = torch.tensor([0, 5, 39], dtype=dtype, device=device)
    packed = values(3, (H + K) * D, dtype=torch.bfloat16, device=device)
    before = packed.clone().unflatten(1, (H + K, D))
    q, k = packed.split([H * D, K * D], 1)
    key = k if with_key else None
    vllm.rotary_embedding(positions, q, key, D, cos_sin, is_neox, D - 32, inverse)
    cos, sin = (part[:, None] for part in rows_of(cos_sin, positions))
    expected = rotate(before, cos, sin, interleaved=not is_neox, conjugate=inverse, offset=D - 32)
    check(packed.unflatten(1, (H + K, D))[:, :H], expected[:, :H])
    keys = packed.unflatten(1, (H + K, D))[:, H:]
    if with_key:
        check(keys, expected[:, H:])
    else:
        assert torch.equal(keys, before[:, H:])


@styles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize("num_heads_v", [K, 3])
def test_fused_qk_norm_rope_rounds_once(num_heads_v, rotary_dim, dtype, is_neox, device):
    cos_sin = cache(600, rotary_dim, dtype, device)
    positions = torch.arange(50, 550, device=device)
    heads = H + K + num_heads_v
    qkv = values(500, heads * D, dtype=dtype, device=device)
    before = qkv.clone().unflatten(1, (heads, D))
    weights = [
        torch.nn.Parameter(values(D, dtype=dtype, device=device, seed=i) + 1) for i in range(2)
    ]
    result = vllm.fused_qk_norm_rope(
        qkv, H, K, num_heads_v, D, 1e-5, *weights, cos_sin, is_neox, positions
    )
    assert result is None and not qkv.requires_grad
    y = qkv.unflatten(1, (heads, D))
    assert torch.equal(y[:, H + K :], before[:, H + K :])
    cos, sin = (part[:, None] for part in rows_of(cos_sin, positions))
    for part, weight in ((slice(0, H), weights[0]), (slice(H, H + K), weights[1])):
        normed = normalised(before[:, part], weight, 1e-5)
        exact = rotate(normed, cos, sin, interleaved=not is_neox)
        check(y[:, part], exact)
        twice = rotate(normed.to(dtype), cos, sin, interleaved=not is_neox).to(dtype)
        if dtype != torch.float32:
            assert share_of_equal(y[:, part].cpu(), exact.to(dtype)) > 0.998
            assert share_of_equal(twice, exact.to(dtype)) < 0.9


def test_fused_qk_norm_rope_wants_all_heads(device):
    qkv = values(3, 7 * D, dtype=torch.float32, device=device)
    weight, cos_sin = torch.ones(D, device=device), cache(8, D, torch.float32, device)
    with pytest.raises(ValueError, match="qkv must have 4 \\+ 2 \\+ 2 heads"):
        vllm.fused_qk_norm_rope(
            qkv, 4, 2, 2, D, 1e-6, weight, weight, cos_sin, True, torch.arange(3, device=device)
        )


def axes_of(sections, pairs, interleaved):
    """The axis of each pair: by sections, or every third pair for the second and the third."""
    axes = []
    for pair in range(pairs):
        if interleaved:
            axis = pair % 3 if pair % 3 and pair < 3 * sections[pair % 3] else 0
        else:
            axis = 0 if pair < sections[0] else 1 if pair < sections[0] + sections[1] else 2
        axes.append(axis)
    return axes


@styles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize(
    ("sections", "interleaved"),
    [((8, 12, 12), False), ((12, 10, 10), True), ((4, 6, 6), False), ((6, 20, 20), True)],
)
@pytest.mark.parametrize("memory", ["contiguous", "rows", "strided"])
def test_triton_mrope_rounds_every_operation(
    memory, sections, interleaved, rotary_dim, dtype, is_neox, device
):
    pairs, tokens = rotary_dim // 2, 200
    positions = torch.randint(0, 90, (3, tokens), generator=torch.Generator().manual_seed(1))
    cos, sin = (part[positions] for part in table(90, pairs, dtype=dtype))
    cos, sin = cos.to(device), sin.to(device)
    wide = values(tokens, (H + K) * D, dtype=dtype, device=device)
    q, k = wide.split([H * D, K * D], 1)
    if memory == "contiguous":
        q, k = q.contiguous(), k.contiguous()
    elif memory == "strided":
        q, k = (x.T.contiguous().T for x in (q, k))
    before = q.clone(), k.clone()
    results = vllm.triton_mrope(q, k, cos, sin, [*sections], D, rotary_dim, interleaved, is_neox)
    axes = torch.tensor(axes_of(sections, pairs, interleaved))
    chosen = [part.cpu()[axes, :, torch.arange(pairs)].T for part in (cos, sin)]
    full = [both_elements(part, not is_neox)[:, None] for part in chosen]
    for y, x, one in zip(results, before, (q, k), strict=True):
        heads = x.cpu().unflatten(1, (-1, D))
        expected = eager(heads, *full, interleaved=not is_neox).flatten(1)
        exact = rotate(heads, *(part[:, None] for part in chosen), interleaved=not is_neox)
        assert y.is_contiguous() == (memory != "rows")
        assert share_of_equal(y.cpu(), expected) > (0.999 if dtype == torch.bfloat16 else 0.9)
        assert share_of_equal(exact.flatten(1).to(dtype), expected) < 0.99 or dtype.itemsize > 2
        assert (y is one) == (memory != "strided")
        assert y is one or torch.equal(one, x)  # whose rows are not contiguous is left as it is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_beta", [0.0, 1.0])
@pytest.mark.parametrize("rotary_dim", [D, D // 4])
@pytest.mark.parametrize("of_axes", [False, True])
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64], ids=str)
def test_norm_rotation_and_gate(position_dtype, of_axes, rotary_dim, norm_beta, dtype, device):
    tokens, pairs = 60, rotary_dim // 2
    cos_sin = cache(90, rotary_dim, torch.float32, device)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 90, (3, tokens), generator=generator).to(device, position_dtype)
    sections = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3) if of_axes else None
    q_gate = values(tokens, H * 2 * D, dtype=dtype, device=device)
    k = values(tokens, K * D, dtype=dtype, device=device)
    weights = [torch.nn.Parameter(values(D, dtype=dtype, device=device, seed=i)) for i in range(2)]
    given = positions if of_axes else positions[0]
    q_out, k_out, gate = vllm.fused_qk_rmsnorm_rope_gate(
        q_gate, k, *weights, cos_sin, given, 1e-6, H, K, D, rotary_dim, sections, norm_beta
    )
    both = q_gate.unflatten(1, (H, 2, D))
    assert torch.equal(gate, both[:, :, 1].flatten(1))
    axes = axes_of(sections, pairs, True) if of_axes else [0] * pairs
    index = positions.cpu().long()[axes].T
    cos, sin = (part[index, torch.arange(pairs)][:, None] for part in double(cos_sin).chunk(2, -1))
    parts = (q_out, both[:, :, 0], weights[0]), (k_out, k.unflatten(1, (K, D)), weights[1])
    for y, x, weight in parts:
        assert y.is_contiguous() and not y.requires_grad
        rounded = normalised(x, weight, offset=norm_beta).to(dtype)  # as a norm of its own
        check(y, rotate(rounded, cos, sin).flatten(1), share=0.998)


def test_sections_go_with_positions_of_three_axes(device):
    q_gate = values(5, H * 2 * D, dtype=torch.bfloat16, device=device)
    k = values(5, K * D, dtype=torch.bfloat16, device=device)
    weight = torch.ones(D, dtype=torch.bfloat16, device=device)
    cos_sin, positions = cache(9, D, torch.float32, device), torch.arange(5, device=device)
    about = 1e-6, H, K, D
    with pytest.raises(ValueError, match="mrope_section must be given with"):
        vllm.fused_qk_rmsnorm_rope_gate(
            q_gate, k, weight, weight, cos_sin, positions, *about, D, (12, 10, 10)
        )
    with pytest.raises(ValueError, match="cos_sin_cache must have rotary_dim=32 columns"):
        vllm.fused_qk_rmsnorm_rope_gate(q_gate, k, weight, weight, cos_sin, positions, *about, 32)


def vllm_layer(is_neox, method):
    """A class as vLLM's RotaryEmbedding, with a registry of its own as CustomOp has it.

    A class that is registered under the name of another is made in its place, and an object picks
    one of its methods when it is made.
    """

    class RotaryEmbedding(torch.nn.Module):
        registry: ClassVar = {}

        @classmethod
        def register_oot(cls, registered):
            assert cls.__name__ not in cls.registry
            cls.registry[cls.__name__] = registered
            return registered

        def __new__(cls, *args):
            return super().__new__(cls.registry.get(cls.__name__, cls))

        def __init__(self):
            super().__init__()
            self.head_size, self.is_neox_style = D, is_neox
            self.register_buffer("cos_sin_cache", cache(40, D, torch.float32, "cpu"))
            self.picked = getattr(self, method)

        def forward_cuda(self, positions, query, key=None):
            raise AssertionError("vLLM's own kernel")

        def forward_oot(self, positions, query, key=None):
            raise AssertionError("the method that an override has to have")

        def forward(self, *args):
            return self.picked(*args)

    return RotaryEmbedding


@styles
@pytest.mark.parametrize("method", ["forward_cuda", "forward_oot"])
def test_the_class_for_vllms_registry(method, is_neox, device):
    RotaryEmbedding = vllm_layer(is_neox, method)  # noqa: N806

    @RotaryEmbedding.register_oot
    class CupyRotaryEmbedding(vllm.RotaryEmbeddingOverride, RotaryEmbedding):
        pass

    layer = RotaryEmbedding()  # as a model of vLLM makes it
    assert type(layer) is CupyRotaryEmbedding
    positions = torch.tensor([0, 39, 3], device=device)
    q = values(3, H * D, dtype=torch.bfloat16, device=device)
    k = values(3, K * D, dtype=torch.bfloat16, device=device)
    before = q.clone()
    q_out, k_out = layer(positions, q, k)
    assert q_out is q and k_out is k
    cos, sin = (part[:, None] for part in rows_of(layer.cos_sin_cache, positions))
    expected = rotate(before.unflatten(1, (H, D)), cos, sin, interleaved=not is_neox)
    check(q, expected.flatten(1))
    assert layer(positions, q)[1] is None
