"""rope_cupy.compat.liger, over the matrix of Liger's own tests in small."""

import pytest
import torch
from compat_reference import (
    DEVICES,
    DTYPES,
    check,
    double,
    eager,
    rotate,
    share_of_equal,
    table,
    values,
)

from rope_cupy.compat import liger

B, S, H, K, D = 2, 9, 4, 2, 32
pytestmark = pytest.mark.parametrize("device", DEVICES)
table_dtypes = pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16], ids=str)
orders = pytest.mark.parametrize("physically_bshd", [True, False])


def heads(count, dtype, device, physically_bshd=True, head_dim=D, seed=0):
    """(batch, heads, seq_len, d), which lies in memory as its name says."""
    shape = (B, S, count, head_dim) if physically_bshd else (B, count, S, head_dim)
    x = values(*shape, dtype=dtype, device=device, seed=seed)
    return (x.transpose(1, 2) if physically_bshd else x).requires_grad_()


def agree(results, inputs, exact_of, **options):
    """Results and gradients are those of exact_of(x, conjugate); inputs are left as they are."""
    befores = [x.detach().clone() for x in inputs]
    gradients = [values(*y.shape, dtype=y.dtype, device=y.device, seed=7) for y in results]
    torch.autograd.backward(results, gradients)
    for y, x, before, gradient in zip(results, inputs, befores, gradients, strict=True):
        check(y, exact_of(before, False), **options)
        check(x.grad, exact_of(gradient, True), **options)
        assert y.data_ptr() != x.data_ptr() and torch.equal(x, before)


@orders
@table_dtypes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [D, D // 2])
@pytest.mark.parametrize("form", ["2", "3", "batch", "heads at 1", "heads at 2"])
def test_new_tensors_whatever_the_memory(
    form, rotary_dim, dtype, table_dtype, physically_bshd, device
):
    q, k = (heads(n, dtype, device, physically_bshd) for n in (H, K))
    half = table(B * S, rotary_dim // 2, dtype=table_dtype, device=device)
    rows = half if form == "batch" else [part[:S] for part in half]
    cos, sin = (torch.cat([part, part], -1) for part in rows)
    unsqueeze_dim = 2 if form == "heads at 2" else 1
    if form == "batch":
        cos, sin = cos.unflatten(0, (B, S)), sin.unflatten(0, (B, S))
    elif form != "2":
        cos, sin = cos[None], sin[None]
    if "heads" in form:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    results = liger.liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    shape = (B, 1, S, -1) if form == "batch" else (1, 1, S, -1)
    tables = [part.reshape(shape) for part in rows]
    agree(results, (q, k), lambda x, conjugate: rotate(x, *tables, conjugate=conjugate))


def test_the_axis_of_heads_is_found_where_unsqueeze_dim_is_another(device):
    q, k = (heads(n, torch.float32, device) for n in (H, K))
    cos, sin = (torch.cat([x, x], -1)[None, None] for x in table(S, D // 2, device=device))
    found = liger.liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    told = liger.liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    assert all(map(torch.equal, found, told))


def test_position_ids_mean_nothing(device):
    q, k = (heads(n, torch.float32, device) for n in (H, K))
    cos, sin = (torch.cat([x, x], -1)[None] for x in table(S, D // 2, device=device))
    ids = torch.full((1, S), 5, device=device)
    with_ids = liger.liger_rotary_pos_emb(q, k, cos, sin, ids)
    without = liger.liger_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, with_ids, without))


@pytest.mark.parametrize("head_dim", [31, 7])
def test_of_odd_heads_the_last_element_stays(head_dim, device):
    q, k = (heads(n, torch.float32, device, head_dim=head_dim) for n in (H, K))
    half = table(S, head_dim // 2, dtype=torch.float32, device=device)
    tables = [torch.cat([part, part, part[:, :1]], -1)[None] for part in half]
    results = liger.liger_rotary_pos_emb(q, k, *tables)
    for y, x in zip(results, (q, k), strict=True):
        check(y, rotate(x, *half))
        assert torch.equal(y[..., -1], x[..., -1])


def test_tables_of_half_width(device):
    q, k = (heads(n, torch.bfloat16, device) for n in (H, K))
    cos, sin = table(S, D // 2, dtype=torch.bfloat16, device=device)
    whole = liger.liger_rotary_pos_emb_gpt_oss(q, k, cos[None], sin[None])
    check(whole[0], rotate(q, cos, sin))
    part = liger.liger_rotary_pos_emb(q, k, cos[None], sin[None], rotary_dim=D // 2)
    check(part[1], rotate(k, cos[:, : D // 4], sin[:, : D // 4]))
    for rotary_dim in (3, 0, D + 2):
        with pytest.raises(ValueError, match="rotary_dim must be even"):
            liger.liger_rotary_pos_emb(q, k, cos, sin, rotary_dim=rotary_dim)
    with pytest.raises(ValueError, match="cos must have rotary_dim / 2 = 16 columns"):
        liger.liger_rotary_pos_emb(q, k, cos[:, :4], sin[:, :4], rotary_dim=D)


@table_dtypes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_vision_function(dtype, table_dtype, device):
    q, k = (values(S, n, D, dtype=dtype, device=device).requires_grad_() for n in (H, H))
    half = table(S, D // 2, dtype=table_dtype, device=device)
    cos, sin = (torch.cat([part, part], -1) for part in half)
    results = liger.liger_rotary_pos_emb_vision(q, k, cos, sin)
    tables = [part[:, None] for part in half]
    agree(results, (q, k), lambda x, conjugate: rotate(x, *tables, conjugate=conjugate))


@orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("section", [[4, 6, 6], [16, 0, 0], [2, 3, 3], [9, 9, 9]])
def test_three_axes_in_sections(section, dtype, physically_bshd, device):
    q, k = (heads(n, dtype, device, physically_bshd) for n in (H, K))
    generator = torch.Generator().manual_seed(1)
    positions = torch.randint(0, 50, (3, B, S), generator=generator)
    half = [part[positions] for part in table(50, D // 2, dtype=dtype)]
    full = [torch.cat([part, part], -1).to(device) for part in half]
    results = liger.liger_multimodal_rotary_pos_emb(q, k, *full, section)
    ends = section[0], section[0] + section[1]
    axes = torch.tensor([sum(pair >= end for end in ends) for pair in range(D // 2)])
    chosen = [part[axes, :, :, torch.arange(D // 2)].permute(1, 2, 0)[:, None] for part in half]
    both = [torch.cat([part, part], -1) for part in chosen]
    for y, x in zip(results, (q, k), strict=True):
        assert share_of_equal(y.cpu(), eager(x.detach().cpu(), *both)) > (
            0.999 if dtype == torch.bfloat16 else 0.9
        )
        check(y, rotate(x, *chosen), share=0.6 if dtype == torch.bfloat16 else 0.99)
    gradient = values(B, H, S, D, dtype=dtype, device=device, seed=3)
    results[0].backward(gradient)
    exact = rotate(gradient, *chosen, conjugate=True)
    check(q.grad, exact, share=0.6 if dtype == torch.bfloat16 else 0.99)


def complex_table(rows, pairs, device):
    cos, sin = table(rows, pairs, dtype=torch.float32, device=device)
    return torch.complex(cos, sin), cos, sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["rows", "one batch", "batches", "longer", "real"])
@pytest.mark.parametrize("head_dim", [D, 33])
def test_llama4_text(head_dim, form, dtype, device):
    q, k = (values(B, S, n, head_dim, dtype=dtype, device=device).requires_grad_() for n in (H, K))
    freqs, cos, sin = complex_table(B * S, head_dim // 2, device)
    if form == "batches":
        freqs, cos, sin = (part.unflatten(0, (B, S)) for part in (freqs, cos, sin))
        cos, sin = cos[:, :, None], sin[:, :, None]
    else:
        freqs = freqs if form == "longer" else freqs[:S]
        cos, sin = cos[:S, None], sin[:S, None]
    freqs = freqs[None] if form == "one batch" else freqs
    freqs = torch.view_as_real(freqs) if form == "real" else freqs
    results = liger.liger_llama4_text_rotary_pos_emb(q, k, freqs)

    def exact(x, conjugate):
        return rotate(x, cos, sin, interleaved=True, conjugate=conjugate)

    agree(results, (q, k), exact)
    if head_dim % 2:
        assert torch.equal(results[0][..., -1], q[..., -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", [2, 3, 4])
def test_llama4_vision(axes, dtype, device):
    q, k = (values(B, S, H, D, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    freqs, cos, sin = complex_table(S, D // 2, device)
    freqs = {2: freqs, 3: freqs[:, None], 4: freqs[None, :, None]}[axes]
    results = liger.liger_llama4_vision_rotary_pos_emb(q, k, freqs)
    tables = cos[:, None], sin[:, None]
    agree(
        results,
        (q, k),
        lambda x, conjugate: rotate(x, *tables, interleaved=True, conjugate=conjugate),
    )


def test_llama4_vision_by_a_table_that_lost_its_imaginary_part(device):
    q, k = (values(B, S, H, D, dtype=torch.bfloat16, device=device) for _ in range(2))
    _, cos, _ = complex_table(S, D // 2, device)
    real = cos.bfloat16()
    y, _ = liger.liger_llama4_vision_rotary_pos_emb(q, k, real)
    check(y, double(q) * double(real).repeat_interleave(2, -1)[:, None])
