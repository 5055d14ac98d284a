"""rope_cupy.compat.transformer_engine, over the matrix of TransformerEngine's tests in small."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    check,
    double,
    eager,
    elementwise,
    share_of_equal,
    transposed,
    values,
)

from rope_cupy.compat.transformer_engine import (
    RotaryPositionEmbedding,
    apply_fused_qkv_rotary_pos_emb,
    apply_rotary_pos_emb,
)

B, S, H, D = 2, 12, 3, 32
STARTS = torch.tensor([3, 0], dtype=torch.int32)
LENGTHS = [4, 8, 12, 4]  # of packed sequences
pytestmark = pytest.mark.parametrize("device", DEVICES)
interleavings = pytest.mark.parametrize("interleaved", [False, True])
starts = pytest.mark.parametrize("with_starts", [False, True])
fused_or_not = pytest.mark.parametrize("fused", [True, False])
formats = pytest.mark.parametrize("tensor_format", ["sbhd", "bshd"])
shards = pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1), (3, 2)])


def zigzag(length, cp_size, cp_rank):
    """The positions of the tokens that a process has: two of 2 cp_size pieces."""
    pieces = torch.arange(length * cp_size).chunk(2 * cp_size)
    return torch.cat([pieces[cp_rank], pieces[-1 - cp_rank]]) if cp_size > 1 else pieces_of(length)


def pieces_of(length):
    return torch.arange(length)


def angle_table(rows, width, device):
    """Angles (rows, 1, 1, width) in float32, each element's its own."""
    frequencies = 50.0 ** -(torch.arange(width).double() / width)
    angles = torch.outer(torch.arange(rows).double(), frequencies).float()
    return angles[:, None, None].to(device)


def of_rows(freqs, index):
    """Cosines and sines (batch, tokens, 1, width) of positions (batch, tokens)."""
    angles = double(freqs)[:, 0, 0][index][:, :, None]
    return angles.cos(), angles.sin()


def in_order(x, tensor_format):
    """(b, s, h, d) as a format has it, and back."""
    return x.transpose(0, 1) if tensor_format == "sbhd" else x


def agree(y, exact, fused):
    """fused=True is right but for one rounding, else as PyTorch's operations in y's dtype."""
    check(y, exact, share=0.999 if fused else 0.6)


@interleavings
@starts
@fused_or_not
@formats
@shards
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transpose", [None, (0, 1), (2, 3)])
def test_results_are_contiguous_and_right(
    transpose, dtype, cp_size, cp_rank, tensor_format, fused, with_starts, interleaved, device
):
    whole = values(B, S, H, D, dtype=dtype, device=device)
    t = in_order(whole, tensor_format).contiguous()
    if transpose:
        t = t.transpose(*transpose).contiguous().transpose(*transpose)
    t.requires_grad_()
    freqs = angle_table(S * cp_size + 4, D // 2, device)
    y = apply_rotary_pos_emb(
        t,
        freqs,
        tensor_format,
        STARTS.to(device) if with_starts else None,
        interleaved,
        fused,
        cp_size=cp_size,
        cp_rank=cp_rank,
    )
    gradient = values(*t.shape, dtype=dtype, device=device, seed=1)
    y.backward(gradient)
    assert y.is_contiguous() and t.grad is not None
    index = zigzag(S, cp_size, cp_rank)[None] + (STARTS[:, None] if with_starts else 0)
    cos, sin = of_rows(freqs, index.expand(B, S))
    agree(in_order(y, tensor_format), elementwise(whole, cos, sin, interleaved=interleaved), fused)
    dy = in_order(gradient, tensor_format)
    agree(in_order(t.grad, tensor_format), transposed(dy, cos, sin, interleaved=interleaved), fused)
    if not fused:  # bit by bit what operations in t's dtype give
        expected = eager(whole.cpu(), cos.to(dtype), sin.to(dtype), interleaved=interleaved)
        least = 0.999 if dtype != torch.float32 else 0.9
        assert share_of_equal(in_order(y, tensor_format).detach().cpu(), expected) > least


@interleavings
@starts
@fused_or_not
@shards
@pytest.mark.parametrize("transpose", [None, (1, 2)])
def test_packed_sequences(transpose, cp_size, cp_rank, fused, with_starts, interleaved, device):
    lengths = [n * cp_size for n in LENGTHS]  # multiples of 2 cp_size
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(device)
    t = values(sum(LENGTHS), H, D, dtype=torch.bfloat16, device=device)
    if transpose:
        t = t.transpose(*transpose).contiguous().transpose(*transpose)
    t.requires_grad_()
    offsets = torch.tensor([3, 0, 9, 1], dtype=torch.int32)
    freqs = angle_table(max(lengths) + 10, D, device)
    y = apply_rotary_pos_emb(
        t,
        freqs,
        "thd",
        offsets.to(device) if with_starts else None,
        interleaved,
        fused,
        cu_seqlens,
        cp_size,
        cp_rank,
    )
    gradient = values(*t.shape, dtype=torch.bfloat16, device=device, seed=1)
    y.backward(gradient)
    assert y.is_contiguous()
    index = torch.cat(
        [
            zigzag(n, cp_size, cp_rank) + (int(start) if with_starts else 0)
            for n, start in zip(LENGTHS, offsets, strict=True)
        ]
    )
    cos, sin = (part[0] for part in of_rows(freqs, index[None]))
    agree(y, elementwise(t, cos, sin, interleaved=interleaved), fused)
    agree(t.grad, transposed(gradient, cos, sin, interleaved=interleaved), fused)


def test_tokens_of_no_packed_sequence_stay_as_they_are(device):
    t = values(9, H, D, dtype=torch.float32, device=device)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    freqs = angle_table(9, D, device)
    y = apply_rotary_pos_emb(t, freqs, "thd", cu_seqlens=cu_seqlens, fused=True)
    assert torch.equal(y[7:], t[7:])


@pytest.mark.parametrize("loss", ["sum", "square"])
def test_broadcast_and_second_gradients(loss, device):
    t = values(4, 1, 1, 4, device=device).requires_grad_()
    freqs = angle_table(4, 4, device)

    def function(t):
        y = apply_rotary_pos_emb(t, freqs, fused=True)
        return y.sum() if loss == "sum" else y.square()

    assert torch.autograd.gradcheck(function, t)
    if loss == "square":
        assert torch.autograd.gradgradcheck(function, t)


@interleavings
@starts
@formats
@shards
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize("one_table", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_qkv_in_one_tensor(
    batch,
    one_table,
    rotary_dim,
    dtype,
    cp_size,
    cp_rank,
    tensor_format,
    with_starts,
    interleaved,
    device,
):
    split = [4 * D, D, D]
    whole = values(batch, S, H, 6 * D, dtype=dtype, device=device)
    qkv = in_order(whole, tensor_format).contiguous().requires_grad_()
    q_freqs = angle_table(S * cp_size + 4, rotary_dim, device)
    k_freqs = q_freqs if one_table else q_freqs * 2
    start_positions = STARTS[:batch].to(device) if with_starts else None
    options = {"interleaved": interleaved, "cp_size": cp_size, "cp_rank": cp_rank}
    arguments = q_freqs, k_freqs, split, tensor_format, start_positions
    results = apply_fused_qkv_rotary_pos_emb(qkv, *arguments, **options)
    of_inference = apply_fused_qkv_rotary_pos_emb(qkv.detach(), *arguments, **options)
    assert all(map(torch.equal, of_inference, results))
    index = zigzag(S, cp_size, cp_rank)[None] + (STARTS[:batch, None] if with_starts else 0)
    index = index.expand(batch, S)
    q, k, v = whole.split(split, -1)
    inputs = q.reshape(batch, S, 4 * H, D), k, v
    gradients = [values(*x.shape, dtype=dtype, device=device, seed=3) for x in inputs]
    torch.autograd.backward(results, [in_order(g, tensor_format) for g in gradients])
    expected = []
    for i, (y, x, gradient) in enumerate(zip(results, inputs, gradients, strict=True)):
        assert y.is_contiguous()
        if i == 2:
            assert torch.equal(in_order(y, tensor_format), x)
            expected.append(double(gradient))
            continue
        cos, sin = of_rows(k_freqs if i else q_freqs, index)
        check(in_order(y, tensor_format), elementwise(x, cos, sin, interleaved=interleaved))
        expected.append(transposed(gradient, cos, sin, interleaved=interleaved))
    expected[0] = expected[0].reshape(batch, S, H, 4 * D)
    check(in_order(qkv.grad, tensor_format), torch.cat(expected, -1))


def test_wrong_arguments_are_refused(device):
    t = values(S, B, H, D, dtype=torch.float32, device=device)
    freqs = angle_table(S, D, device)
    with pytest.raises(ValueError, match="tensor_format must be"):
        apply_rotary_pos_emb(t, freqs, "bhsd")
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        apply_rotary_pos_emb(t[:, 0], freqs, "thd")
    with pytest.raises(ValueError, match="table must hold the positions"):
        apply_rotary_pos_emb(t, freqs[:3])
    with pytest.raises(ValueError, match="even number of tokens"):
        apply_rotary_pos_emb(t[:3], freqs, cp_size=2)
    with pytest.raises(ValueError, match="qkv_split_arg_list must be"):
        apply_fused_qkv_rotary_pos_emb(t, freqs, freqs, [D, D, D])
    with pytest.raises(ValueError, match="cu_seqlens must be None"):
        apply_fused_qkv_rotary_pos_emb(
            t, freqs, freqs, [D // 2, D // 4, D // 4], cu_seqlens=torch.tensor([0, 3])
        )


@interleavings
@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize(("trained", "factor"), [(None, None), (8, 2), (4, 2)])
def test_the_module(trained, factor, percent, interleaved, device):
    module = RotaryPositionEmbedding(D, percent, factor, trained, 500.0, interleaved).to(device)
    angles = module(16, offset=2)
    dim = int(D * percent)
    assert angles.shape == (16, 1, 1, dim) and angles.dtype == torch.float32
    positions = torch.arange(2, 18).double()
    if trained:
        positions = positions / (factor if trained * factor >= 16 else 16 / trained)
    exact = torch.outer(positions, 500.0 ** -(torch.arange(0, dim, 2).double() / dim))
    exact = exact.repeat_interleave(2, 1) if interleaved else torch.cat([exact, exact], 1)
    assert torch.allclose(double(angles)[:, 0, 0], exact, rtol=1e-5, atol=1e-6)
    assert set(module.state_dict()) == {"inv_freq"}
