"""rope_cupy.compat.quack, over the matrix of quack's own tests in small."""

import pytest
import torch
from compat_reference import DEVICES, check, double, rotate, table, values

from rope_cupy.compat.quack import (
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

B, S, H, D = 3, 11, 4, 32
OFFSETS = torch.tensor([3, 0, 7], dtype=torch.int32)
pytestmark = pytest.mark.parametrize("device", DEVICES)
interleavings = pytest.mark.parametrize("interleaved", [False, True])
offsets_or_none = pytest.mark.parametrize("with_offsets", [False, True])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def rows(cos, sin, with_offsets):
    index = torch.arange(S)[None] + (OFFSETS[:, None] if with_offsets else 0)
    return double(cos)[index][:, :, None], double(sin)[index][:, :, None]


@dtypes
@interleavings
@offsets_or_none
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_tensor_and_its_gradient(inplace, rotary_dim, with_offsets, interleaved, dtype, device):
    x = values(B, S, H, D, dtype=dtype, device=device).requires_grad_()
    before = x.detach().clone()
    cos, sin = table(2 * S, rotary_dim // 2, dtype=dtype, device=device)
    y = apply_rotary_emb(
        x,
        cos,
        sin,
        interleaved=interleaved,
        inplace=inplace,
        seqlen_offsets=OFFSETS.to(device) if with_offsets else None,
    )
    gradient = values(B, S, H, D, dtype=dtype, device=device, seed=1)
    kept = gradient.clone()
    (dx,) = torch.autograd.grad(y, x, gradient)
    parts = rows(cos, sin, with_offsets)
    check(y, rotate(before, *parts, interleaved=interleaved))
    check(dx, rotate(kept, *parts, interleaved=interleaved, conjugate=True))
    # A leaf is written in place, and so is the gradient that comes in.
    assert (y.data_ptr() == x.data_ptr()) == inplace
    assert (dx.data_ptr() == gradient.data_ptr()) == inplace
    assert torch.equal(gradient, dx if inplace else kept)


@interleavings
@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("headdim", "rotary_dim"), [(32, 8), (64, 64), (96, 72), (104, 64), (100, 68), (512, 256)]
)
def test_sizes_and_dtypes(
    headdim, rotary_dim, table_dtype, x_dtype, conjugate, interleaved, device
):
    x = values(1, 17, 3, headdim, dtype=x_dtype, device=device)
    cos, sin = table(20, rotary_dim // 2, dtype=table_dtype, device=device)
    y = apply_rotary(x, cos, sin, interleaved=interleaved, conjugate=conjugate)
    cos, sin = cos[:17, None], sin[:17, None]
    check(y, rotate(x, cos, sin, interleaved=interleaved, conjugate=conjugate))


@interleavings
def test_strided_tables_and_views(interleaved, device):
    x = values(B, S, 3, H, D, dtype=torch.float32, device=device)[:, :, 1]
    cos, sin = (part[:, 8:24] for part in table(S, 32, dtype=torch.float32, device=device))
    y = apply_rotary_emb(x, cos, sin, interleaved=interleaved)
    check(y, rotate(x, cos[:, None], sin[:, None], interleaved=interleaved))


@dtypes
@interleavings
@offsets_or_none
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_sequences_and_their_gradient(inplace, with_offsets, interleaved, dtype, device):
    lengths = [4, 11, 2]
    cu_seqlens = torch.tensor([0, 4, 15, 17], dtype=torch.int32, device=device)
    x = values(17, H, D, dtype=dtype, device=device).requires_grad_()
    before = x.detach().clone()
    cos, sin = table(2 * S, D // 2, dtype=dtype, device=device)
    given = OFFSETS.to(device) if with_offsets else None
    y = apply_rotary_emb(x, cos, sin, interleaved, inplace, given, cu_seqlens, 11)
    gradient = values(17, H, D, dtype=dtype, device=device, seed=1)
    kept = gradient.clone()
    y.backward(gradient)
    starts = OFFSETS.tolist() if with_offsets else [0] * 3
    index = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
    parts = double(cos)[index][:, None], double(sin)[index][:, None]
    check(y, rotate(before, *parts, interleaved=interleaved))
    check(x.grad, rotate(kept, *parts, interleaved=interleaved, conjugate=True))


@interleavings
@offsets_or_none
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("packing", ["three", "strided", "heads", "flat"])
def test_packed_qkv_and_its_gradient(packing, leaf, with_offsets, interleaved, device):
    nk = H if packing in ("three", "strided") else 2
    parts = [values(B, S, n, D, device=device, seed=i) for i, n in enumerate((H, nk, nk))]
    gradients = [values(B, S, n, D, device=device, seed=5 + i) for i, n in enumerate((H, nk, nk))]

    def packed(parts):
        if packing in ("three", "strided"):
            whole = torch.stack(parts, 2).float()
            strided = whole.transpose(2, 3).contiguous().transpose(2, 3)
            return strided if packing == "strided" else whole
        whole = torch.cat(parts, 2).float()
        return whole.flatten(2) if packing == "flat" else whole

    start = packed(parts).requires_grad_()
    qkv = start if leaf else start * 1
    cos, sin = table(2 * S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary_emb_qkv_(
        qkv,
        cos,
        sin,
        interleaved=interleaved,
        seqlen_offsets=OFFSETS.to(device) if with_offsets else None,
        num_heads_q=None if packing in ("three", "strided") else H,
        headdim=D if packing == "flat" else None,
    )
    assert y.data_ptr() == qkv.data_ptr()
    gradient = packed(gradients)
    (dqkv,) = torch.autograd.grad(y, start, gradient)
    if leaf and packing != "strided":  # whose gradient is not contiguous: a new one is made
        assert dqkv.data_ptr() == gradient.data_ptr()
    tables = rows(cos, sin, with_offsets)
    for result, inputs, conjugate in ((y, parts, False), (dqkv, gradients, True)):
        rounded = [x.float() for x in inputs]
        q, k = (
            rotate(x, *tables, interleaved=interleaved, conjugate=conjugate) for x in rounded[:2]
        )
        expected = [q, k, double(rounded[2])]
        join = torch.stack if packing in ("three", "strided") else torch.cat
        expected = join(expected, dim=2)
        check(result, expected.flatten(2) if packing == "flat" else expected)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_packed_sequences_of_packed_qkv(dense, flat, device):
    shape = (2, 8, H + 4, D) if dense else (16, H + 4, D)
    qkv = values(*shape, dtype=torch.float32, device=device)
    before = qkv.clone().reshape(16, H + 4, D)
    cu_seqlens = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    given = qkv.flatten(-2) if flat else qkv
    y = apply_rotary_emb_qkv_(
        given,
        cos,
        sin,
        num_heads_q=H,
        cu_seqlens=cu_seqlens,
        max_seqlen=11,
        headdim=D if flat else None,
    )
    assert y is given
    index = torch.cat([torch.arange(5), torch.arange(11)])
    tables = double(cos)[index][:, None], double(sin)[index][:, None]
    expected = torch.cat([rotate(before[:, : H + 2], *tables), double(before[:, H + 2 :])], 1)
    check(y.reshape(16, H + 4, D), expected)


@interleavings
@pytest.mark.parametrize("leaf", [True, False])
def test_packed_kv_and_its_gradient(leaf, interleaved, device):
    start = values(B, S, 2, H, D, dtype=torch.float32, device=device).requires_grad_()
    before = start.detach().clone()
    kv = start if leaf else start * 1
    cos, sin = table(2 * S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary_emb_kv_(kv, cos, sin, interleaved, OFFSETS.to(device))
    gradient = values(*kv.shape, dtype=torch.float32, device=device, seed=1)
    kept = gradient.clone()
    y.backward(gradient)
    assert torch.equal(gradient, kept)
    for result, x, conjugate in ((y, before, False), (start.grad, gradient, True)):
        tables = rows(cos, sin, True)
        k = rotate(x[:, :, 0], *tables, interleaved=interleaved, conjugate=conjugate)
        check(result, torch.stack([k, double(x[:, :, 1])], 2))


def test_a_view_of_a_leaf_is_written_in_place(device):
    qkv = values(1, S, 3, H, D, dtype=torch.float32, device=device).requires_grad_()
    before = qkv.detach().clone()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary_emb(qkv[:, :, 1], cos, sin, inplace=True)
    gradient = values(1, S, H, D, dtype=torch.float32, device=device, seed=2)
    expected = rotate(gradient, cos[:, None], sin[:, None], conjugate=True)
    y.backward(gradient)
    check(y, rotate(before[:, :, 1], cos[:, None], sin[:, None]))
    assert torch.equal(qkv[:, :, 1], y) and torch.equal(qkv[:, :, 0], before[:, :, 0])
    check(qkv.grad[:, :, 1], expected)
    assert not qkv.grad[:, :, [0, 2]].any()


def test_a_broadcast_gradient_is_rotated(device):
    x = values(1, S, H, D, dtype=torch.float32, device=device).requires_grad_()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    apply_rotary_emb(x, cos, sin, inplace=True).sum().backward()
    ones = torch.ones(1, S, H, D)
    check(x.grad, rotate(ones, cos[:, None], sin[:, None], conjugate=True))


def test_the_plain_function_records_no_gradient(device):
    x = values(1, S, H, D, dtype=torch.float32, device=device).requires_grad_()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    assert not apply_rotary(x, cos, sin).requires_grad
    assert apply_rotary(x, cos, sin, inplace=True) is x
