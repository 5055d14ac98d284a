"""rope_cupy.compat.flash_attn, over the matrix of flash-attention's own tests in small."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    both_elements,
    check,
    double,
    eager,
    rotate,
    table,
    values,
)

from rope_cupy.compat.flash_attn import (
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
)

B, S, H, D = 3, 11, 4, 32
pytestmark = pytest.mark.parametrize("device", DEVICES)
interleavings = pytest.mark.parametrize("interleaved", [False, True])
fractions = pytest.mark.parametrize("rotary_dim", [D, D // 2])
in_places = pytest.mark.parametrize("inplace", [False, True])


def offsets_of(kind, device):
    if kind == "int":
        return 5, torch.full((B,), 5)
    if kind == "none":
        return 0, torch.zeros(B, dtype=torch.int64)
    dtype = torch.int32 if kind == "int32" else torch.int64
    offsets = torch.tensor([3, 0, 7])
    return offsets.to(device, dtype), offsets


def rows(cos, sin, offsets, length=S):
    """cos and sin (batch, length, 1, pairs) of each batch's positions."""
    index = offsets[:, None] + torch.arange(length)
    return double(cos)[index][:, :, None], double(sin)[index][:, :, None]


@interleavings
@fractions
@in_places
@pytest.mark.parametrize("kind", ["none", "int", "int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_and_its_gradient(dtype, kind, inplace, rotary_dim, interleaved, device):
    x = values(B, S, H, D, dtype=dtype, device=device).requires_grad_()
    before = x.detach().clone()
    cos, sin = table(2 * S, rotary_dim // 2, dtype=dtype, device=device)
    given, offsets = offsets_of(kind, device)
    y = apply_rotary_emb(x, cos, sin, interleaved, inplace, given)
    cos_rows, sin_rows = rows(cos, sin, offsets)
    check(y, rotate(before, cos_rows, sin_rows, interleaved=interleaved))
    gradient = values(B, S, H, D, dtype=dtype, device=device, seed=1)
    kept = gradient.clone()
    y.backward(gradient)
    expected = rotate(gradient, cos_rows, sin_rows, interleaved=interleaved, conjugate=True)
    check(x.grad, expected)
    assert torch.equal(gradient, kept)  # the gradient that comes in is not written
    assert (y.data_ptr() == x.data_ptr()) == inplace
    assert torch.equal(x, y if inplace else before)


@interleavings
@in_places
@pytest.mark.parametrize("kind", ["none", "int32"])
def test_packed_sequences(kind, inplace, interleaved, device):
    lengths = [4, 11, 2]
    cu_seqlens = torch.tensor([0, 4, 15, 17], dtype=torch.int32, device=device)
    x = values(17, H, D, dtype=torch.bfloat16, device=device)
    before = x.clone()
    cos, sin = table(2 * S, D // 2, device=device, dtype=torch.bfloat16)
    given, offsets = offsets_of(kind, device)
    y = apply_rotary_emb_func(
        x,
        cos,
        sin,
        interleaved=interleaved,
        inplace=inplace,
        seqlen_offsets=given,
        cu_seqlens=cu_seqlens,
        max_seqlen=11,
    )
    parts = [torch.arange(n) + int(o) for n, o in zip(lengths, offsets, strict=True)]
    index = torch.cat(parts)
    cos_rows, sin_rows = double(cos)[index][:, None], double(sin)[index][:, None]
    check(y, rotate(before, cos_rows, sin_rows, interleaved=interleaved))
    assert (y is x) == inplace


def test_packed_sequences_with_one_offset(device):
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    x = values(9, H, D, dtype=torch.float32, device=device)
    cos, sin = table(2 * S, D // 2, device=device, dtype=torch.float32)
    y = apply_rotary(x, cos, sin, 3, cu_seqlens, 5)
    index = torch.cat([torch.arange(4), torch.arange(5)]) + 3
    check(y, rotate(x, double(cos)[index][:, None], double(sin)[index][:, None]))


@in_places
def test_positions_past_the_table_leave_tokens_as_they_are(inplace, device):
    x = values(B, S, H, D, dtype=torch.bfloat16, device=device)
    before = x.clone()
    cos, sin = table(S, D // 2, dtype=torch.bfloat16, device=device)
    offsets = torch.tensor([0, 4, 100], device=device)
    y = apply_rotary(x, cos, sin, offsets, inplace=inplace)
    rotated = rotate(before[1:2, : S - 4], double(cos)[4:, None], double(sin)[4:, None])
    check(y[1:2, : S - 4], rotated)
    assert torch.equal(y[1, S - 4 :], before[1, S - 4 :])  # cos is 1 and sin 0 there
    assert torch.equal(y[2], before[2])


def test_an_int_offset_past_the_table_is_refused(device):
    x = values(B, S, H, D, dtype=torch.float32, device=device)
    before = x.clone()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="table must hold the positions 1 to 11"):
        apply_rotary(x, cos, sin, 1, inplace=True)
    assert torch.equal(x, before)


@interleavings
def test_the_triton_entry_has_the_inverse_and_no_gradient(interleaved, device):
    x = values(B, S, H, D, dtype=torch.float32, device=device).requires_grad_()
    before = x.detach().clone()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary(x, cos, sin, interleaved=interleaved, conjugate=True)
    expected = rotate(before, cos[:, None], sin[:, None], interleaved=interleaved, conjugate=True)
    check(y, expected)
    assert not y.requires_grad
    assert apply_rotary(x, cos, sin, inplace=True) is x  # a leaf that requires a gradient
    check(x, rotate(before, cos[:, None], sin[:, None]))


@interleavings
@fractions
@pytest.mark.parametrize("packing", ["three", "heads", "strided"])
@pytest.mark.parametrize("own_tables_of_k", [False, True])
@pytest.mark.parametrize("leaf", [True, False])
def test_packed_qkv_and_its_gradient(
    leaf, own_tables_of_k, packing, rotary_dim, interleaved, device
):
    dtype = torch.float32
    shape = (B, S, 3, H, D) if packing != "heads" else (B, S, H + 2 * 2, D)
    qkv = values(*shape, dtype=dtype, device=device)
    if packing == "strided":  # the three and the heads cannot be seen as one axis
        qkv = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    before = qkv.clone()
    start = qkv.requires_grad_()
    qkv = start if leaf else start * 1
    cos, sin = table(2 * S, rotary_dim // 2, dtype=dtype, device=device)
    cos_k, sin_k = (cos * 2, sin * 2) if own_tables_of_k else (None, None)
    offsets = torch.tensor([3, 0, 7], device=device)
    num_heads_q = H if packing == "heads" else None
    y = apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, interleaved, offsets, num_heads_q)
    assert y.data_ptr() == qkv.data_ptr()
    gradient = values(*shape, dtype=dtype, device=device, seed=1)
    y.backward(gradient)

    def expected(x, conjugate):
        parts = x.unbind(2) if packing != "heads" else x.split([H, 2, 2], 2)
        rotated = []
        for part, scale in zip(parts[:2], (1, 2 if own_tables_of_k else 1), strict=True):
            tables = (scale * each for each in rows(cos, sin, offsets.cpu()))
            rotated.append(rotate(part, *tables, interleaved=interleaved, conjugate=conjugate))
        join = torch.stack if packing != "heads" else torch.cat
        return join([*rotated, double(parts[2])], dim=2)

    check(y, expected(before, False))
    check(start.grad, expected(gradient, True))


@interleavings
@pytest.mark.parametrize("leaf", [True, False])
def test_packed_kv_and_its_gradient(leaf, interleaved, device):
    kv = values(B, S, 2, H, D, dtype=torch.float32, device=device)
    before = kv.clone()
    start = kv.requires_grad_()
    kv = start if leaf else start * 1
    cos, sin = table(2 * S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary_emb_kv_(kv, cos, sin, interleaved, 2)
    gradient = values(*kv.shape, dtype=torch.float32, device=device, seed=1)
    y.backward(gradient)
    assert y.data_ptr() == kv.data_ptr()
    for result, x, conjugate in ((y, before, False), (start.grad, gradient, True)):
        k = rotate(
            x[:, :, 0],
            cos[2 : S + 2, None],
            sin[2 : S + 2, None],
            interleaved=interleaved,
            conjugate=conjugate,
        )
        check(result, torch.stack([k, double(x[:, :, 1])], 2))


def test_a_gradient_that_two_branches_share_is_not_written(device):
    x, other = (values(1, S, H, D, dtype=torch.float32, device=device) for _ in range(2))
    x.requires_grad_()
    other.requires_grad_()
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    y = apply_rotary_emb(x * 1, cos, sin, inplace=True) + other  # both get one gradient
    gradient = values(1, S, H, D, dtype=torch.float32, device=device, seed=2)
    y.backward(gradient)
    assert torch.equal(other.grad, gradient)
    check(x.grad, rotate(gradient, cos[:, None], sin[:, None], conjugate=True))


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


def test_second_gradients(device):
    x = values(1, 3, 1, 4, device=device).requires_grad_()
    cos, sin = table(3, 2, device=device)
    assert torch.autograd.gradgradcheck(
        lambda x: apply_rotary_emb(x * 1, cos, sin, inplace=True), x
    )


@interleavings
@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("offset", [0, 3, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module(dtype, offset, scale_base, interleaved, device):
    rotary = RotaryEmbedding(D, 1000.0, interleaved, scale_base, device)
    length = 2 * S
    options = {"seqlen_offset": offset, "max_seqlen": length}
    offsets = torch.full((B,), 0 if offset == "tensor" else offset)
    if offset == "tensor":
        offsets = torch.tensor([3, 0, 7])
        options["seqlen_offset"] = offsets.to(device)
    angles = torch.arange(length).double()[:, None] * 1000.0 ** -(
        torch.arange(0, D, 2).double() / D
    )
    scale = torch.ones(D // 2, dtype=torch.float64)
    power = torch.zeros(length, 1, dtype=torch.float64)
    if scale_base:
        scale = (torch.arange(0, D, 2).double() + 0.4 * D) / (1.4 * D)
        power = (torch.arange(length).double()[:, None] - length // 2) / scale_base
    tables = [
        [
            (part * scale ** (sign * power)).float().to(dtype)
            for part in (angles.cos(), angles.sin())
        ]
        for sign in (1, -1)
    ]
    qkv = values(B, S, 3, H, D, dtype=dtype, device=device)
    q, k, v = (double(x) for x in qkv.unbind(2))
    expected = [
        rotate(x, *rows(*each, offsets), interleaved=interleaved)
        for x, each in zip((q, k), tables, strict=True)
    ]
    kv = qkv[:, :, 1:].clone()
    q_alone = qkv[:, :, 0].clone()
    grouped = torch.cat([qkv[:, :, 0], qkv[:, :, 1, :2], qkv[:, :, 2, :2]], 2)
    tolerance = {"share": 0.97}  # the tables' angles are float32
    y = rotary(qkv, **options)
    assert y is qkv
    for i, each in enumerate([*expected, v]):
        check(y[:, :, i], each, **tolerance)
    q_out, kv_out = rotary(q_alone, kv, **options)
    check(q_out, expected[0], **tolerance)
    check(kv_out[:, :, 0], expected[1], **tolerance)
    assert torch.equal(kv_out[:, :, 1], kv[:, :, 1])
    grouped = rotary(grouped, num_heads_q=H, **options)
    check(grouped, torch.cat([expected[0], expected[1][:, :, :2], v[:, :, :2]], 2), **tolerance)


def test_the_module_grows_its_table_and_wants_a_length_for_tensors(device):
    rotary = RotaryEmbedding(D, device=device)
    qkv = values(B, S, 3, H, D, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        rotary(qkv, seqlen_offset=torch.zeros(B, dtype=torch.int32, device=device))
    rotary(qkv)
    assert rotary._cos_cached.shape == (S, D // 2)
    rotary(qkv, seqlen_offset=4)
    assert rotary._cos_cached.shape == (S + 4, D // 2)
    assert set(rotary.state_dict()) == set()
    rotary.half()(qkv.half(), max_seqlen=400)
    assert rotary._cos_cached.dtype == torch.float16
    exact = torch.outer(torch.arange(400).double(), 10000.0 ** -(torch.arange(0, D, 2) / D))
    error = double(rotary._sin_cached) - exact.sin()
    assert float(error.abs().max()) < 1e-3  # of frequencies in float16 it would be 0.1


def test_wrong_shapes_are_refused(device):
    cos, sin = table(S, D // 2, dtype=torch.float32, device=device)
    x = values(B, S, H, D, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="num_heads_q must be given"):
        apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(ValueError, match="qkv must have num_heads_q"):
        apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=3)
    with pytest.raises(ValueError, match="kv must have the shape"):
        apply_rotary_emb_kv_(x, cos, sin)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("by_batch", [False, True])
def test_the_plain_function_rounds_every_operation(by_batch, interleaved, device):
    x = values(2, 9, 3, 32, dtype=torch.bfloat16, device=device)
    cos, sin = table(9, 8, dtype=torch.bfloat16, device=device)
    if by_batch:
        cos, sin = torch.stack([cos, cos.flip(0)]), torch.stack([sin, sin.flip(0)])
    y = apply_rotary_emb_torch(x, cos, sin, interleaved)
    full = [both_elements(part, interleaved)[..., None, :] for part in (cos, sin)]
    assert torch.equal(y, eager(x, *full, interleaved=interleaved))
